"""The images of a fit, encoded on Ray Data before its workers start: not in the process group, and once.

cache/latents/ENCODER/*.parquet         entries by the content of image and mask (`fits/encoded.py`)
cache/rows/ENCODER-CORPUS.parquet       which entry is which record's, so that a fit reads no pixels
"""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from factory import records
from factory.fits.encoded import EncodedCache, Encoder, keys_of
from factory.progress import ProgressLine
from factory.run import Run
from factory.runtime.cluster import ACTOR_CPUS, Pools
from factory.runtime.units import Echo

SPLITS = ("train", "val")  # what a fit learns from, and what it is held to
COLUMNS = ["record_id", "image", "mask", "split", "outcome"]


def encode(run: Run, encoder: Encoder, masks: bool, pools: Pools, echo: Echo = print) -> None:
    """Entries for all accepted images of the corpus that a fit may read, with their masks if it reads those. What has
    been encoded is left alone. encoder: sent to the actors, where it loads its weights when it is first called."""
    digest = encoder.digest
    if run.store.exists(_index_path(run, digest, masks)):
        return
    import ray
    from ray.data import ActorPoolStrategy

    corpus = run.table("corpus")
    units = [part.part for part in corpus.sealed().parts]
    line = ProgressLine("encode", len(corpus.read(["split"], filter=_kept())), echo=echo)
    made = ray.data.from_items([{"unit": unit} for unit in units], override_num_blocks=len(units)).map_batches(
        EncodePart,  # type: ignore[arg-type]
        batch_size=1,
        compute=ActorPoolStrategy(size=min(pools.synthesize, len(units))),
        fn_constructor_args=(run.uri, encoder, digest, masks),
        num_cpus=ACTOR_CPUS,
        num_gpus=pools.gpus_per_actor or None,
        batch_format="pyarrow",
    )
    found = []
    for batch in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        found.append(batch)
        line.add({records.ACCEPTED: len(batch), records.REJECTED: 0, records.FAILED: 0})
    line.end()
    sink = io.BytesIO()
    pq.write_table(pa.concat_tables(found) if found else EMPTY, sink)
    run.store.replace(_index_path(run, digest, masks), sink.getvalue())


EMPTY = pa.table({"record_id": pa.array([], pa.string()), "key": pa.array([], pa.string())})


def keys_in(run: Run, digest: str, masks: bool) -> dict[str, str] | None:
    """The entry of each record that was encoded, or None where `encode` has not been here."""
    path = _index_path(run, digest, masks)
    if not run.store.exists(path):
        return None
    with run.store.open(path) as file:
        found = pq.ParquetFile(file).read()
    return dict(zip(found["record_id"].to_pylist(), found["key"].to_pylist(), strict=True))


def _index_path(run: Run, digest: str, masks: bool) -> str:
    return f"cache/rows/{records.digest(digest, run.table('corpus').digest(), masks)}.parquet"


class EncodePart:
    """A part of the corpus to entries of the cache. Returns which entry is which record's."""

    def __init__(self, uri: str, encoder: Encoder, digest: str, masks: bool) -> None:
        run = Run(uri)
        self.corpus, self.masks, self.encoder = run.table("corpus"), masks, encoder
        self.cache = EncodedCache(run.store, digest)

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.concat_tables([EMPTY, *(self._encoded(unit) for unit in batch["unit"].to_pylist())])

    def _encoded(self, unit: int) -> pa.Table:
        rows = readable(self.corpus.read_part(unit, COLUMNS), self.masks)
        images = [row["image"]["bytes"] for row in rows]
        masks = [row["mask"]["bytes"] if self.masks else None for row in rows]
        if images:
            self.cache.fill(self.encoder, images, masks)
        return pa.table({"record_id": [row["record_id"] for row in rows], "key": keys_of(images, masks)}, EMPTY.schema)


def readable(corpus: pa.Table, masks: bool) -> list[dict[str, Any]]:
    """The accepted rows of the splits that a fit reads, with an image, and with masks=True with a mask."""
    return [row for row in corpus.filter(_kept()).to_pylist() if row["image"] and (row["mask"] or not masks)]


def _kept() -> pc.Expression:
    return records.accepted() & pc.field("split").isin(SPLITS)
