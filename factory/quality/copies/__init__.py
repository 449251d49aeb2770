"""Copies of one photograph, found by what survives re-encoding, resizing, flips, turns, crops and mild colour changes.

describe(rgb) -> Description            a few frames and a key for each: what the intake stores of every image
candidates(descriptions) -> Candidates  pairs that may be copies, and where b would lie on a
likeness(a, b, placements) -> float     how far the two agree in detail when laid over each other
"""

from factory.quality.copies.compare import Placement, likeness
from factory.quality.copies.frames import DIM, FRAMES, Description, describe, packed, unpacked, view
from factory.quality.copies.search import PLACEMENTS, Candidates, alike, candidates

__all__ = [
    "DIM",
    "FRAMES",
    "PLACEMENTS",
    "Candidates",
    "Description",
    "Placement",
    "alike",
    "candidates",
    "describe",
    "likeness",
    "packed",
    "unpacked",
    "view",
]
