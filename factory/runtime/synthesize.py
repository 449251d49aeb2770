"""Synthesis on Ray Data: the sealed plan to samples, each judged by the gate that Ray Serve hosts.

An actor draws the units of a group together, the slots that one leaves going to the next. A unit that raises, hangs
or takes its process along is drawn apart from then on, tried `synthesize.max_attempts` times and then committed with
all its rows failed, so that one bad unit does not cost a run; `retry.py` plans such rows again.
"""

from __future__ import annotations

import os
import time
import traceback
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
from factory.runtime.estimate import MADE
from factory.runtime.retry import failed_rows
from factory.runtime.units import Echo, UnitStage, fill, fingerprint_in, pool

if TYPE_CHECKING:
    from factory.stages.synthesize import SynthesizeSamples

MOST_TOGETHER = 16  # units in a group: what stands empty at its end is little, and little waits for one actor


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
    arguments = (run.uri, recipe, paths["generator"], paths["adapter"], weights["gate"], gpu, uuid.uuid4().hex[:12])
    stage = partial(pool, unit or SynthesizeUnit, arguments, pools.synthesize, num_gpus=pools.gpus_per_actor,
                    most_together=MOST_TOGETHER)  # fmt: skip
    table.require(made_of)
    with gate if table.missing(units) else nullcontext():
        made = fill(table, units, made_of, plan.sealed().rows, "synthesize", echo, stage)
    _tell(run, made, pools)
    table.seal(units, made_of, {"plan": plan.digest()})
    _tell_failed(run, made, echo)


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
    under which attempts are counted.
    """

    def __init__(
        self, run_uri: str, recipe: Recipe, weights: str, adapter: str | None, gate_digest: str, gpu: bool = False,
        drive: str = "drive",
    ) -> None:  # fmt: skip
        from factory.runtime.cluster import is_alive, this_machine
        from factory.runtime.serve import GateHandle

        self.run, self.section = Run(run_uri), recipe.synthesize
        self.attempts = Attempts(self.run.store, "samples", drive, this_machine(), is_alive)
        self.samples, self._of_unit = self.run.table("samples"), self.run.table("plan").finder("unit")
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
        return self.drawn(unit, self.synthesize(self.to_draw(unit)))

    def to_draw(self, unit: int) -> list[dict[str, Any]]:
        """A unit's rows as they are drawn."""
        planned = self.planned(unit)
        return planned if self.backgrounds is None else with_pixels(planned, self.backgrounds)

    def planned(self, unit: int) -> list[dict[str, Any]]:
        """A unit's rows of the plan."""
        return self._of_unit(unit).to_pylist()

    def drawn(self, unit: int, rows: list[dict[str, Any]]) -> pa.Table:
        """A unit's rows as they are kept."""
        return records.rows_to_table("samples", rows)

    def together(self, units: Sequence[int]) -> Iterator[tuple[int, pa.Table, str]]:
        """A group in its order, also when it is begun again after its actor died: what is committed by then is read
        back, so that Ray, which passes over what it was given before, passes over the right ones."""
        made: dict[int, tuple[pa.Table, str]] = {}
        in_turn = iter(units)
        turn = next(in_turn, None)
        for unit, rows, failure in self._as_they_end(units):
            made[unit] = rows, failure
            while turn in made:
                yield turn, *made.pop(turn)
                turn = next(in_turn, None)

    def _as_they_end(self, units: Sequence[int]) -> Iterator[tuple[int, pa.Table, str]]:
        left: list[int] = []
        for unit in units:
            if (there := self.samples.committed(unit)) is not None:
                yield unit, there, ""
            else:
                left.append(unit)
        apart = [unit for unit in left if self._is_drawn_apart(unit)]
        while left:
            for unit in apart:
                left.remove(unit)
                yield unit, *self.made(unit)
            apart = yield from self._streamed(left)

    def _is_drawn_apart(self, unit: int) -> bool:
        """An actor's death counts against all units that it had under way, of which each but one is innocent."""
        return self.section.max_attempts == 1 or self.attempts.has_begun(unit)

    def _streamed(self, left: list[int]) -> Generator[tuple[int, pa.Table, str], None, list[int]]:
        """Units without a pause between them, each taken from `left` when it is made. Returns those that were under
        way when an error ended it: whose it was is not known, and it counts when it is met again."""
        from factory.stages.synthesize import breaks_the_device

        begun: dict[int, Attempt] = {}

        def under_way() -> Iterator[list[dict[str, Any]]]:
            for unit in tuple(left):
                begun[unit] = self.attempts.begin(unit)
                yield self.to_draw(unit)

        def end(reason: str, text: str, trace: str = "") -> None:
            for attempt in begun.values():
                self._end(attempt, reason, text, trace)

        drawn = self.synthesize.stream(under_way())
        while left:
            try:
                with watchdog(self.section.unit_timeout_s, partial(end, TIMED_OUT)):
                    rows = next(drawn)
            except Stopped:
                raise
            except Exception as error:
                if not begun:
                    raise
                if breaks_the_device(error):
                    end(ERROR, f"{type(error).__name__}: {error}", traceback.format_exc())
                    os._exit(EXIT_STATUS)
                with self.run.events() as events:
                    events.write("drawn_apart", units=list(begun), text=traceback.format_exc())
                break
            unit = rows[0]["unit"]
            self.attempts.forget(begun.pop(unit))
            left.remove(unit)
            yield unit, self.drawn(unit, rows), ""
        drawn.close()
        for attempt in begun.values():
            self.attempts.forget(attempt)
        return list(begun)

    def made(self, unit: int) -> tuple[pa.Table, str]:
        """A unit's rows, drawn by the first attempt that comes to its end, or all of them failed."""
        from factory.stages.synthesize import breaks_the_device

        attempt = self.attempts.begin(unit)
        while attempt.spent < self.section.max_attempts:
            if 0 < attempt.spent == self.section.max_attempts - 1 and attempt.reason != ERROR:
                self.synthesize.halve()  # who was killed may have been too large for the machine
            try:
                with watchdog(self.section.unit_timeout_s, partial(self._end, attempt, TIMED_OUT)):
                    rows = self.rows(unit)
            except Stopped:
                raise
            except Exception as error:
                self._end(attempt, ERROR, f"{type(error).__name__}: {error}", traceback.format_exc())
                if breaks_the_device(error):
                    os._exit(EXIT_STATUS)  # all that this process has on its GPU is lost; its successor has it anew
                attempt = self.attempts.begin(unit)
            else:
                self.attempts.forget(attempt)
                whole = set(rows["outcome"].to_pylist()) == {records.FAILED}
                return rows, str(rows["reason"][0].as_py()) if whole else ""
        rows = records.rows_to_table("samples", self.synthesize.failed(self.planned(unit), attempt.reason))
        self.attempts.forget(attempt)
        return rows, f"{attempt.reason}: {attempt.text}" if attempt.text else attempt.reason

    def _end(self, attempt: Attempt, reason: str, text: str, trace: str = "") -> None:
        """Keeps what ended an attempt: for the next one, and for whoever reads the run's events."""
        self.attempts.end(attempt, reason, text[:500])
        with self.run.events() as events:
            events.write("attempt_ended", unit=attempt.unit, spent=attempt.spent + 1, reason=reason, text=trace or text)
