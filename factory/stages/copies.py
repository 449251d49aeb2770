"""Copies: which rows of the intake show one photograph.

`candidate_pairs` finds, from the descriptions of all images alone, pairs that may be copies; `CompareCopies` opens both
images of a pair and says how alike they are; `rows_of` keeps what is alike enough, and adds what publishers say.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from factory import records
from factory.images import read_grey, read_png
from factory.quality import copies
from factory.recipe import CorpusSection
from factory.stages.settle import EMBEDDING, NEAR, PUBLISHED, published_copies
from factory.tables import Table

PAIRS_PER_TASK = 512
_PARTS_HELD = 64  # the views of so many parts, a megabyte each, are kept while pairs are compared
_EACH = copies.PLACEMENTS
_IMAGES_AT_ONCE = 32  # through an embedding
ALIKE = pa.schema([("a", pa.int64()), ("b", pa.int64()), ("likeness", pa.float32())])
PAIRS = pa.schema([
    ("a", pa.int64()), ("b", pa.int64()), ("frames_a", pa.list_(pa.float32(), 3 * _EACH)),
    ("frames_b", pa.list_(pa.float32(), 3 * _EACH)), ("symmetries", pa.list_(pa.int64(), _EACH)),
])  # fmt: skip


def candidate_pairs(intake: Table) -> pa.Table:
    """Pairs of intake rows by position, in the order of (a, b), with the placements of b on a (`PAIRS`)."""
    light = intake.read(["copy_keys", "outcome"])
    usable = np.flatnonzero(light["outcome"].to_numpy() == records.ACCEPTED)
    if not len(usable):
        return PAIRS.empty_table()
    described = copies.unpacked(light["copy_keys"].take(pa.array(usable)))
    found = copies.candidates(described)
    placed = found.frame_a >= 0  # (P, T); the likeliest come first
    frames_a, frames_b = (
        described.frames[images[:, None], frames].astype(np.float32)
        for images, frames in ((found.a, found.frame_a), (found.b, found.frame_b))
    )
    symmetries = np.where(placed, found.symmetry, -1)
    return pa.table([
        usable[found.a], usable[found.b], _lists(frames_a), _lists(frames_b), _lists(symmetries)
    ], schema=PAIRS)  # fmt: skip


def _lists(values: NDArray[Any]) -> pa.Array:
    """(P, ...) as one list of fixed length per pair."""
    flat = np.ascontiguousarray(values.reshape(-1))
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), flat.size // max(len(values), 1) or 1)


class CompareCopies:
    """`CompareCopies(intake)(pairs)`: the likeness of each pair, (P,)."""

    def __init__(self, intake: Table, enough: float) -> None:
        """enough: the likeness at which a pair counts as copies, beyond which nothing more is tried."""
        self.enough = enough
        self.starts = np.cumsum([0, *(info.rows for info in intake.sealed().parts)])
        self._views = lru_cache(_PARTS_HELD)(intake.reader(["copy_view"]))

    def __call__(self, pairs: pa.Table) -> NDArray[np.float32]:
        return np.array([self._likeness(pair) for pair in pairs.to_pylist()], np.float32)

    def _likeness(self, pair: dict[str, Any]) -> float:
        frames_a, frames_b = (np.array(pair[name], np.float32).reshape(_EACH, 3) for name in ("frames_a", "frames_b"))
        placements = [
            copies.Placement(frame_a, frame_b, symmetry)
            for frame_a, frame_b, symmetry in zip(frames_a, frames_b, pair["symmetries"], strict=True)
            if symmetry >= 0
        ]
        return copies.likeness(self._view(pair["a"]), self._view(pair["b"]), placements, self.enough)

    def _view(self, row: int) -> NDArray[np.uint8]:
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        place = row - int(self.starts[part])
        return read_grey(self._views(part)["copy_view"][place].as_py()["bytes"])


class EmbedImages:
    """`EmbedImages(directory, device)(rows)`: one row of `embeddings` per intake row (`row_id`, `image`)."""

    def __init__(self, directory: str, device: str = "cpu") -> None:
        from factory.models.embedder import ImageEmbedder

        self.embed = ImageEmbedder(directory, device)

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        shown = [k for k, row in enumerate(rows) if row["image"] is not None]
        made: list[dict[str, Any]] = [{"row_id": row["row_id"], "embedding": None} for row in rows]
        for start in range(0, len(shown), _IMAGES_AT_ONCE):
            batch = shown[start : start + _IMAGES_AT_ONCE]
            found = self.embed([read_png(rows[k]["image"]["bytes"]) for k in batch])
            for k, embedding in zip(batch, found.astype(np.float16), strict=True):
                made[k]["embedding"] = embedding.tobytes()
        return made


def alike_pairs(embeddings: Table, least: float) -> pa.Table:
    """Pairs (a, b, cosine) of rows by position whose embeddings are among each other's nearest and at least so near."""
    column = embeddings.read(["embedding"])["embedding"]
    known = np.flatnonzero(column.is_valid().to_numpy())
    if not len(known):
        return ALIKE.empty_table()
    vectors = np.frombuffer(b"".join(column.drop_null().to_pylist()), np.float16).reshape(len(known), -1)
    a, b, cosine = copies.alike(vectors.astype(np.float32), least)
    return pa.table({"a": known[a], "b": known[b], "likeness": cosine}, schema=ALIKE)


def rows_of(
    intake: Table, pairs: pa.Table, likeness: NDArray[np.float32], alike: pa.Table, section: CorpusSection
) -> list[dict[str, object]]:
    """Rows of `copies`: what publishers state, the pairs that are alike enough in detail, and `alike_pairs`."""
    light = intake.read(["row_id", "source", "source_id", "same_as"])
    near = pairs.select(["a", "b"]).append_column("likeness", pa.array(likeness))
    near = near.filter(pa.array(likeness >= section.min_likeness))
    ids, sources = light["row_id"], light["source"]
    a, b = published_copies(light, light["same_as"])
    found: list[tuple[int, int, str, float | None]] = [
        (int(i), int(j), PUBLISHED, None) for i, j in zip(a, b, strict=True)
    ]
    for kind, table in ((NEAR, near), (EMBEDDING, alike)):
        found += [(row["a"], row["b"], kind, row["likeness"]) for row in table.to_pylist()]
    return [
        {
            "a": i, "b": j, "row_id_a": ids[i].as_py(), "row_id_b": ids[j].as_py(), "source_a": sources[i].as_py(),
            "source_b": sources[j].as_py(), "kind": kind, "likeness": score,
        }
        for i, j, kind, score in found
    ]  # fmt: skip
