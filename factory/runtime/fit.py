"""The named fits of a run: what each is fitted from, on Ray Train, and the card of what comes out.

`lora` and `gate` are fitted for the recipe's generator, `mae` on corpus and samples, `finetune` from `mae` or a public
checkpoint, `distill` from `mae` or from a teacher that is there.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from factory import records, taxonomy
from factory.fits import preflight
from factory.fits.card import checkpoint_at, digest_of, read_card
from factory.fits.checkpoint import FREE
from factory.models.weights import FAMILIES, family_of, generator_digest, tree_digest
from factory.recipe import FitSection, Recipe
from factory.run import Run
from factory.runtime import backgrounds, cluster, encode, fit_rows, licences, train
from factory.runtime.preview import PreviewActor
from factory.runtime.weights import STARTER_LICENCE, fitted_generator, generator_of

if TYPE_CHECKING:
    from factory.stages.preview import DrawPreview

BEFORE = {"beta2": 0.999}  # what every fit did while its section did not say
FITS = ("lora", "gate", "mae", "finetune", "distill")

Echo = Callable[[str], None]


def fit(run: Run, recipe: Recipe, name: str, echo: Echo = print) -> None:
    """Fits `lora`, `gate`, `mae`, `finetune` or `distill` on Ray Train and publishes the weights with their card.
    Weights that are there already, fitted from the same inputs, are left alone."""
    section: FitSection = getattr(recipe.fit, taxonomy.check(name, FITS, "fit"))
    target = weights_name(recipe, name)
    inputs = _inputs(run, recipe, name)
    if target in run.weights() and _same(run.card(target).get("inputs") or {}, inputs, section):
        echo(f"fit {name:<8}{target} is there already")
        return
    digest = records.digest(json.dumps(inputs, sort_keys=True))[:8]
    directory = run.local_dir("fit") / "fits" / f"{target}-{digest}"
    build = partial(_objective, run.uri, recipe, name, directory)
    if name == "lora" and section.preview_every and recipe.fit.lora.family == "inpaint":
        backgrounds.find(run, recipe, echo)  # its grids are drawn into them
    if name == "lora":
        preflight.check(recipe.fit.lora, recipe.plan.size, generator_of(recipe), cluster.gpu_memory())
    with cluster.connect() as resources:
        use_gpu = resources.gpus > 0
        if name == "lora" and (encoder := fit_rows.encoder_of(recipe)) is not None:
            masks, pools = fit_rows.reads_masks(recipe), cluster.pools(resources, recipe)
            encode.encode(run, encoder, masks, pools, echo)
        preview = _preview(run.uri, recipe, name, directory, resources.gpus - section.num_workers if use_gpu else None)
        weights = train.fit(build, section, directory, use_gpu=use_gpu, build_preview=preview)
    for grid in sorted((directory / "previews").glob("step-*.png")):
        (weights / "previews").mkdir(exist_ok=True)
        shutil.copy(grid, weights / "previews" / grid.name)
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    (weights / "metrics.jsonl").write_text((directory / "metrics.jsonl").read_text())
    _complete_card(run, recipe, name, weights, inputs)
    run.put_weights(target, weights)
    first, last = metrics[0], metrics[-1]
    curve = f"loss {first['loss']:.4f} -> {last['loss']:.4f}"
    echo(f"fit {name:<8}{last['step']} steps  {curve}  {median(row['step_s'] for row in metrics):.2f} s a step")


def _preview(
    uri: str, recipe: Recipe, name: str, directory: Path, spare_gpus: int | None
) -> Callable[[], PreviewActor] | None:
    """What draws grids beside a fit, for those that ask for some: only generators draw. spare_gpus: those that the
    workers leave, None on a cluster without any."""
    if not getattr(recipe.fit, name).preview_every:
        return None
    if name != "lora":
        raise ValueError(f"fit.{name}.preview_every must be 0, got more: only `lora` draws; leave it out.")
    if spare_gpus is not None and spare_gpus < 1:
        raise ValueError(
            "fit.lora.preview_every must have a GPU beside those of the workers, got none; lower num_workers or set "
            "it to 0."
        )
    return partial(PreviewActor, directory, partial(_drawing, uri, recipe), use_gpu=spare_gpus is not None)


def _drawing(uri: str, recipe: Recipe) -> DrawPreview:
    """What the grids of a fit are drawn and compared with, on their actor."""
    from factory.stages.preview import MAX_TRAINING, DrawPreview, rows_of

    run, family = Run(uri), recipe.fit.lora.family
    section = recipe.plan.model_copy(update={"generator": family})
    drawn = rows_of(recipe.model_copy(update={"plan": section}))
    drawn = backgrounds.for_samples(uri, drawn) if family == "inpaint" else drawn
    rows = _training_rows(run.table("corpus").read())[:MAX_TRAINING]
    images, groups = [row["image"]["bytes"] for row in rows], [row["group_id"] or row["record_id"] for row in rows]
    return DrawPreview(generator_of(recipe), family, recipe, drawn, images, groups)


def weights_name(recipe: Recipe, name: str) -> str:
    """`lora-joint`, `gate-joint` (by generator); `mae-`, `finetune-` and `distill-` with the name of a timm model."""
    family = {
        "lora": recipe.fit.lora.family, "gate": recipe.plan.generator, "mae": recipe.fit.mae.encoder,
        "distill": recipe.fit.distill.student, "finetune": _finetuned(recipe),
    }[name]  # fmt: skip
    return f"{name}-{family}"


def _finetuned(recipe: Recipe) -> str:
    section = recipe.fit.finetune
    return recipe.fit.mae.encoder if section.weights is None else section.model


def _source(run: Run, recipe: Recipe, name: str) -> Path | None:
    """The directory that `finetune` or `distill` starts from: the fitted MAE, or a teacher that is there. None for a
    checkpoint that `finetune` reads by its path."""
    if name == "finetune" and recipe.fit.finetune.weights is not None:
        return None
    teacher = recipe.fit.distill.teacher if name == "distill" else None
    if teacher is not None and teacher not in run.weights():
        return Path(teacher)
    return run.weights_dir(teacher or weights_name(recipe, "mae"))


def _inputs(run: Run, recipe: Recipe, name: str) -> dict[str, Any]:
    """What a fit's weights depend on."""
    other = set(FAMILIES) - {recipe.fit.lora.family} if name == "lora" else set()  # their sections
    found: dict[str, Any] = {"section": getattr(recipe.fit, name).model_dump(mode="json", exclude=FREE | other)}
    if name == "lora":
        _check_base(recipe)  # before a cluster is started
    if name in ("lora", "gate"):
        base = generator_of(recipe) if name == "lora" else fitted_generator(run, recipe)[0]
        found |= {"base": generator_digest(base), "size": recipe.plan.size}
    by_class = name == "lora" and recipe.fit.lora.family == "class_conditional"
    if by_class:
        found["classes"] = fit_rows.classes_of(recipe)
    tables = {"lora": ("corpus", "captions"), "gate": ()}.get(name, ("corpus",))
    tables = ("corpus",) if by_class else tables
    for table in tables:
        run.table(table).sealed()
    if name in ("mae", "finetune", "distill") and run.table("samples").manifest() is not None:
        tables = (*tables, "samples")
    if name in ("finetune", "distill"):
        from factory.fits.finetune import checkpoint_of

        source = _source(run, recipe, name)
        found["encoder"] = (
            digest_of(checkpoint_of(recipe.fit.finetune)) if source is None else read_card(source)["digest"]
        )
    if name == "mae" and recipe.fit.mae.weights is not None:
        found["begun_from"] = digest_of(checkpoint_at(recipe.fit.mae.weights, "fit.mae.weights"))
    if name == "distill" and recipe.fit.distill.student_weights is not None:
        found["student"] = digest_of(checkpoint_at(recipe.fit.distill.student_weights, "fit.distill.student_weights"))
    return found | {"tables": {table: run.table(table).digest() for table in tables}}


def _same(kept: dict[str, Any], inputs: dict[str, Any], section: FitSection) -> bool:
    """Whether weights were fitted from these inputs, also by a version whose section lacked a field: what it did then
    is in `BEFORE` or that field's default."""
    try:
        filled = type(section).model_validate_json(json.dumps(BEFORE | dict(kept.get("section") or {})))
    except ValidationError:
        return False
    asked = inputs["section"]
    found = {name: value for name, value in filled.model_dump(mode="json").items() if name in asked}
    return kept | {"section": found} == inputs


def _check_base(recipe: Recipe) -> None:
    """The base that `fit lora` needs; a network of classes from nothing needs no more than a VAE."""
    from factory.models.families import check_base

    section, base = recipe.fit.lora, generator_of(recipe)
    if section.family != "class_conditional":
        check_base(base, section.family)
        return
    from factory.fits.class_conditional import check_mode

    check_mode(family_of(base), section.train_mode)


def _objective(uri: str, recipe: Recipe, name: str, directory: Path | None = None) -> Any:
    """The objective of a fit, built on a worker from the run's tables. directory: the fit's, which workers share."""
    from factory.fits import distill, finetune, gate, mae

    run = Run(uri)
    if name == "gate":
        return gate.FitGate(fitted_generator(run, recipe)[0], recipe.fit.gate, recipe.plan.size)
    if name == "lora":
        return fit_rows.objective(run, recipe)
    made = run.table("samples").manifest() is not None
    if name == "mae":
        return mae.mae_objective(recipe.fit.mae, run.table("corpus"), run.table("samples") if made else None)
    corpus, samples = run.table("corpus").read(), run.table("samples").read() if made else None
    source = _source(run, recipe, name)
    if name == "finetune":
        return finetune.finetune_objective(recipe.fit.finetune, source, corpus, samples)
    assert source is not None
    return distill.distill_objective(
        recipe.fit.distill, source, corpus, samples, teacher_dir=directory, store=run.store, log=lambda line: None
    )


def _training_rows(corpus: Any) -> list[dict[str, Any]]:
    """The accepted rows of the training split with an image."""
    return [
        row for row in corpus.select(["record_id", "group_id", "image", "split", "outcome"]).to_pylist()
        if row["outcome"] == records.ACCEPTED and row["split"] == "train" and row["image"]
    ]  # fmt: skip


def _complete_card(run: Run, recipe: Recipe, name: str, weights: Path, inputs: dict[str, Any]) -> None:
    """The card: what the objective wrote, and what only the line knows. `inputs` holds the recipe's section and the
    digests of the tables that were read, `licence` joins theirs and the base's."""
    path = weights / "card.json"
    card = json.loads(path.read_text()) if path.exists() else {}
    files = sorted(weights.rglob("*.safetensors"))
    card.setdefault("bytes", sum(file.stat().st_size for file in files))
    card.setdefault("params", sum(_num_values(file) for file in files))
    card.setdefault("digest", tree_digest(weights))
    found = {STARTER_LICENCE} if name == "gate" else licences.of_training_rows(run)  # the gate's phantoms are ours
    if name in ("lora", "gate"):
        base = recipe.synthesize.weights
        licence = STARTER_LICENCE if base == "starter" else licences.of_base(generator_of(recipe))
        card["base"] = {"name": base, "licence": licence, "digest": inputs["base"]}
        found.add(licence)
    else:
        found |= {licences.of_base(place) for place in _begun_from(run, recipe, name)}
    card |= {"objective": name, "inputs": inputs, "licence": licences.joined(found)}
    path.write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")


def _begun_from(run: Run, recipe: Recipe, name: str) -> list[Path]:
    """The directories of the weights that `mae`, `finetune` and `distill` begin from or are taught by."""
    section: Any = getattr(recipe.fit, name)
    files = [getattr(section, field, None) for field in ("weights", "student_weights")]
    source = None if name == "mae" else _source(run, recipe, name)
    return [*(Path(file).parent for file in files if file is not None), *([] if source is None else [source])]


def _num_values(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as stored:
        return sum(math.prod(stored.get_slice(key).get_shape()) for key in stored.keys())  # noqa: SIM118
