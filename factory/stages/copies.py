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
from factory.images import read_grey
from factory.quality import copies
from factory.recipe import CorpusSection
from factory.stages.settle import NEAR, PUBLISHED, published_copies
from factory.tables import Table

PAIRS_PER_TASK = 512
_PARTS_HELD = 64  # the views of so many parts, a megabyte each, are kept while pairs are compared
_EACH = copies.PLACEMENTS
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


def rows_of(
    intake: Table, pairs: pa.Table, likeness: NDArray[np.float32], section: CorpusSection
) -> list[dict[str, object]]:
    """Rows of `copies`: the pairs that are alike enough, and those that publishers state."""
    light = intake.read(["row_id", "source", "source_id", "same_as"])
    a, b = published_copies(light, light["same_as"])
    alike = np.flatnonzero(likeness >= section.min_likeness)
    near_a, near_b = (pairs[name].to_numpy()[alike] for name in ("a", "b"))
    ids, sources = light["row_id"], light["source"]
    stated = [(int(i), int(j), PUBLISHED, None) for i, j in zip(a, b, strict=True)]
    found = [(int(i), int(j), NEAR, float(s)) for i, j, s in zip(near_a, near_b, likeness[alike], strict=True)]
    return [
        {
            "a": i, "b": j, "row_id_a": ids[i].as_py(), "row_id_b": ids[j].as_py(), "source_a": sources[i].as_py(),
            "source_b": sources[j].as_py(), "kind": kind, "likeness": score,
        }
        for i, j, kind, score in (*stated, *found)
    ]  # fmt: skip
