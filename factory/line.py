"""The line: every step of the factory as a function of (run, recipe). What the commands and the jobs call.

    corpora --ingest--> corpus --caption--> captions --fit--> weights
    quotas  --plan--> plan --synthesize, gate--> samples --evaluate--> lab --release--> release, report

A step that is done is not done again; one that was stopped goes on. Everything heavy is imported where it is used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from factory import records
from factory.models.weights import STARTER, generator_digest, tree_digest
from factory.recipe import FitSection, Recipe
from factory.run import Run

FITS = ("lora", "gate", "mae", "distill")
EVALUATIONS = ("gate", "captions", "near_copies", "worth")
STEPS = ("ingest", "caption", "fit", "plan", "synthesize", "encoders", "evaluate", "release")
STARTER_LICENCE = "Apache-2.0"

Echo = Callable[[str], None]


@contextlib.contextmanager
def driving(uri: str, recipe: Recipe, step: str) -> Iterator[Run]:
    """A run that this process may write to: its lock is held, its header says the recipe, its events say the step.

    A request that is refused leaves the header as it was: later commands take their recipe from it.
    """
    run = Run(uri)
    with run.lock(), run.events() as events:
        before = run.header()
        run.write_header(recipe)
        events.write("started", step=step)
        try:
            yield run
        except BaseException as error:
            if isinstance(error, ValueError):
                run.restore_header(before)
            events.write("stopped", step=step, error=f"{type(error).__name__}: {error}"[:500])
            raise
        events.write("finished", step=step)


def recipe_of(uri: str) -> Recipe | None:
    """The recipe that a run was last worked on with, or None for a new run."""
    header = Run(uri).header()
    return None if header is None else Recipe.model_validate_json(json.dumps(header["recipe"]))


# ------------------------------------------------------------------------------------------------------ tables


def ingest(run: Run, recipe: Recipe, echo: Echo = print) -> None:
    """Sources to the sealed corpus."""
    from factory.corpora import list_entries
    from factory.runtime import cluster, data

    if run.table("listing").manifest() is None:
        list_entries(recipe.corpus)  # a path that is not there is said before a cluster is started
    with cluster.connect() as resources:
        data.ingest(run, recipe, cluster.pools(resources, recipe), echo)


def caption(run: Run, recipe: Recipe, echo: Echo = print) -> None:
    """The corpus's captions."""
    from factory.runtime import cluster, data

    run.table("corpus").sealed()
    with cluster.connect() as resources:
        data.caption(run, recipe, cluster.pools(resources, recipe), echo)


def plan(run: Run, recipe: Recipe, echo: Echo = print) -> None:
    """The plan table. Its fingerprint names its samples, so the same recipe on the same captions plans the same ids."""
    from factory.stages import plan as planning
    from factory.tables import fingerprint_of

    table = run.table("plan")
    looks, parents = _looks(run)
    fingerprint = fingerprint_of(recipe, "plan", parents, {})
    table.require(fingerprint)
    rows = list(planning.plan_rows(recipe.plan, records.digest(json.dumps(fingerprint, sort_keys=True)), looks))
    parts = [rows[start : start + planning.PART_ROWS] for start in range(0, len(rows), planning.PART_ROWS)]
    for part in table.missing(len(parts)):
        table.commit(part, records.rows_to_table("plan", parts[part]), row_group_by="unit")
    table.seal(len(parts), fingerprint, {name: run.table(name).digest() for name in parents})
    cells = len(planning.quotas(recipe.plan))
    echo(f"plan        {len(rows)} rows in {rows[-1]['unit'] + 1} units over {cells} cells")


def _looks(run: Run) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """The looks of each diagnosis in the run's captions, and the tables they come from (none without captions)."""
    from factory.stages.plan import looks_of

    captions, corpus = run.table("captions"), run.table("corpus")
    if not captions.parts():
        return {}, {}
    captions.sealed()  # half of the captions would plan other samples than all of them
    light = corpus.read(["record_id", "diagnosis", "split", "outcome"]).to_pylist()
    of = {
        row["record_id"]: row["diagnosis"]
        for row in light
        if row["outcome"] == records.ACCEPTED and row["split"] == "train"
    }
    rows = captions.read(["record_id", "asymmetry", "border_irregularity", "colors", "outcome"]).to_pylist()
    known = [
        row | {"diagnosis": of[row["record_id"]]}
        for row in rows
        if row["outcome"] == records.ACCEPTED and of.get(row["record_id"])
    ]
    return looks_of(known), {"captions": captions.origin()}


def synthesize(run: Run, recipe: Recipe, echo: Echo = print) -> None:
    """The plan's samples, judged by the gate while they are made."""
    from factory.runtime import cluster, data

    run.table("plan").sealed()
    generator, adapter, gate = weights_of(run, recipe)
    digests = {"generator": generator_digest(generator, adapter), "gate": tree_digest(gate)}
    paths = {"generator": str(generator), "adapter": None if adapter is None else str(adapter)}
    with cluster.connect() as resources:
        pools = cluster.pools(resources, recipe)
        judging = _gate_deployed(run, recipe, pools)
        data.synthesize(run, recipe, pools, digests, paths, judging, echo)


@contextlib.contextmanager
def _gate_deployed(run: Run, recipe: Recipe, pools: Any) -> Iterator[None]:
    """The run's gate is up and answers."""
    from factory.models.joint import JointDenoiser
    from factory.runtime import serve

    generator, adapter, gate = weights_of(run, recipe)
    serve.start_gate(run.uri, str(gate), JointDenoiser.load(generator, adapter).vae_digest, recipe.gate, pools)
    try:
        yield
    finally:
        serve.stop_gate(run.uri)


def sample(uri: str | None, recipe: Recipe, rows: list[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Draws a few samples here, without a cluster, judged by the same gate, as one contact sheet at `out` (PNG)."""
    from factory.models.joint import JointDenoiser
    from factory.release.sheet import contact_sheet
    from factory.stages.score import LocalGate, ScoreSamples
    from factory.stages.synthesize import SynthesizeSamples

    generator, adapter, gate = weights_of(None if uri is None else Run(uri), recipe)
    section = recipe.synthesize.model_copy(
        update={"keep_rejected": "image", "slots": min(len(rows), recipe.synthesize.slots)}
    )
    score = ScoreSamples(gate, JointDenoiser.load(generator, adapter).vae_digest, recipe.gate)
    made = SynthesizeSamples(generator, adapter, section, recipe.gate, LocalGate(score), tree_digest(gate))(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(made, title=rows[0]["prompt"]).save(out)
    return made


# ------------------------------------------------------------------------------------------------------ weights


def weights_of(run: Run | None, recipe: Recipe) -> tuple[Path, Path | None, Path]:
    """Generator, adapter (or None) and gate that a recipe means in a run."""
    generator = STARTER if recipe.synthesize.weights == "starter" else Path(recipe.synthesize.weights)
    wanted, own = recipe.synthesize.adapter, f"lora-{recipe.fit.lora.family}"
    if wanted is None:
        adapter = run.weights_dir(own) if run is not None and own in run.weights() else None
    else:
        adapter = None if wanted == "none" else _named_weights(run, wanted)
    gate = STARTER / "gate" if recipe.gate.weights == "starter" else _named_weights(run, recipe.gate.weights)
    if not generator.is_dir():
        raise ValueError(
            f"synthesize.weights must be `starter` or a diffusers directory, got {generator}; check the path."
        )
    return generator, adapter, gate


def _named_weights(run: Run | None, name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if run is None:
        raise ValueError(f"weights must be a directory when no --run is given, got {name!r}; check the path.")
    return run.weights_dir(name)


def fit(run: Run, recipe: Recipe, name: str, echo: Echo = print) -> None:
    """Fits `lora`, `gate`, `mae` or `distill` on Ray Train and publishes the weights with their card."""
    from factory import taxonomy
    from factory.runtime import cluster, train

    section: FitSection = getattr(recipe.fit, taxonomy.check(name, FITS, "fit"))
    target = weights_name(recipe, name)
    inputs = _inputs(run, recipe, name)
    if target in run.weights() and run.card(target).get("inputs") == inputs:
        echo(f"fit {name:<8}{target} is there already")
        return
    build = partial(_objective, run.uri, recipe, name)
    directory = Path(run.store.root) / "fits" / f"{target}-{records.digest(json.dumps(inputs, sort_keys=True))[:8]}"  # type: ignore[attr-defined]
    with cluster.connect() as resources:
        weights = train.fit(build, section, directory, use_gpu=resources.gpus > 0)
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    (weights / "metrics.jsonl").write_text((directory / "metrics.jsonl").read_text())
    _complete_card(run, recipe, name, weights, inputs)
    run.put_weights(target, weights)
    first, last = metrics[0], metrics[-1]
    curve = f"loss {first['loss']:.4f} -> {last['loss']:.4f}"
    echo(f"fit {name:<8}{last['step']} steps  {curve}  {last['step_s']:.2f} s a step")


def weights_name(recipe: Recipe, name: str) -> str:
    """`<objective>-<family>`."""
    family = {
        "lora": recipe.fit.lora.family, "gate": recipe.plan.generator, "mae": recipe.fit.mae.encoder,
        "distill": recipe.fit.distill.student,
    }[name]  # fmt: skip
    return f"{name}-{family}"


def _inputs(run: Run, recipe: Recipe, name: str) -> dict[str, Any]:
    """What a fit's weights depend on."""
    found: dict[str, Any] = {"section": getattr(recipe.fit, name).model_dump(mode="json")}
    if name in ("lora", "gate"):
        generator = STARTER if recipe.synthesize.weights == "starter" else Path(recipe.synthesize.weights)
        found |= {"base": generator_digest(generator), "size": recipe.plan.size}
    tables = {"lora": ("corpus", "captions"), "gate": (), "mae": ("corpus",), "distill": ("corpus",)}[name]
    for table in tables:
        run.table(table).sealed()
    if name in ("mae", "distill") and run.table("samples").manifest() is not None:
        tables = (*tables, "samples")
    if name == "distill":
        found["encoder"] = run.card(weights_name(recipe, "mae")).get("digest")
    return found | {"tables": {table: run.table(table).digest() for table in tables}}


def _objective(uri: str, recipe: Recipe, name: str) -> Any:
    """The objective of a fit, built on a worker from the run's tables."""
    from factory.fits import distill, gate, joint, mae

    run = Run(uri)
    generator = STARTER if recipe.synthesize.weights == "starter" else Path(recipe.synthesize.weights)
    if name == "gate":
        return gate.FitGate(generator, recipe.fit.gate, recipe.plan.size)
    corpus = run.table("corpus").read()
    if name == "lora":
        images, masks, prompts = _captioned_pairs(corpus, run)
        return joint.FitLora(generator, images, masks, prompts, recipe.fit.lora, recipe.plan.size)
    samples = run.table("samples").read() if run.table("samples").manifest() else None
    if name == "mae":
        return mae.mae_objective(recipe.fit.mae, corpus, samples)
    encoder = run.weights_dir(weights_name(recipe, "mae"))
    return distill.distill_objective(recipe.fit.distill, encoder, corpus, samples, log=lambda line: None)


def _captioned_pairs(corpus: Any, run: Run) -> tuple[list[bytes], list[bytes], list[str]]:
    """Images, masks and captions of the training rows that have all three."""
    captions = {
        row["record_id"]: row["caption"]
        for row in run.table("captions").read(["record_id", "caption", "outcome"]).to_pylist()
        if row["outcome"] == records.ACCEPTED
    }
    rows = [
        row for row in corpus.select(["record_id", "image", "mask", "split", "outcome"]).to_pylist()
        if row["outcome"] == records.ACCEPTED and row["split"] == "train"
        and row["mask"] and row["record_id"] in captions
    ]  # fmt: skip
    if not rows:
        raise ValueError(
            "fit lora must have training images with masks and captions, got none; ingest and caption some."
        )
    return (
        [r["image"]["bytes"] for r in rows],
        [r["mask"]["bytes"] for r in rows],
        [captions[r["record_id"]] for r in rows],
    )


def _complete_card(run: Run, recipe: Recipe, name: str, weights: Path, inputs: dict[str, Any]) -> None:
    """The card: what the objective wrote, and what only the line knows."""
    path = weights / "card.json"
    card = json.loads(path.read_text()) if path.exists() else {}
    files = sorted(weights.rglob("*.safetensors"))
    card.setdefault("bytes", sum(file.stat().st_size for file in files))
    card.setdefault("params", sum(_num_values(file) for file in files))
    card.setdefault("digest", tree_digest(weights))
    licences = (
        sorted({row["licence"] for row in run.table("corpus").read(["licence"]).to_pylist()} - {None})
        if name != "gate"
        else []
    )
    card |= {"objective": name, "inputs": inputs, "licence": " AND ".join(licences) or STARTER_LICENCE}
    if name in ("lora", "gate"):
        base = recipe.synthesize.weights
        card["base"] = {"name": base, "licence": STARTER_LICENCE if base == "starter" else ""}
    path.write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")


def _num_values(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as stored:
        shapes = [stored.get_slice(key).get_shape() for key in stored.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        count = 1
        for side in shape:
            count *= side
        total += count
    return total


# ------------------------------------------------------------------------------------------- worth and release


def evaluate(run: Run, recipe: Recipe, name: str, echo: Echo = print) -> None:
    """One of `gate`, `captions`, `near_copies`, `worth`: the result goes to lab/ and into the report."""
    from factory import taxonomy

    {
        "gate": _evaluate_gate, "captions": _evaluate_captions, "near_copies": _evaluate_near_copies,
        "worth": _evaluate_worth,
    }[taxonomy.check(name, EVALUATIONS, "evaluate")](run, recipe, echo)  # fmt: skip


def is_phantom(run: Run) -> bool:
    """Whether the whole corpus is phantoms, whose truth is known."""
    return set(run.table("corpus").read(["source"])["source"].to_pylist()) == {"phantoms"}


def _evaluate_gate(run: Run, recipe: Recipe, echo: Echo) -> None:
    from factory.lab.truth import gate_accuracy

    result = gate_accuracy(
        local_validator(run, recipe), seed=97, count=recipe.evaluate.gate_pairs, size=recipe.plan.size
    )
    _write(run, "gate_accuracy", result)
    echo(f"gate        precision {_share(result, 'precision')}, recall {_share(result, 'recall')} on planted faults")


def _share(result: dict[str, Any], name: str) -> str:
    value = result[name]["value"] if isinstance(result[name], dict) else result[name]
    return "undefined" if value is None else f"{value:.3f}"


def local_validator(run: Run, recipe: Recipe) -> Callable[..., list[tuple[str, str | None, float | None]]]:
    """The gate on images and masks in this process: images (N, H, W, 3) uint8, masks (N, H, W) bool."""
    import torch

    from factory.models.joint import JointDenoiser
    from factory.stages.score import ScoreSamples

    generator, adapter, gate = weights_of(run, recipe)
    denoiser = JointDenoiser.load(generator, adapter)
    score = ScoreSamples(gate, denoiser.vae_digest, recipe.gate)

    def validate(images: Any, masks: Any) -> list[tuple[str, str | None, float | None]]:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = torch.cat(
            [
                denoiser.image_latents(denoiser.encode(p, torch.from_numpy(m)[:, None].float()))
                for p, m in zip(pixels.split(16), [masks[i : i + 16] for i in range(0, len(masks), 16)], strict=True)
            ]
        )
        return [(j["outcome"], j["reason"], j["scores"].get("iou")) for j in score(latents.numpy(), masks)]

    return validate


def _evaluate_captions(run: Run, recipe: Recipe, echo: Echo) -> None:
    from factory.lab.truth import captioner_accuracy

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

    copies = _evaluate_near_copies(run, recipe, echo)["copies"]
    run_worth(
        run.store,
        run.table("corpus").read(),
        run.table("samples").read(),
        recipe.evaluate.worth,
        copies=copies,
        progress=echo,
    )


def _write(run: Run, name: str, result: dict[str, Any]) -> None:
    run.store.replace(f"lab/{name}.json", (json.dumps(result, indent=2, sort_keys=True, default=str) + "\n").encode())


def release(run: Run, recipe: Recipe, out: Path | None, echo: Echo = print) -> Path:
    """Sealed shards, dataset card and report. Returns where the shards are."""
    from factory.release.publish import publish
    from factory.release.report import write_report

    parents = base_parents(recipe)
    target = out or Path(run.store.root) / "release"  # type: ignore[attr-defined]
    made = publish(run, target, recipe.release, weights=parents, gate=recipe.gate)
    page = write_report(run, parents)
    echo(f"release     {made.shards.rows} pairs, licence {made.verdict.licence}, in {made.out}")
    echo(f"report      {run.uri}/{page}")
    return made.out


def base_parents(recipe: Recipe) -> list[Any]:
    """The base weights, as parents whose licence binds what they made."""
    from factory.release.licences import Parent

    starter = recipe.synthesize.weights == "starter"
    return [Parent("weights", recipe.synthesize.weights, STARTER_LICENCE if starter else "")]


def status(run: Run) -> list[str]:
    """What a run holds: one line per table and per weights."""
    lines = [
        f"{name:<10} sealed, {run.table(name).sealed().rows} rows" + _outcomes(run.table(name).counts())
        for name in run.tables()
    ]
    begun = sorted({path.split("/")[0] for path in run.store.list("") if "/part-" in path} - set(run.tables()))
    lines += [
        f"{name:<10} not sealed, {len(run.table(name).parts())} parts; run its step again to go on" for name in begun
    ]
    lines += [f"weights/{name}" for name in run.weights()]
    return lines or ["nothing yet; begin with `factory ingest`"]


def _outcomes(counts: dict[str, int]) -> str:
    return "".join(f", {name} {counts[name]}" for name in records.OUTCOMES if counts.get(name))


def demo(uri: str, recipe: Recipe, until: str | None = None, echo: Echo = print) -> None:
    """The whole line on the embedded default, step after step, on one cluster."""
    from factory.runtime import cluster

    steps: Sequence[tuple[str, Callable[[Run], Any]]] = (
        ("ingest", lambda run: ingest(run, recipe, echo)),
        ("caption", lambda run: caption(run, recipe, echo)),
        ("fit", lambda run: fit(run, recipe, "lora", echo)),
        ("plan", lambda run: plan(run, recipe, echo)),
        ("synthesize", lambda run: synthesize(run, recipe, echo)),
        ("encoders", lambda run: [fit(run, recipe, name, echo) for name in ("mae", "distill")]),
        ("evaluate", lambda run: [evaluate(run, recipe, name, echo) for name in ("gate", "captions", "worth")]),
        ("release", lambda run: release(run, recipe, None, echo)),
    )
    with driving(uri, recipe, "demo") as run, cluster.connect():
        for name, step in steps:
            step(run)
            if name == until:
                break
