"""Counting by words: columns of words as numbers, and how many rows have which two. No loop over rows.

Letters: N rows of the corpus, S sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from factory.records import ACCEPTED

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]

NOT_STATED = "not stated"
LABELS = ("benign", "malignant", NOT_STATED)  # what the policy makes of a label, in the order counted


class Coded(NamedTuple):
    """A column of words as numbers: row i holds `words[codes[i]]`. codes: (N,)."""

    codes: Ints
    words: tuple[str, ...]


@dataclass(frozen=True)
class CrossTable:
    """How many rows have `rows[i]` and `columns[j]`: `counts[i][j]`."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def row_totals(self) -> tuple[int, ...]:
        return tuple(sum(row) for row in self.counts)

    @property
    def column_totals(self) -> tuple[int, ...]:
        return tuple(sum(column) for column in zip(*self.counts, strict=True)) or (0,) * len(self.columns)

    @property
    def total(self) -> int:
        return sum(self.row_totals)

    @property
    def most(self) -> int:
        """The largest count; 0 of an empty table."""
        return max((count for row in self.counts for count in row), default=0)


def coded(column: pa.ChunkedArray, order: Sequence[str] = (), *, null: str = NOT_STATED, keep: bool = False) -> Coded:
    """A column of words as numbers: the words of `order` first (with `keep` absent ones too), others by name, and
    `null` last where a row has none."""
    found = column.cast(pa.string()).combine_chunks().dictionary_encode()
    values = found.dictionary.to_pylist()
    words = [*(w for w in order if keep or w in values), *sorted(set(values) - set(order))]
    place = {word: i for i, word in enumerate(words)}
    indices = np.asarray(pc.fill_null(found.indices, len(values)).to_numpy(zero_copy_only=False), dtype=np.int64)
    codes = np.array([*(place[v] for v in values), len(words)], dtype=np.int64)[indices]
    return Coded(codes, (*words, null) if found.null_count else tuple(words))


def sources(table: pa.Table) -> Coded:
    """The source of each row."""
    return coded(table["source"], null="unnamed")


def labels(table: pa.Table) -> Coded:
    """What the label policy makes of each row: LABELS."""
    known = pc.fill_null(table["malignant"].cast(pa.int64()), 2)
    return Coded(np.asarray(known.to_numpy(), dtype=np.int64), LABELS)


def accepted(table: pa.Table) -> Flags:
    """Which rows are accepted, (N,)."""
    return flags(pc.equal(table["outcome"], ACCEPTED))


def flags(column: pa.ChunkedArray) -> Flags:
    """A column of booleans as numpy, null as False, (N,)."""
    return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False), dtype=bool)


def numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """A column of numbers as numpy, null as NaN, (N,)."""
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def counted(rows: Coded, columns: Coded, where: Flags | None = None) -> Ints:
    """How many rows have which two words, (R, C)."""
    r, c = (rows.codes, columns.codes) if where is None else (rows.codes[where], columns.codes[where])
    shape = len(rows.words), len(columns.words)
    return np.bincount(r * shape[1] + c, minlength=shape[0] * shape[1]).reshape(shape)


def crosstab(rows: Coded, columns: Coded, where: Flags | None = None, *, keep: Sequence[str] = ()) -> CrossTable:
    """A table of counts over rows `where`; columns without a row are left out, but for those to `keep`. All `rows`
    stay."""
    counts = counted(rows, columns, where)
    chosen = [i for i, word in enumerate(columns.words) if word in keep or counts[:, i].any()]
    return CrossTable(rows.words, tuple(columns.words[i] for i in chosen), nested(counts[:, chosen]))


def nested(counts: Ints) -> tuple[tuple[int, ...], ...]:
    """A matrix as plain numbers."""
    return tuple(tuple(row) for row in counts.tolist())
