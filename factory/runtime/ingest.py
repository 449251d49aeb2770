"""Ingest on Ray Data: the frozen listing to the intake, the copies among all of it, and the corpus that both decide."""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import accumulate, islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from factory import records
from factory.fingerprint import fingerprint_of
from factory.recipe import Recipe
from factory.run import Run
from factory.runtime.cluster import ACTOR_CPUS, Pools
from factory.runtime.units import LIGHT_UNITS, Echo, UnitStage, fill, fingerprint_in, pool
from factory.tables import Table

UNITS_PER_LISTING_PART = 64


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


def ingest(run: Run, recipe: Recipe, pools: Pools, echo: Echo = print) -> None:
    """The frozen `listing` to the sealed `corpus`: a pass over units, the copies among all, and what both decide."""
    listing = run.table("listing")
    total, units = listing.sealed().rows, _units_of(listing)
    intake, fingerprint = run.table("intake"), fingerprint_in(run, recipe, "intake", ["listing"])
    stage = partial(pool, IngestUnit, (run.uri, recipe), pools.tasks, units_per_actor=LIGHT_UNITS)
    fill(intake, units, fingerprint, total, "ingest", echo, stage)
    intake.seal(units, fingerprint, {"listing": listing.digest()})
    copies = find_copies(run, recipe, pools, echo)
    corpus, fingerprint = run.table("corpus"), fingerprint_in(run, recipe, "corpus", ["intake", "copies"])
    corpus.require(fingerprint)
    if corpus.missing(units):
        import ray

        # In a process of its own: it holds every row's ids, which the driver need not.
        decided = ray.remote(num_cpus=1)(_settled).remote(intake, copies, recipe)
        stage = partial(pool, SettleUnit, (run.uri, decided), pools.tasks, units_per_actor=LIGHT_UNITS)
        fill(corpus, units, fingerprint, total, "settle", echo, stage)
    corpus.seal(units, fingerprint, {"intake": intake.digest(), "copies": copies.digest()})


def _units_of(listing: Table) -> int:
    """How many units a listing is cut into."""
    last = listing.read_part(len(listing.sealed().parts) - 1, ["unit"])
    return int(pc.max(last["unit"]).as_py()) + 1


def find_copies(run: Run, recipe: Recipe, pools: Pools, echo: Echo = print) -> Table:
    """Pairs of intake rows that show one photograph, that their publisher says are one, or that an embedding cannot
    tell apart: the sealed `copies`."""
    intake, table, parents = run.table("intake"), run.table("copies"), ["intake"]
    if recipe.corpus.embedding is not None:
        _embed(run, recipe, recipe.corpus.embedding, pools, echo)
        parents.append("embeddings")
    fingerprint = fingerprint_in(run, recipe, "copies", parents)
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


def _embed(run: Run, recipe: Recipe, directory: str, pools: Pools, echo: Echo) -> None:
    """The sealed `embeddings` of the intake, one part for each of its parts."""
    from factory.models.weights import tree_digest

    intake, table = run.table("intake"), run.table("embeddings")
    units, digest = len(intake.sealed().parts), tree_digest(directory)
    fingerprint = fingerprint_in(run, recipe, "embeddings", ["intake"], {"embedding": digest})
    stage = partial(pool, EmbedUnit, (run.uri, directory), pools.synthesize, num_gpus=pools.gpus_per_actor)
    fill(table, units, fingerprint, intake.sealed().rows, "embed", echo, stage)
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


def _settled(intake: Table, copies: Table, recipe: Recipe) -> pa.Table:
    from factory.stages.settle import LIGHT_COLUMNS, settle

    return settle(intake.read(list(LIGHT_COLUMNS)), copies.read(["a", "b", "kind"]), recipe.corpus)


class IngestUnit(UnitStage):
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


class EmbedUnit(UnitStage):
    """A part of the intake to its embeddings."""

    def __init__(self, run_uri: str, directory: str) -> None:
        import torch

        from factory.stages.copies import EmbedImages

        self.read = Run(run_uri).table("intake").reader(["row_id", "image"])
        self.embed = EmbedImages(directory, "cuda" if torch.cuda.is_available() else "cpu")

    def rows(self, unit: int) -> pa.Table:
        return records.rows_to_table("embeddings", self.embed(self.read(unit).to_pylist()))


class SettleUnit(UnitStage):
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
