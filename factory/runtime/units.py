"""What every pipeline of Ray Data here is made of: units, a pool of actors that makes them, and their commit.

One row is one unit; a unit is committed by one part that is put in place only if it is not there. Resume is the list
of parts that are missing. Ray Data's own checkpointing is left off: it loses or repeats rows in ways that it does not
report, and it makes every rejected sample again.

A pipeline is a stage (`stages/`, no Ray) inside an actor that reads its unit's rows and hands on the result; the
commit is a task of its own, so that an actor goes on while its last unit is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from factory import records
from factory.fingerprint import fingerprint_of
from factory.progress import ProgressLine, Stopped
from factory.recipe import Recipe
from factory.run import Run
from factory.runtime.cluster import ACTOR_CPUS
from factory.runtime.losses import lost_actors_given_up
from factory.storage import StorageError
from factory.tables import Table

Echo = Callable[[str], None]
IN_FLIGHT = 2  # units that an actor has at hand: the next one is there when the last one ends
MAX_FAILED_IN_A_ROW = 5  # units; so many are no bad units but a mistake, and the rest would fail like them
LIGHT_UNITS = 4  # per actor at least, where a unit takes less than the seconds of imports of one more process


def fill(
    table: Table,
    num_units: int,
    fingerprint: dict[str, str],
    total: int,
    word: str,
    echo: Echo,
    pool: Callable[[Sequence[int]], Iterator[dict[str, Any]]],
) -> ProgressLine:
    """Makes the units that a table lacks, with a progress line. Refused if its other units were made otherwise.
    Returns the line, which has counted what was made. Raises `Stopped` for a stage that asks to stop, once what was in
    flight is committed; where unit after unit fails as a whole; and at once for a store that takes no more: nothing
    that follows could be kept."""
    table.require(fingerprint)
    missing = table.missing(num_units)
    line = ProgressLine(word, total, done=_rows_done(table, num_units, missing, total), echo=echo)
    stopped = None
    for committed in pool(missing, CommitTable(table)):  # type: ignore[call-arg]
        line.add(committed)
        stopped = stopped or committed.get("stopped")
        if line.failed_in_a_row >= MAX_FAILED_IN_A_ROW and table.missing(num_units):
            stopped = f"{word} ended after {MAX_FAILED_IN_A_ROW} failed units in a row, the last by {line.failures[-1]}"
            break
        if committed.get("refused"):
            break
    line.end()
    if stopped:
        raise Stopped(stopped)
    return line


def _rows_done(table: Table, num_units: int, missing: Sequence[int], total: int) -> int:
    """Rows in the parts that are there already; exact when there are none or all of them."""
    return round(total * (num_units - len(missing)) / num_units) if num_units else 0


def fingerprint_in(
    run: Run, recipe: Recipe, name: str, parents: Sequence[str], weights: dict[str, str] | None = None
) -> dict[str, str]:
    return fingerprint_of(recipe, name, {parent: run.table(parent).origin() for parent in parents}, weights or {})


_COLUMNS = ["unit", "rows", "stopped", "failure"]
_TYPES = [pa.int64(), pa.large_binary(), pa.string(), pa.string()]


class UnitStage:
    """A stage on one unit at a time: reads its rows, works, returns `unit` and `rows` (an Arrow stream).

    A unit whose stage says `Stopped` has no rows and is not committed; `stopped` is what the run ends with. `failure`
    is what a unit failed by that is committed with all its rows failed, else empty.
    """

    name: str

    def rows(self, unit: int) -> pa.Table:
        raise NotImplementedError

    def __call__(self, batch: pa.Table) -> pa.Table:
        made = [(unit, *self._made(unit)) for unit in batch["unit"].to_pylist()]
        return pa.Table.from_arrays(
            [pa.array(column, dtype) for column, dtype in zip(zip(*made, strict=True), _TYPES, strict=True)], _COLUMNS
        )

    def made(self, unit: int) -> tuple[pa.Table, str]:
        """A unit's rows and its failure. An exception ends the run; a stage that can do better overrides this."""
        return self.rows(unit), ""

    def _made(self, unit: int) -> tuple[bytes | None, str | None, str]:
        try:
            rows, failure = self.made(unit)
            return stream_of(rows), None, failure
        except Stopped as stop:
            return None, str(stop), ""


class CommitTable:
    """The last stage of every pipeline: a unit's rows become a part. Returns what it holds, not the rows.

    won: whether this call put the part in place. One that was there holds the same rows, so the unit counts once,
    whoever won. A store that cannot be written (full, read-only) is told in `stopped`, with `refused`.
    """

    def __init__(self, table: Table) -> None:
        self.table = table

    def __call__(self, batch: pa.Table) -> pa.Table:
        columns = (batch[name] for name in _COLUMNS if name in batch.column_names)  # not every stage has failures
        return pa.Table.from_pylist([self._commit(*one) for one in zip(*columns, strict=True)])

    def _commit(
        self, unit: pa.Scalar, data: pa.Scalar, stopped: pa.Scalar, failure: pa.Scalar | None = None
    ) -> dict[str, Any]:
        number = unit.as_py()
        if not data.is_valid:
            return _told(number, stopped=stopped.as_py())
        rows = pa.ipc.open_stream(data.as_buffer()).read_all()
        try:
            won = self.table.commit(number, rows)
        except StorageError as error:
            return _told(number, stopped=str(error), refused=True)
        return _told(number, won=won, counts=_count(rows), failure=failure.as_py() if failure is not None else "")


def _told(
    unit: int, *, won: bool = False, counts: dict[str, int] | None = None, stopped: str = "", refused: bool = False,
    failure: str = "",
) -> dict[str, Any]:  # fmt: skip
    made = {outcome: (counts or {}).get(outcome, 0) for outcome in records.OUTCOMES}
    return {"unit": unit, "won": won, **made, "stopped": stopped, "refused": refused, "failure": failure}


def pool(
    stage: type[UnitStage],
    arguments: tuple[Any, ...],
    num_actors: int,
    units: Sequence[int],
    commit: CommitTable,
    *,
    num_gpus: float = 0.0,
    units_per_actor: int = 1,
    at_once: int = 1,
) -> Iterator[dict[str, Any]]:
    """Runs a stage on an actor pool over units, commits each, and yields what was committed.

    All actors are asked for at once: work begins with those that find room, an autoscaler sees what the others want,
    and they join as it comes. Units of a machine that is gone for good are made by the actors that are left; an actor
    that dies elsewhere is started again by Ray, with its unit, for ever (see `runtime/attempts.py`). An exception in a
    stage ends the run: a bad row is the stage's own business, and gets a reason there. at_once: units that an actor
    is called with at the same time, each in a thread of its own.
    """
    left = dict.fromkeys(units)
    while left:
        with lost_actors_given_up(lambda: len(left), max(IN_FLIGHT, at_once)) as watch:
            try:
                size = min(num_actors, -(-len(left) // units_per_actor))
                for committed in _made(stage, arguments, size, list(left), commit, num_gpus, at_once):
                    del left[committed["unit"]]
                    yield committed
            except Exception as error:
                if not (watch.given_up and _of_an_actor(error)):
                    raise


def _of_an_actor(error: BaseException) -> bool:
    """Whether an actor's death is what ended a pipeline."""
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError) or isinstance(error.__cause__, RayActorError)


def _made(
    stage: type[UnitStage],
    arguments: tuple[Any, ...],
    num_actors: int,
    units: Sequence[int],
    commit: CommitTable,
    num_gpus: float,
    at_once: int,
) -> Iterator[dict[str, Any]]:
    """`pool` on as many actors as are said, once."""
    import ray
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    dataset = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
    made = dataset.map_batches(
        stage,  # type: ignore[arg-type]
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=num_actors,
            max_tasks_in_flight_per_actor=max(IN_FLIGHT, at_once),
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=at_once > 1,
        ),
        fn_constructor_args=arguments,
        num_cpus=ACTOR_CPUS,
        num_gpus=num_gpus or None,
        udf_modifying_row_count=False,
    )
    # As many commits at once as there are actors: theirs are processes too.
    committed = made.map_batches(
        commit.__call__,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=ACTOR_CPUS,
        compute=TaskPoolStrategy(num_actors),
    )
    for batch in committed.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        yield from batch.to_pylist()


def stream_of(rows: pa.Table) -> bytes:
    """Rows as an Arrow stream: how a unit travels between stages."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


def _count(rows: pa.Table) -> dict[str, int]:
    if "outcome" not in rows.schema.names:
        return {records.ACCEPTED: len(rows)}
    return {entry["values"]: entry["counts"] for entry in rows["outcome"].value_counts().to_pylist()}
