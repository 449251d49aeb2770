"""One sample of a run drawn again, and compared with what the run kept of it. No Ray here, and no gate: what a gate
says stops a sample and changes nothing of what is drawn, so a replay stops at the recorded call instead.

The sample's own row says how it was drawn: batch shape, threads, calls; the table's fingerprint says solver and
precision. At these, on the processor that drew it, every byte is the same. Anywhere else sums are rounded in another
order, and what that changes was measured (benchmarks/redraw_tolerance.py): TOLERANCE_LEVELS and TOLERANCE_LATENTS
are several times the most that was seen.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from factory import records
from factory.images import read_mask, read_png
from factory.recipe import Recipe, SynthesizeSection
from factory.run import Run
from factory.runtime.backgrounds import with_pixels
from factory.runtime.weights import fitted_generator

Row = dict[str, Any]
TOLERANCE_LEVELS = 4  # of 255, of any value of an image
TOLERANCE_LATENTS = 0.05  # of unit scale, of any value of latents; they are kept in half precision
TOLERANCE_MASK = 0.01  # share of a mask's pixels
_WHY = "another batch shape, thread count or processor"


class Redrawn(NamedTuple):
    """What was found, in one line; holds: False where the difference is more than other hardware makes."""

    text: str
    holds: bool = True


class Kept(NamedTuple):
    """How two drawings of a sample compare. what: was compared; equal: to the last bit; amount: how much they differ,
    in words; holds: within the tolerance, which `limit` says."""

    what: str
    equal: bool
    amount: str
    holds: bool
    limit: str


def reproduce(run: Run, recipe: Recipe, sample_id: str, out: Path | None = None) -> Redrawn:
    """Draws a sample again as far as it was drawn. out: a PNG of it. A ValueError for an id that the run has not, for
    samples that are not sealed or failed, and for other weights."""
    planned, made = found(run, sample_id)
    drawn, latents = _replayed(run, recipe, planned, made)
    where = _written(drawn, out)
    how = f"{drawn['calls_run']} calls at batch shape {made['batch_shape']} and {made['num_threads']} thread(s)"
    name = f"reproduce   {sample_id}"
    if drawn["calls_run"] != made["calls_run"]:
        return Redrawn(f"{name} broke after {how}, recorded are {made['calls_run']}: it differs{where}", False)
    kept = _compared(made, drawn, latents)
    if kept is None:
        see = where or "; --out writes it"
        return Redrawn(f"{name} was drawn again, {how}; nothing is kept to compare with{see}")
    if kept.equal:
        return Redrawn(f"{name} is equal bit for bit in {kept.what}: {how}{where}")
    verdict = "within" if kept.holds else "beyond"
    return Redrawn(
        f"{name} differs in {kept.what} by {kept.amount}, {verdict} the tolerance of {kept.limit} for {_WHY}: "
        f"{how}{where}",
        kept.holds,
    )


def found(run: Run, sample_id: str) -> tuple[Row, Row]:
    """A sample's row of the plan and what was made of it; its unit is the number of its part."""
    plan, samples = run.table("plan"), run.table("samples")
    num_parts = len(samples.sealed().parts)
    own = pc.field("sample_id") == sample_id
    units = [unit for part in plan.batches(["unit"], own) for unit in part["unit"].to_pylist()]
    if not units:
        raise ValueError(f"SAMPLE_ID must be planned in {run.uri}, got {sample_id!r}; copy it from the samples table.")
    if units[0] >= num_parts:
        raise ValueError(
            f"SAMPLE_ID must be of a sample that was made, got {sample_id}, which is planned in a further round; run "
            f"`factory synthesize --run {run.uri}` first."
        )
    (planned,) = plan.read([*records.PLAN.names], own & (pc.field("unit") == units[0])).to_pylist()
    (made,) = (row for row in samples.read_part(units[0]).to_pylist() if row["sample_id"] == sample_id)
    if made["outcome"] == records.FAILED:
        raise ValueError(
            f"SAMPLE_ID must be of a sample that was drawn, got {sample_id}, which failed ({made['reason']}); run "
            f"`factory synthesize --retry failed --run {run.uri}` to plan it again."
        )
    return planned, made


def _replayed(run: Run, recipe: Recipe, planned: Row, made: Row) -> tuple[Row, np.ndarray]:
    from factory.stages.synthesize import SynthesizeSamples

    section, gpu = _settings(run, recipe, made)
    generator, adapter = fitted_generator(run, recipe)
    stage = SynthesizeSamples(generator, adapter, section, recipe.gate, None, family=made["generator"], gpu=gpu)
    if stage.denoiser.digest != made["weights_digest"]:
        raise ValueError(
            f"synthesize.weights and synthesize.adapter must be those that drew {made['sample_id']}, of digest "
            f"{made['weights_digest']}, got {stage.denoiser.digest} in {generator}"
            f"{'' if adapter is None else f' with {adapter}'}; name them with --set synthesize.weights=DIR."
        )
    if made["generator"] == "inpaint":
        (planned,) = with_pixels([planned], run.table("backgrounds"))
    row, latents = stage.replayed(planned, made["calls_run"])
    return row, latents.half().numpy()


def _settings(run: Run, recipe: Recipe, made: Row) -> tuple[SynthesizeSection, bool | None]:
    """How the sample was drawn, and whether on a GPU: None, if there is one. The run's recipe may have changed since
    then; the fingerprint of its samples cannot."""
    known = run.table("samples").sealed().fingerprint
    dtype, _, device = known.get("synthesize.dtype", "float32 on cpu").partition(" on ")
    solver = json.loads(known["synthesize.solver"]) if "synthesize.solver" in known else recipe.synthesize.solver
    section = recipe.synthesize.model_copy(
        update={
            "slots": made["batch_shape"], "num_threads": made["num_threads"], "solver": solver, "dtype": dtype,
            "base_dtype": known.get("synthesize.base_dtype"), "keep_rejected": "image",
            "compile": known.get("synthesize.compile") == "true",
        }
    )  # fmt: skip
    return section, None if device == "cuda" else False


def _compared(made: Row, drawn: Row, latents: np.ndarray) -> Kept | None:
    """What is kept of a sample beside what was drawn, or None if nothing is."""
    if made["image"] is not None:
        return _images_compared(made, drawn)
    if made["latents"] is None:
        return None
    kept = np.frombuffer(made["latents"], np.float16)
    again = latents.reshape(-1)
    if kept.size != again.size:
        return Kept("latents", False, f"{abs(kept.size - again.size)} values of them", False, "none")
    apart = np.abs(kept.astype(np.float64) - again.astype(np.float64))
    most = float(apart.max())  # NaN where one broke and the other did not
    equal = kept.tobytes() == again.tobytes()
    return Kept("latents", equal, f"{most:.2g} at most", most <= TOLERANCE_LATENTS, f"{TOLERANCE_LATENTS:g}")


def _images_compared(made: Row, drawn: Row) -> Kept:
    one, other = (read_png(row["image"]["bytes"]).astype(int) for row in (made, drawn))
    apart = np.abs(one - other)
    amount, holds = f"{apart.max()} of 255 levels at most", bool(apart.max() <= TOLERANCE_LEVELS)
    what, limit = "its image", f"{TOLERANCE_LEVELS} levels"
    equal = made["image"]["bytes"] == drawn["image"]["bytes"]
    if made["mask"] is not None:
        share = float((read_mask(made["mask"]["bytes"]) != read_mask(drawn["mask"]["bytes"])).mean())
        amount += f" and {share:.2%} of the mask's pixels"
        what, limit = "image and mask", f"{limit} and {TOLERANCE_MASK:.0%}"
        equal = equal and made["mask"]["bytes"] == drawn["mask"]["bytes"]
        holds = holds and share <= TOLERANCE_MASK
    return Kept(what, equal, amount, holds, limit)


def _written(drawn: Row, out: Path | None) -> str:
    """Writes the drawn image, if it is asked for; what is to be said of it."""
    if out is None:
        return ""
    if drawn.get("image") is None:
        return "; nothing to write, for its latents are not finite"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(drawn["image"]["bytes"])
    return f"; drawn again in {out}"
