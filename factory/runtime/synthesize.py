"""Synthesis on Ray Data: the sealed plan to samples, each judged by the gate that Ray Serve hosts."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from factory import records
from factory.models.placement import fingerprint, placement
from factory.models.quantise import check_quantised
from factory.progress import ProgressLine
from factory.recipe import Recipe
from factory.run import Run
from factory.runtime.backgrounds import with_pixels
from factory.runtime.cluster import Pools
from factory.runtime.estimate import MADE
from factory.runtime.units import Echo, UnitStage, fill, fingerprint_in, pool

if TYPE_CHECKING:
    from factory.stages.synthesize import SynthesizeSamples


def synthesize(
    run: Run,
    recipe: Recipe,
    pools: Pools,
    weights: dict[str, str],
    paths: dict[str, str | None],
    gate: AbstractContextManager[None],
    echo: Echo = print,
    unit: type[SynthesizeUnit] | None = None,
) -> None:
    """The sealed plan to the sealed `samples`, with the gate asked by handle.

    weights: digests by role (`generator`, `gate`), which name the table; paths: `generator`, `adapter`; gate: within
    it the gate is deployed, entered only if there is something to judge; unit: the stage, if not `SynthesizeUnit`.
    """
    plan = run.table("plan")
    units = int(pc.max(plan.read(["unit"])["unit"]).as_py()) + 1
    gpu, section = pools.gpus_per_actor > 0, recipe.synthesize
    check_quantised(section.base_dtype, recipe.plan.generator, "synthesize.base_dtype", gpu)
    table, made_of = run.table("samples"), fingerprint_in(run, recipe, "samples", ["plan"], weights)
    made_of |= fingerprint(placement(section.dtype, gpu), section.base_dtype)
    arguments = (run.uri, recipe, paths["generator"], paths["adapter"], weights["gate"], gpu)
    stage = partial(pool, unit or SynthesizeUnit, arguments, pools.synthesize, num_gpus=pools.gpus_per_actor)
    table.require(made_of)
    with gate if table.missing(units) else nullcontext():
        made = fill(table, units, made_of, plan.sealed().rows, "synthesize", echo, stage)
    _tell(run, made, pools)
    table.seal(units, made_of, {"plan": plan.digest()})


def _tell(run: Run, made: ProgressLine, pools: Pools) -> None:
    """Writes how long what was made took, for the estimate of what is planned next."""
    rows = sum(made.counts.values())
    if rows:
        with run.events() as events:
            seconds = time.monotonic() - made.started
            events.write(MADE, step="synthesize", rows=rows, seconds=round(seconds, 3), actors=pools.synthesize)


class SynthesizeUnit(UnitStage):
    """A unit of the plan to its samples: generator, sampler and a handle to the gate, loaded once per actor.

    gpu: whether the actor has reserved one. Without one it may see those of others, and uses none.
    """

    def __init__(
        self, run_uri: str, recipe: Recipe, weights: str, adapter: str | None, gate_digest: str, gpu: bool = False
    ) -> None:
        from factory.runtime.serve import GateHandle

        self.planned = Run(run_uri).table("plan").finder("unit")
        into_images = recipe.plan.generator == "inpaint"
        self.backgrounds = Run(run_uri).table("backgrounds") if into_images else None
        gate = GateHandle(run_uri)
        self.synthesize = self.stage()(
            weights, adapter, recipe.synthesize, recipe.gate, gate, gate_digest, recipe.plan.generator, gpu
        )  # fmt: skip

    def stage(self) -> type[SynthesizeSamples]:
        """The stage it runs; another family's unit overrides this."""
        from factory.stages.synthesize import SynthesizeSamples

        return SynthesizeSamples

    def rows(self, unit: int) -> pa.Table:
        planned = self.planned(unit).to_pylist()
        if self.backgrounds is not None:
            planned = with_pixels(planned, self.backgrounds)
        return records.rows_to_table("samples", self.synthesize(planned))
