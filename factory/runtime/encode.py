"""The images of a fit, encoded on Ray Data before its workers start: not in the process group, and once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from factory import records
from factory.fits.encoded import EncodedCache, Encoder
from factory.progress import ProgressLine
from factory.run import Run
from factory.runtime.cluster import ACTOR_CPUS, Pools
from factory.runtime.units import Echo

SPLITS = ("train", "val")  # what a fit learns from, and what it is held to


def encode(run: Run, build: Callable[[], Encoder], digest: str, masks: bool, pools: Pools, echo: Echo = print) -> None:
    """Entries for all accepted images of the corpus that a fit may read, with their masks if it reads those.

    build: the encoder, called once per actor; digest: the encoder's, so that a driver need not load it.
    """
    import ray
    from ray.data import ActorPoolStrategy

    corpus = run.table("corpus")
    units = [part.part for part in corpus.sealed().parts]
    line = ProgressLine("encode", corpus.counts().get(records.ACCEPTED, 0), echo=echo)
    made = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units)).map_batches(
        EncodePart,  # type: ignore[arg-type]
        batch_size=1,
        compute=ActorPoolStrategy(size=min(pools.synthesize, len(units))),
        fn_constructor_args=(run.uri, build, digest, masks),
        num_cpus=ACTOR_CPUS,
        num_gpus=pools.gpus_per_actor or None,
        batch_format="pyarrow",
    )
    for batch in made.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
        for row in batch.to_pylist():
            line.add({records.ACCEPTED: row["rows"], records.REJECTED: 0, records.FAILED: 0})
    line.end()


class EncodePart:
    """A part of the corpus to entries of the cache."""

    def __init__(self, uri: str, build: Callable[[], Encoder], digest: str, masks: bool) -> None:
        run = Run(uri)
        self.corpus, self.masks = run.table("corpus"), masks
        self.cache, self.build = EncodedCache(run.store, digest), build
        self.encoder: Encoder | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = [self._encoded(unit) for unit in batch["unit"].to_pylist()]
        return pa.table({"rows": pa.array(rows, pa.int64())})

    def _encoded(self, unit: int) -> int:
        images, masks = pairs(self.corpus.read_part(unit, COLUMNS), self.masks)
        if self.encoder is None:  # not before there is something to encode it for
            self.encoder = self.build() if images else None
        if self.encoder is not None:
            self.cache.fill(self.encoder, images, masks)
        return len(images)


COLUMNS = ["image", "mask", "split", "outcome"]


def pairs(corpus: pa.Table, masks: bool) -> tuple[list[bytes], list[bytes | None]]:
    """The images that a fit may read, and their masks; None for all of these if it reads none."""
    kept = pc.and_(pc.equal(corpus["outcome"], records.ACCEPTED), pc.is_in(corpus["split"], pa.array(SPLITS)))
    rows: Sequence[dict[str, Any]] = corpus.select(COLUMNS).filter(kept).to_pylist()
    rows = [row for row in rows if row["image"] and (row["mask"] or not masks)]
    return [r["image"]["bytes"] for r in rows], [r["mask"]["bytes"] if masks else None for r in rows]
