"""The evaluations of a run by name: what each reads, which experiment of `lab/` it is, and where its result goes.

gate          lab/gate_accuracy.json       the gate on planted faults of phantoms that no fit has seen
captions      lab/caption_*.json           measurements by diagnosis, the phantoms' truth, captioners compared
near_copies   lab/near_copies.json         samples that are almost a training image
worth         lab/worth.json               what the samples add to a downstream model
theta-sweep   lab/theta_sweep.json         what each theta keeps, and what it is worth
prompt-banks  lab/prompt_banks.json        the same of each prompt bank
validation-noise  lab/validation_noise.json  from how much noise the gate can judge, and by latents or pixels
dermae-table  lab/dermae_table.json        encoders by rows, start and teacher
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from factory import records
from factory.recipe import Recipe
from factory.run import Run

Echo = Callable[[str], None]


def evaluate(
    run: Run, recipe: Recipe, name: str, others: Sequence[str] = (), reviews: Sequence[Path] = (), echo: Echo = print
) -> None:
    """One of `EVALUATIONS`: the result goes to lab/ and into the report.

    For `captions`, `others` are runs whose captions are compared with this one's, and `reviews` are raters' files:
    with those nothing is measured anew, they are imported.
    """
    from factory import caption_study, taxonomy

    if name != "captions" and (others or reviews):
        raise ValueError(f"--with and --reviews must go with `evaluate captions`, got {name}; leave them out.")
    if others and reviews:
        raise ValueError("--reviews must come without --with, got both; import files on the study that is there.")
    if reviews:
        return caption_study.import_reviews(run, reviews, echo)
    if name == "captions":
        _evaluate_captions(run, recipe, echo)
        section = recipe.evaluate
        return caption_study.prepare(run, others, section.caption_images, section.caption_seed, echo)
    EVALUATIONS[taxonomy.check(name, tuple(EVALUATIONS), "evaluate")](run, recipe, echo)


def _evaluate_gate(run: Run, recipe: Recipe, echo: Echo) -> None:
    from factory.lab.planted import fitted_theta, gate_accuracy

    validate, count, size = local_validator(run, recipe), recipe.evaluate.gate_pairs, recipe.plan.size
    result = gate_accuracy(validate, seed=97, count=count, size=size)
    theta = fitted_theta(validate, seed=1301, count=count, size=size)
    _write(run, "gate_accuracy", result | {"fitted_theta_by_area": theta})
    echo(f"gate        precision {_share(result, 'precision')}, recall {_share(result, 'recall')} on planted faults")
    echo(f"gate        theta by size, fitted on other phantoms: gate.theta_by_area={json.dumps(theta)}")


def _share(result: dict[str, Any], name: str) -> str:
    value = result[name]["value"] if isinstance(result[name], dict) else result[name]
    return "undefined" if value is None else f"{value:.3f}"


def local_validator(run: Run, recipe: Recipe) -> Callable[..., list[tuple[str, str | None, float | None]]]:
    """The gate on images and masks in this process: images (N, H, W, 3) uint8, masks (N, H, W) bool."""
    import torch

    from factory.models.encoder import load_image_encoder
    from factory.runtime.weights import weights_of
    from factory.stages.score import ScoreSamples

    generator, adapter, gate = weights_of(run, recipe)
    encoder = load_image_encoder(generator, adapter, recipe.plan.generator)
    score = ScoreSamples(gate, encoder.vae_digest, recipe.gate)

    @torch.inference_mode()
    def validate(images: Any, masks: Any) -> list[tuple[str, str | None, float | None]]:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = torch.cat([encoder.encode(part) for part in pixels.split(16)])
        return [(j["outcome"], j["reason"], j["scores"]["iou"]) for j in score(latents.numpy(), masks)]

    return validate


def _evaluate_captions(run: Run, recipe: Recipe, echo: Echo) -> None:
    from factory.lab import attributes
    from factory.lab.caption_truth import captioner_accuracy

    measured = run.table("captions").read(["record_id", "outcome", "colors", *attributes.NUMBERS])
    found = attributes.by_diagnosis(measured, run.table("corpus").read(["record_id", "diagnosis"]))
    _write(run, "caption_attributes", found)
    echo(f"captions    measurements of {found['num_images']} images by diagnosis")
    corpus = run.table("corpus").read(
        ["record_id", "outcome", "true_asymmetry", "true_border_irregularity", "true_color_count", "true_colors"]
    )
    if corpus["true_asymmetry"].null_count == len(corpus):
        echo("captions    no truth to compare with: the corpus holds no phantoms")
        return
    result = captioner_accuracy(corpus, run.table("captions").read())
    _write(run, "caption_accuracy", result)
    echo("captions    compared with the phantoms' truth")


def _evaluate_near_copies(run: Run, recipe: Recipe, echo: Echo) -> dict[str, Any]:
    from factory.lab.lineage import nearest_real, parent_licences

    samples, corpus = run.table("samples").read(), run.table("corpus").read()
    result = nearest_real(run.store, samples, corpus, image_size=recipe.evaluate.worth.image_size)
    parent_licences(run.store, samples, corpus)
    echo(f"near copies {len(result['copies'])} samples flagged")
    return result


def _evaluate_worth(run: Run, recipe: Recipe, echo: Echo) -> None:
    from factory.lab.worth import run_worth

    if not _num_accepted(run):
        echo("worth       nothing was accepted, so there is nothing to measure")
        return
    copies = _evaluate_near_copies(run, recipe, echo)["copies"]
    run_worth(
        run.store,
        run.table("corpus").read(),
        run.table("samples").read(),
        recipe.evaluate.worth,
        copies=copies,
        progress=echo,
    )


def _evaluate_thetas(run: Run, recipe: Recipe, echo: Echo) -> None:
    from factory.lab.sweeps import theta_sweep

    section, corpus, samples = recipe.evaluate, run.table("corpus").read(), run.table("samples").read()
    theta_sweep(run.store, corpus, samples, recipe.gate, section.thetas, section.worth, progress=echo)


def _evaluate_banks(run: Run, recipe: Recipe, echo: Echo) -> None:
    from factory.lab.sweeps import prompt_banks

    copies = _evaluate_near_copies(run, recipe, echo)["copies"]
    tables = run.table("corpus").read(), run.table("samples").read()
    prompt_banks(run.store, *tables, recipe.evaluate.worth, copies=copies, progress=echo)


def _evaluate_noise(run: Run, recipe: Recipe, echo: Echo) -> None:
    from factory.lab.validation_noise import validation_noise
    from factory.models.families import load_denoiser
    from factory.models.weights import tree_digest
    from factory.runtime.weights import weights_of
    from factory.stages.score import ScoreSamples

    generator, adapter, gate = weights_of(run, recipe)
    denoiser, section = load_denoiser(generator, adapter, recipe.plan.generator), recipe.evaluate
    score = ScoreSamples(gate, denoiser.vae_digest, recipe.gate)
    validation_noise(
        run.store, denoiser, score, section.log_snrs, section.gate_pairs, recipe.plan.size,
        gate_digest=tree_digest(gate), progress=echo,
    )  # fmt: skip


def _evaluate_dermae(run: Run, recipe: Recipe, echo: Echo) -> None:
    from factory.lab.dermae import run_table

    fit_dermae(run, recipe, echo)
    directory = run.local_dir("evaluate dermae-table")
    tables = run.table("corpus").read(), run.table("samples").read()
    run_table(run.store, directory, *tables, recipe.evaluate.dermae, progress=echo)


def fit_dermae(run: Run, recipe: Recipe, echo: Echo = print) -> None:
    """Fits and tests on a cluster every cell of DerMAE's table that has no result yet."""
    from factory.lab.dermae_tasks import tasks_of
    from factory.runtime import cluster
    from factory.runtime.tasks import carry_out

    shared, chains = tasks_of(run, recipe.evaluate.dermae)
    if not chains:
        return
    with cluster.connect() as resources:
        carry_out(shared, resources, recipe, "dermae      pre-training", echo)
        carry_out(chains, resources, recipe, "dermae      chain", echo)


def preview(recipe: Recipe, name: str, on: str | None, echo: Echo = print) -> None:
    """What an evaluation would cost, of those that are long. on: a cluster's YAML; None is what is here."""
    from factory.lab.dermae_cost import cost_lines
    from factory.runtime import cluster
    from factory.runtime.plan_cost import here
    from factory.runtime.tasks import workers_of

    if name != "dermae-table":
        raise ValueError(f"--dry-run must go with `evaluate dermae-table`, got {name}; leave it out.")
    resources = here() if on is None else cluster.resources_of_yaml(on)
    workers, unit = workers_of(resources, recipe), "GPU" if resources.gpus else "core"
    section, price = recipe.evaluate.dermae, recipe.plan.price_per_gpu_hour if resources.gpus else None
    for line in cost_lines(section, workers, unit, section.tflops, price):
        echo(line)


def _num_accepted(run: Run) -> int:
    return run.table("samples").counts().get(records.ACCEPTED, 0)


def _write(run: Run, name: str, result: dict[str, Any]) -> None:
    run.store.replace(f"lab/{name}.json", (json.dumps(result, indent=2, sort_keys=True, default=str) + "\n").encode())


EVALUATIONS: dict[str, Callable[[Run, Recipe, Echo], object]] = {
    "worth": _evaluate_worth, "gate": _evaluate_gate, "captions": _evaluate_captions,
    "near_copies": _evaluate_near_copies, "theta-sweep": _evaluate_thetas, "prompt-banks": _evaluate_banks,
    "validation-noise": _evaluate_noise, "dermae-table": _evaluate_dermae,
}  # fmt: skip
