"""The pipelines: ingest, caption and synthesize on Ray Data.

One row is one unit; a unit is committed by one part that is put in place only if it is not there. Resume is the list
of parts that are missing. Ray Data's own checkpointing is left off: it loses or repeats rows in ways that it does not
report, and it makes every rejected sample again.

Each pipeline is a stage (`stages/`, no Ray) inside an actor that reads its unit's rows and hands on the result; the
commit is a task of its own, so that an actor goes on while its last unit is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from factory import records
from factory.progress import ProgressLine, Stopped
from factory.recipe import Recipe
from factory.run import Run
from factory.runtime.cluster import ACTOR_CPUS, Pools
from factory.tables import Table, fingerprint_of

if TYPE_CHECKING:
    from factory.stages.synthesize import SynthesizeSamples

Echo = Callable[[str], None]
UNITS_PER_LISTING_PART = 64


def ingest(run: Run, recipe: Recipe, pools: Pools, echo: Echo = print) -> None:
    """The frozen `listing` to the sealed `corpus`: a pass over units, the copies among all, and what both decide."""
    listing = run.table("listing")
    total, units = listing.sealed().rows, _units_of(listing)
    intake, fingerprint = run.table("intake"), _fingerprint(run, recipe, "intake", ["listing"])
    _fill(intake, units, fingerprint, total, "ingest", echo, partial(_pool, IngestUnit, (run.uri, recipe), pools.tasks))
    intake.seal(units, fingerprint, {"listing": listing.digest()})
    copies = find_copies(run, recipe, pools, echo)
    corpus, fingerprint = run.table("corpus"), _fingerprint(run, recipe, "corpus", ["intake", "copies"])
    corpus.require(fingerprint)
    if corpus.missing(units):
        import ray

        # In a process of its own: it holds every row's ids, which the driver need not.
        decided = ray.remote(num_cpus=1)(_settled).remote(intake, copies, recipe)
        stage = partial(_pool, SettleUnit, (run.uri, decided), pools.tasks)
        _fill(corpus, units, fingerprint, total, "settle", echo, stage)
    corpus.seal(units, fingerprint, {"intake": intake.digest(), "copies": copies.digest()})


def freeze_listing(run: Run, recipe: Recipe) -> None:
    """What the sources hold now, cut into units: once sealed, it is what is ingested. Needs no cluster.

    A listing that was not finished is begun again, because the sources may have changed meanwhile.
    """
    from factory.corpora import list_entries
    from factory.labels import Policy

    policy = Policy.read(recipe.corpus.labels)
    table, fingerprint = run.table("listing"), fingerprint_of(recipe, "listing", {}, {"labels": policy.digest()})
    if table.manifest() is not None:
        return table.require(fingerprint)
    size, parts = recipe.corpus.unit_rows, 0
    entries = enumerate(list_entries(recipe.corpus, policy))
    chunks = iter(lambda: list(islice(entries, size * UNITS_PER_LISTING_PART)), [])
    for parts, chunk in enumerate(chunks, start=1):
        if parts == 1:  # nothing is written before the sources are known to be readable
            table.require(fingerprint)
            for part in table.parts():
                run.store.delete(table.part_path(part))
        rows = [entry.to_row() | {"unit": number // size} for number, entry in chunk]
        table.commit(parts - 1, records.rows_to_table("listing", rows), row_group_by="unit")
    if not parts:
        raise ValueError("corpus.sources must hold at least one image, got none; name another folder.")
    table.seal(parts, fingerprint, {})


def _units_of(listing: Table) -> int:
    """How many units a listing is cut into."""
    last = listing.read_part(len(listing.sealed().parts) - 1, ["unit"])
    return int(pc.max(last["unit"]).as_py()) + 1


def find_copies(run: Run, recipe: Recipe, pools: Pools, echo: Echo = print) -> Table:
    """Pairs of intake rows that show one photograph, that their publisher says are one, or that an embedding cannot
    tell apart: the sealed `copies`."""
    intake, table, parents = run.table("intake"), run.table("copies"), ["intake"]
    if recipe.corpus.embedding is not None:
        _embed(run, recipe, pools, echo)
        parents.append("embeddings")
    fingerprint = _fingerprint(run, recipe, "copies", parents)
    table.require(fingerprint)
    if table.missing(1):
        import ray

        from factory.stages import copies

        # In processes of their own: they hold the descriptions of all images, which the driver need not.
        pairs = ray.get(ray.remote(num_cpus=1)(copies.candidate_pairs).remote(intake))
        alike = copies.ALIKE.empty_table()
        if recipe.corpus.embedding is not None:
            least = recipe.corpus.min_cosine
            alike = ray.get(ray.remote(num_cpus=1)(copies.alike_pairs).remote(run.table("embeddings"), least))
        likeness = _compared(intake, pairs, recipe.corpus.min_likeness, pools)
        rows = copies.rows_of(intake, pairs, likeness, alike, recipe.corpus)
        table.commit(0, records.rows_to_table("copies", rows))
        echo(f"copies      {len(rows)}, of {pairs.num_rows} pairs that were compared")
    table.seal(1, fingerprint, {parent: run.table(parent).digest() for parent in parents})
    return table


def embedding_digest(recipe: Recipe) -> str | None:
    """Of the weights of corpus.embedding, None without; a ValueError where there are none at that path."""
    from factory.models.weights import tree_digest

    return None if recipe.corpus.embedding is None else tree_digest(recipe.corpus.embedding, "corpus.embedding")


def _embed(run: Run, recipe: Recipe, pools: Pools, echo: Echo) -> None:
    """The sealed `embeddings` of the intake, one part for each of its parts."""
    intake, table = run.table("intake"), run.table("embeddings")
    units, digest = len(intake.sealed().parts), embedding_digest(recipe)
    fingerprint = _fingerprint(run, recipe, "embeddings", ["intake"], {"embedding": digest or ""})
    arguments = (run.uri, recipe.corpus.embedding)
    stage = partial(_pool, EmbedUnit, arguments, pools.synthesize, num_gpus=pools.gpus_per_actor)
    _fill(table, units, fingerprint, intake.sealed().rows, "embed", echo, stage)
    table.seal(units, fingerprint, {"intake": intake.digest()})


def _compared(intake: Table, pairs: pa.Table, enough: float, pools: Pools) -> NDArray[np.float32]:
    """The likeness of each pair, in order."""
    from factory.stages.copies import PAIRS_PER_TASK

    found = np.zeros(pairs.num_rows, np.float32)
    if not pairs.num_rows:
        return found
    import ray
    from ray.data import ActorPoolStrategy

    numbered = pairs.append_column("pair", pa.array(range(pairs.num_rows)))
    blocks = [numbered.slice(start, PAIRS_PER_TASK) for start in range(0, pairs.num_rows, PAIRS_PER_TASK)]
    compared = ray.data.from_arrow(blocks).map_batches(
        ComparePairs,
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(pools.tasks, len(blocks)), max_tasks_in_flight_per_actor=2),
        fn_constructor_args=(intake, enough),
        num_cpus=ACTOR_CPUS,
    )
    for batch in compared.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        found[batch["pair"].to_numpy()] = batch["likeness"].to_numpy()
    return found


def caption(run: Run, recipe: Recipe, pools: Pools, echo: Echo = print) -> None:
    """The sealed corpus to the sealed `captions`, one part for each of its parts."""
    from factory.runtime import captions

    corpus = run.table("corpus")
    sealed = corpus.sealed()
    table, fingerprint = run.table("captions"), captions.fingerprint(run, recipe)
    total = corpus.counts().get(records.ACCEPTED, 0)
    _fill(table, len(sealed.parts), fingerprint, total, "caption", echo, captions.pool(run, recipe, pools))
    table.seal(len(sealed.parts), fingerprint, {"corpus": corpus.digest()})


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
    table, fingerprint = run.table("samples"), _fingerprint(run, recipe, "samples", ["plan"], weights)
    arguments = (run.uri, recipe, paths["generator"], paths["adapter"], weights["gate"])
    stage = partial(_pool, unit or SynthesizeUnit, arguments, pools.synthesize, num_gpus=pools.gpus_per_actor)
    table.require(fingerprint)
    with gate if table.missing(units) else nullcontext():
        _fill(table, units, fingerprint, plan.sealed().rows, "synthesize", echo, stage)
    table.seal(units, fingerprint, {"plan": plan.digest()})


def _fingerprint(
    run: Run, recipe: Recipe, name: str, parents: Sequence[str], weights: dict[str, str] | None = None
) -> dict[str, str]:
    return fingerprint_of(recipe, name, {parent: run.table(parent).origin() for parent in parents}, weights or {})


def _fill(
    table: Table,
    num_units: int,
    fingerprint: dict[str, str],
    total: int,
    word: str,
    echo: Echo,
    pool: Callable[[Sequence[int]], Iterator[dict[str, Any]]],
) -> None:
    """Makes the units that a table lacks, with a progress line. Refused if its other units were made otherwise."""
    table.require(fingerprint)
    missing = table.missing(num_units)
    line = ProgressLine(word, total, done=_rows_done(table, num_units, missing, total), echo=echo)
    stopped = None
    for committed in pool(missing, CommitTable(table)):  # type: ignore[call-arg]
        line.add(committed)
        stopped = stopped or committed.get("stopped")
    line.end()
    if stopped:  # said after what was in flight is committed: nothing that was made is lost
        raise Stopped(stopped)


def _rows_done(table: Table, num_units: int, missing: Sequence[int], total: int) -> int:
    """Rows in the parts that are there already; exact when there are none or all of them."""
    return round(total * (num_units - len(missing)) / num_units) if num_units else 0


def _settled(intake: Table, copies: Table, recipe: Recipe) -> pa.Table:
    from factory.stages.settle import LIGHT_COLUMNS, settle

    return settle(intake.read(list(LIGHT_COLUMNS)), copies.read(["a", "b", "kind"]), recipe.corpus)


_COLUMNS, _TYPES = ["unit", "rows", "stopped"], [pa.int64(), pa.large_binary(), pa.string()]


class _UnitStage:
    """A stage on one unit at a time: reads its rows, works, returns `unit` and `rows` (an Arrow stream).

    A unit whose stage says `Stopped` has no rows and is not committed; `stopped` is what the run ends with.
    """

    name: str

    def rows(self, unit: int) -> pa.Table:
        raise NotImplementedError

    def __call__(self, batch: pa.Table) -> pa.Table:
        made = [(unit, *self._made(unit)) for unit in batch["unit"].to_pylist()]
        return pa.Table.from_arrays(
            [pa.array(column, dtype) for column, dtype in zip(zip(*made, strict=True), _TYPES, strict=True)], _COLUMNS
        )

    def _made(self, unit: int) -> tuple[bytes | None, str | None]:
        try:
            return stream_of(self.rows(unit)), None
        except Stopped as stop:
            return None, str(stop)


class IngestUnit(_UnitStage):
    """Entries of one unit of the listing to rows of `intake`. An entry that has gone since is a failed row."""

    def __init__(self, run_uri: str, recipe: Recipe) -> None:
        from factory.stages.curate import CurateImages

        self.curate = CurateImages(recipe.corpus)
        self.part_of = lru_cache(2)(Run(run_uri).table("listing").reader())  # units come in order, or nearly

    def rows(self, unit: int) -> pa.Table:
        from factory.corpora.base import Entry

        part = self.part_of(unit // UNITS_PER_LISTING_PART)
        listed = part.filter(pc.field("unit") == unit).to_pylist()
        return records.rows_to_table("intake", self.curate([Entry.from_row(row) for row in listed]))


class ComparePairs:
    """Pairs of intake rows to their likeness, by the number of the pair."""

    def __init__(self, intake: Table, enough: float) -> None:
        from factory.stages.copies import CompareCopies

        self.compare = CompareCopies(intake, enough)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.table({"pair": batch["pair"], "likeness": self.compare(batch)})


class EmbedUnit(_UnitStage):
    """A part of the intake to its embeddings."""

    def __init__(self, run_uri: str, directory: str) -> None:
        import torch

        from factory.stages.copies import EmbedImages

        self.read = Run(run_uri).table("intake").reader(["row_id", "image"])
        self.embed = EmbedImages(directory, "cuda" if torch.cuda.is_available() else "cpu")

    def rows(self, unit: int) -> pa.Table:
        return records.rows_to_table("embeddings", self.embed(self.read(unit).to_pylist()))


class SettleUnit(_UnitStage):
    """A part of `intake` with its group, split and verdict, as all rows together decided them."""

    def __init__(self, run_uri: str, decided: Any) -> None:
        import ray

        intake = Run(run_uri).table("intake")
        self.read, self.decided = intake.reader(), ray.get(decided)
        self.start = [0, *accumulate(info.rows for info in intake.sealed().parts)]

    def rows(self, unit: int) -> pa.Table:
        part = self.read(unit)
        decided = self.decided.slice(self.start[unit], part.num_rows)
        for name in ("group_id", "split", "duplicate_of", "outcome", "reason"):
            place = part.schema.get_field_index(name)
            part = part.set_column(place, part.schema.field(name), decided[name])
        return part.select(records.CORPUS.names)


class CaptionUnit(_UnitStage):
    """A part of the corpus to its captions, measured."""

    def __init__(self, run_uri: str, recipe: Recipe) -> None:
        from factory.stages.caption import READS, CaptionImages

        self.read = Run(run_uri).table("corpus").reader(list(READS))
        self.caption = CaptionImages(recipe.caption)

    def rows(self, unit: int) -> pa.Table:
        return records.rows_to_table("captions", self.caption(self.read(unit).to_pylist()))


class SynthesizeUnit(_UnitStage):
    """A unit of the plan to its samples: generator, sampler and a handle to the gate, loaded once per actor."""

    def __init__(self, run_uri: str, recipe: Recipe, weights: str, adapter: str | None, gate_digest: str) -> None:
        from factory.runtime.serve import GateHandle

        self.plan = Run(run_uri).table("plan")
        gate = GateHandle(run_uri)
        self.synthesize = self.stage()(weights, adapter, recipe.synthesize, recipe.gate, gate, gate_digest)

    def stage(self) -> type[SynthesizeSamples]:
        """The stage it runs; another family's unit overrides this."""
        from factory.stages.synthesize import SynthesizeSamples

        return SynthesizeSamples

    def rows(self, unit: int) -> pa.Table:
        planned = self.plan.read(filter=pc.field("unit") == unit).to_pylist()
        return records.rows_to_table("samples", self.synthesize(planned))


class CommitTable:
    """The last stage of every pipeline: a unit's rows become a part. Returns what it holds, not the rows."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __call__(self, batch: pa.Table) -> pa.Table:
        columns = (batch[name] for name in _COLUMNS)
        return pa.Table.from_pylist([self._commit(*one) for one in zip(*columns, strict=True)])

    def _commit(self, unit: pa.Scalar, data: pa.Scalar, stopped: pa.Scalar) -> dict[str, Any]:
        if not data.is_valid:
            none = dict.fromkeys(records.OUTCOMES, 0)
            return {"unit": unit.as_py(), "won": False, **none, "stopped": stopped.as_py()}
        rows = pa.ipc.open_stream(data.as_buffer()).read_all()
        won = self.table.commit(unit.as_py(), rows)
        counts = _count(rows)
        made = {outcome: counts.get(outcome, 0) for outcome in records.OUTCOMES}
        return {"unit": unit.as_py(), "won": won, **made, "stopped": ""}


def _pool(
    stage: type[_UnitStage],
    arguments: tuple[Any, ...],
    num_actors: int,
    units: Sequence[int],
    commit: CommitTable,
    *,
    num_gpus: float = 0.0,
) -> Iterator[dict[str, Any]]:
    """Runs a stage on an actor pool over units, commits each, and yields what was committed.

    An exception in a stage ends the run: a bad row is the stage's own business, and gets a reason there.
    """
    if not units:
        return
    import ray
    from ray.data import ActorPoolStrategy, TaskPoolStrategy

    dataset = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units))
    made = dataset.map_batches(
        stage,  # type: ignore[arg-type]
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=min(num_actors, len(units)), max_tasks_in_flight_per_actor=2),
        fn_constructor_args=arguments,
        num_cpus=ACTOR_CPUS,
        num_gpus=num_gpus or None,
        udf_modifying_row_count=False,
    )
    # As many commits at once as there are actors: each worker process costs seconds of imports before its first.
    committed = made.map_batches(
        commit.__call__,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=ACTOR_CPUS,
        compute=TaskPoolStrategy(min(num_actors, len(units))),
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
