"""Synthesis on Ray Data: the sealed plan to samples, each judged by the gate that Ray Serve hosts.

An actor is given several units at once, each in a thread of its own: they are drawn through the same slots, and one's
images are encoded while another is drawn. A unit that raises, hangs or takes its process along is drawn apart from then
on, tried `synthesize.max_attempts` times and then committed with all its rows failed, so that one bad unit does not
cost a run; `retry.py` plans such rows again.
"""

from __future__ import annotations

import os
import time
import traceback
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from factory import records
from factory.models.placement import fingerprint, placement
from factory.models.quantise import check_quantised
from factory.progress import FailedRows, ProgressLine, Stopped
from factory.recipe import Recipe
from factory.run import Run
from factory.runtime.attempts import ERROR, EXIT_STATUS, TIMED_OUT, Attempt, Attempts, watchdog
from factory.runtime.backgrounds import with_pixels
from factory.runtime.cluster import Pools
from factory.runtime.plan_cost import MADE
from factory.runtime.retry import failed_rows
from factory.runtime.shared_slots import Fallen, SharedSlots
from factory.runtime.text_pass import embed
from factory.runtime.units import Echo, UnitStage, fill, fingerprint_in, pool

if TYPE_CHECKING:
    from factory.models.kept_prompts import KeptPrompts
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
    made_of |= fingerprint(placement(section.dtype, gpu), section.base_dtype, section.compile)
    table.require(made_of)
    prompts = embed(run, recipe, paths, pools, table.missing(units), echo)
    drive = uuid.uuid4().hex[:12]
    arguments = (run.uri, recipe, paths["generator"], paths["adapter"], weights["gate"], gpu, drive, prompts)
    stage = partial(pool, unit or SynthesizeUnit, arguments, pools.synthesize, num_gpus=pools.gpus_per_actor,
                    at_once=units_at_once(section.slots, plan.sealed().rows // units))  # fmt: skip
    with gate if table.missing(units) else nullcontext():
        made = fill(table, units, made_of, plan.sealed().rows, "synthesize", echo, stage)
    Attempts(run.store, "samples", drive).clear()
    _tell(run, made, pools)
    table.seal(units, made_of, {"plan": plan.digest()})
    _tell_failed(run, made, echo)


def units_at_once(slots: int, unit_rows: int) -> int:
    """How many units an actor is given: as many as fill its slots, one that is ending, and one that waits."""
    return 2 + -(-slots // unit_rows)


def _tell(run: Run, made: ProgressLine, pools: Pools) -> None:
    """Writes how long what was made took, for the estimate of what is planned next."""
    rows = sum(made.counts.values())
    if rows:
        with run.events() as events:
            seconds = time.monotonic() - made.started
            events.write(MADE, step="synthesize", rows=rows, seconds=round(seconds, 3), actors=pools.synthesize)


def _tell_failed(run: Run, made: ProgressLine, echo: Echo) -> None:
    """What has failed and is not planned again, by reason. An error that was met just now ends the command."""
    reasons = failed_rows(run)
    if not reasons:
        return
    told = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    remedy = f"`factory synthesize --retry failed --run {run.uri}` makes them again"
    echo(f"failed      {sum(reasons.values())} rows: {told}; {remedy}")
    errors = [failure for failure in made.failures if failure.startswith(ERROR)]
    if errors:
        raise FailedRows(
            f"{reasons[ERROR]} rows failed by an error, the first: {errors[0]}; events/ has them all, mend it and "
            f"{remedy}"
        )


class SynthesizeUnit(UnitStage):
    """A unit of the plan to its samples: generator, sampler and a handle to the gate, loaded once per actor.

    gpu: whether the actor has reserved one. Without one it may see those of others, and uses none. drive: the name
    under which attempts are counted. prompts: where the text pass has embedded them, if it has.
    """

    def __init__(
        self, run_uri: str, recipe: Recipe, weights: str, adapter: str | None, gate_digest: str, gpu: bool = False,
        drive: str = "drive", prompts: KeptPrompts | None = None,
    ) -> None:  # fmt: skip
        from factory.runtime.cluster import is_alive, this_machine
        from factory.runtime.serve import GateHandle
        from factory.runtime.weights import generator_here

        self.run, self.section = Run(run_uri), recipe.synthesize
        self.attempts = Attempts(self.run.store, "samples", drive, this_machine(), is_alive)
        self._of_unit, self._begun = self.run.table("plan").finder("unit"), dict[int, Attempt]()
        into_images = recipe.plan.generator == "inpaint"
        self.backgrounds = Run(run_uri).table("backgrounds") if into_images else None
        gate, (generator, fitted) = GateHandle(run_uri), generator_here(self.run, recipe, weights, adapter)
        self.synthesize = self.stage()(
            generator, fitted, recipe.synthesize, recipe.gate, gate, gate_digest, recipe.plan.generator, gpu, prompts
        )  # fmt: skip
        if self.section.compile:
            self.synthesize.prepare((recipe.plan.size, recipe.plan.size))
        self.slots = SharedSlots(self.synthesize.stream, self._begin_among_others, self._fell, self._watched)

    def stage(self) -> type[SynthesizeSamples]:
        """The stage it runs; another family's unit overrides this."""
        from factory.stages.synthesize import SynthesizeSamples

        return SynthesizeSamples

    def made(self, unit: int) -> tuple[pa.Table, str]:
        """A unit's rows: drawn among those of other threads, and apart from them where that did not come to its end
        or its process died. Failed, every one, where that does not either."""
        planned = self.planned(unit)
        if not self._is_drawn_apart(unit):
            with suppress(Fallen):
                drawn = self.slots.draw(unit, planned)
                self.attempts.forget(self._begun.pop(unit))
                return records.rows_to_table("samples", self.synthesize.finished(drawn)), ""
        with self.slots.alone():
            return self._apart(unit, planned)

    def planned(self, unit: int) -> list[dict[str, Any]]:
        """A unit's rows as they are drawn."""
        planned = self._of_unit(unit).to_pylist()
        return planned if self.backgrounds is None else with_pixels(planned, self.backgrounds)

    def begin(self, unit: int) -> Attempt:
        """A unit's turn has come."""
        return self.attempts.begin(unit)

    def _is_drawn_apart(self, unit: int) -> bool:
        """An actor's death counts against all units that it had under way, of which each but one is innocent."""
        return self.section.max_attempts == 1 or self.attempts.has_begun(unit)

    def _begin_among_others(self, unit: int) -> None:
        self._begun[unit] = self.begin(unit)

    def _fell(self, units: Sequence[int], error: Exception) -> None:
        """An error ended units that were drawn together. It counts if there was but one, and else when it is met again
        by one of them alone; what did not fit into memory is drawn with fewer slots first."""
        from factory.models.device_errors import breaks_the_device, is_out_of_memory

        trace = "".join(traceback.format_exception(error))
        begun = [self._begun.pop(unit) for unit in units if unit in self._begun]
        broken = breaks_the_device(error)
        if broken or (len(units) == 1 and not is_out_of_memory(error)):
            for attempt in begun:
                self._end(attempt, ERROR, f"{type(error).__name__}: {error}", trace)
            if broken:
                os._exit(EXIT_STATUS)  # all that this process has on its GPU is lost; its successor has it anew
            return
        for attempt in begun:
            self.attempts.forget(attempt)
        with self.run.events() as events:
            events.write("drawn_apart", units=list(units), text=trace)

    def _watched(self) -> AbstractContextManager[None]:
        def late(text: str) -> None:
            for unit in self.slots.under_way:
                self._end(self._begun[unit], TIMED_OUT, text)

        return watchdog(self.section.unit_timeout_s, late)

    def _apart(self, unit: int, planned: list[dict[str, Any]]) -> tuple[pa.Table, str]:
        """A unit's rows, drawn by the first attempt that comes to its end, or all of them failed."""
        from factory.models.device_errors import breaks_the_device

        attempt = self.begin(unit)
        while attempt.spent < self.section.max_attempts:
            if 0 < attempt.spent == self.section.max_attempts - 1 and attempt.reason != ERROR:
                self.synthesize.halve()  # who was killed may have been too large for the machine
            try:
                with watchdog(self.section.unit_timeout_s, partial(self._end, attempt, TIMED_OUT)):
                    rows = records.rows_to_table("samples", self.synthesize(planned))
            except Stopped:
                raise
            except Exception as error:
                self._end(attempt, ERROR, f"{type(error).__name__}: {error}", traceback.format_exc())
                if breaks_the_device(error):
                    os._exit(EXIT_STATUS)
                attempt = self.begin(unit)
            else:
                self.attempts.forget(attempt)
                whole = set(rows["outcome"].to_pylist()) == {records.FAILED}
                return rows, str(rows["reason"][0].as_py()) if whole else ""
        rows = records.rows_to_table("samples", self.synthesize.failed(planned, attempt.reason))
        self.attempts.end(attempt, attempt.reason, attempt.text)  # said again, should this process die before they go
        return rows, f"{attempt.reason}: {attempt.text}" if attempt.text else attempt.reason

    def _end(self, attempt: Attempt, reason: str, text: str, trace: str = "") -> None:
        """Keeps what ended an attempt: for the next one, and for whoever reads the run's events."""
        self.attempts.end(attempt, reason, text[:500])
        with self.run.events() as events:
            events.write("attempt_ended", unit=attempt.unit, spent=attempt.spent + 1, reason=reason, text=trace or text)
