"""Copies: which rows of the intake show one photograph.

`candidate_pairs` finds, from short keys alone, pairs that may be copies; `CompareCopies` opens both images of a pair
and says how alike they are; `rows_of` keeps what is alike enough, with what publishers say themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from factory import records
from factory.images import RGB, read_png
from factory.quality import copies
from factory.recipe import CorpusSection
from factory.stages.settle import NEAR, PUBLISHED, published_copies
from factory.tables import Table

PAIRS_PER_TASK = 1000
_PARTS_HELD = 8  # decoded columns of so many parts are kept while pairs are compared


def candidate_pairs(intake: Table) -> pa.Table:
    """(a, b, symmetry, frame) of pairs whose keys are close, by position in the intake, in the order of a."""
    light = intake.read(["copy_keys", "outcome"])
    usable = np.flatnonzero(light["outcome"].to_numpy() == records.ACCEPTED)
    keys = copies.unpacked(light["copy_keys"].take(pa.array(usable)))
    found = copies.candidates(keys)
    a, b = usable[found.a], usable[found.b]
    pairs = pa.table({"a": a, "b": b, "symmetry": found.symmetry, "frame": found.frame})
    return pairs.sort_by([("a", "ascending"), ("b", "ascending")])
