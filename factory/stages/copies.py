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
from factory.images import RGB, read_png
from factory.quality import copies
from factory.recipe import CorpusSection
from factory.stages.curate import measured
from factory.stages.settle import NEAR, PUBLISHED, published_copies
from factory.tables import Table

PAIRS_PER_TASK = 512
_PARTS_HELD = 16  # the images of so many parts are kept while pairs are compared
PAIRS = pa.schema([
    ("a", pa.int64()), ("b", pa.int64()), ("frame_a", pa.list_(pa.float32())), ("frame_b", pa.list_(pa.float32())),
    ("symmetry", pa.int64()),
])  # fmt: skip


def candidate_pairs(intake: Table) -> pa.Table:
    """Pairs of intake rows by position, in the order of (a, b), with the frames that match (`PAIRS`)."""
    light = intake.read(["copy_keys", "outcome"])
    usable = np.flatnonzero(light["outcome"].to_numpy() == records.ACCEPTED)
    if not len(usable):
        return PAIRS.empty_table()
    described = copies.unpacked(light["copy_keys"].take(pa.array(usable)))
    found = copies.candidates(described)
    frames = described.frames.astype(np.float32)
    return pa.table({
        "a": usable[found.a], "b": usable[found.b], "frame_a": list(frames[found.a, found.frame_a]),
        "frame_b": list(frames[found.b, found.frame_b]), "symmetry": found.symmetry,
    }, schema=PAIRS)  # fmt: skip


class CompareCopies:
    """`CompareCopies(intake)(pairs)`: the likeness of each pair, (P,)."""

    def __init__(self, intake: Table) -> None:
        self.intake = intake
        self.starts = np.cumsum([0, *(info.rows for info in intake.sealed().parts)])
        self._images = lru_cache(_PARTS_HELD)(self._read)

    def __call__(self, pairs: pa.Table) -> NDArray[np.float32]:
        return np.array([self._likeness(pair) for pair in pairs.to_pylist()], np.float32)

    def _likeness(self, pair: dict[str, Any]) -> float:
        a, b = self._image(pair["a"]), self._image(pair["b"])
        return copies.likeness(a, b, np.array(pair["frame_a"]), np.array(pair["frame_b"]), pair["symmetry"])

    def _image(self, row: int) -> RGB:
        """The image of a row at the size that it was described at."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return measured(read_png(self._images(part)[row - int(self.starts[part])].as_py()["bytes"]))

    def _read(self, part: int) -> pa.ChunkedArray:
        return self.intake.read_part(part, ["image"])["image"]


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
