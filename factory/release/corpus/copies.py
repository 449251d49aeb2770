"""Copies between datasets: pairs that show one photograph, what they removed, and the groups that hold them together.

A pair counts once: as `exact` where the stored pixels are equal (the same record_id), else as the table `copies` says
it, `published` before `near`. Equal pixels are counted from the record ids, all pairs of them, whether or not the
table names them; so what the table holds is accounted for by `Reconciled`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array

from factory import taxonomy
from factory.release.corpus.crosstab import (
    Coded,
    CrossTable,
    Flags,
    Ints,
    accepted,
    coded,
    crosstab,
    flags,
    nested,
    sources,
)  # fmt: skip
from factory.stages.settle import NEAR, PUBLISHED

EXACT = "exact"
_PRECEDENCE = (PUBLISHED, NEAR)  # any other kind that the table may hold comes after these, by name


@dataclass(frozen=True)
class Pairs:
    """Unordered pairs of copies between two datasets (one dataset: inside it), by kind."""

    source_a: str
    source_b: str
    kinds: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Reconciled:
    """rows of `copies` = counted as published or near + equal pixels + repeats of a pair + rows not in the corpus."""

    rows: int
    counted: int
    equal_pixels: int
    repeats: int
    unknown: int

    @property
    def holds(self) -> bool:
        return self.rows == self.counted + self.equal_pixels + self.repeats + self.unknown


@dataclass(frozen=True)
class Groups:
    """Groups of rows that must share a split, over all listed rows and over accepted ones.

    largest: the most rows of one group. many_sources: groups with more than one source. crossing: groups with accepted
    rows in more than one split; it must be 0.
    """

    listed: int
    listed_largest: int
    listed_many_sources: int
    accepted: int
    accepted_largest: int
    accepted_many_sources: int
    crossing: int


@dataclass(frozen=True)
class Copies:
    """looked_for: whether `copies` is sealed; without it only equal pixels are known. matrix: pairs between sources,
    symmetric, a pair inside one source once, on the diagonal. removed: rows lost as copies, by their source and by the
    source of the row that stayed."""

    looked_for: bool
    pairs: tuple[Pairs, ...]
    matrix: CrossTable
    kinds: dict[str, int]
    reconciled: Reconciled | None
    removed: CrossTable
    groups: Groups

    @property
    def total(self) -> int:
        """Unordered pairs, each once."""
        return sum(self.kinds.values())


def count_copies(table: pa.Table, copies: pa.Table | None) -> Copies:
    """The duplicate matrix from the corpus and the sealed table `copies` (None: it is not there)."""
    of = sources(table)
    found: Counter[tuple[int, int, str]] = Counter()
    found.update(_equal_pixels(table, of))
    reconciled = None
    if copies is not None:
        stated, reconciled = _stated(table, of, copies)
        found.update(stated)
    kinds = (EXACT, *_PRECEDENCE, *sorted({k for _, _, k in found} - {EXACT, *_PRECEDENCE}))
    cells = sorted({(a, b) for a, b, _ in found})
    pairs = tuple(Pairs(of.words[a], of.words[b], {k: found[a, b, k] for k in kinds}) for a, b in cells)
    matrix = np.zeros((len(of.words), len(of.words)), dtype=np.int64)
    for (a, b, _), n in found.items():
        matrix[a, b] += n
        matrix[b, a] += n if a != b else 0
    return Copies(
        looked_for=copies is not None,
        pairs=pairs,
        matrix=CrossTable(of.words, of.words, nested(matrix)),
        kinds={k: sum(n for (_, _, kind), n in found.items() if kind == k) for k in kinds},
        reconciled=reconciled,
        removed=_removed(table, of),
        groups=_groups(table, of),
    )


def _equal_pixels(table: pa.Table, of: Coded) -> Counter[tuple[int, int, str]]:
    """Pairs of rows with one record_id, by their sources (the lower number first)."""
    records = table["record_id"].combine_chunks().dictionary_encode()
    known = flags(pc.is_valid(table["record_id"]))
    codes = np.asarray(pc.fill_null(records.indices, 0).to_numpy(zero_copy_only=False), dtype=np.int64)[known]
    again = np.bincount(codes, minlength=1)[codes] > 1
    cells = codes[again], of.codes[known][again]
    shape = len(records.dictionary), len(of.words)
    holds = coo_array((np.ones(len(cells[0]), np.int64), cells), shape=shape).tocsr()  # rows of a record and a source
    products = (holds.T @ holds).toarray()  # between sources every product of two counts is so many pairs
    inside = (products.diagonal() - holds.sum(axis=0)) // 2
    products[np.diag_indices(len(products))] = inside
    return Counter({(int(a), int(b), EXACT): int(products[a, b]) for a, b in np.argwhere(np.triu(products))})


def _stated(table: pa.Table, of: Coded, copies: pa.Table) -> tuple[Counter[tuple[int, int, str]], Reconciled]:
    """Pairs of the table `copies` that do not have equal pixels, by sources and kind, and what became of its rows."""
    a, b = positions(table, copies)
    known = (a >= 0) & (b >= 0) & (a != b)
    kind = coded(copies["kind"], _PRECEDENCE)
    equal = known & _same(table, "record_id", a, b)
    rows = np.flatnonzero(known & ~equal)
    low, high = np.minimum(a, b)[rows], np.maximum(a, b)[rows]
    order = np.lexsort((kind.codes[rows], high, low))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(low[order]) != 0) | (np.diff(high[order]) != 0)
    first = rows[order[new]]
    one, two = of.codes[a[first]], of.codes[b[first]]
    triples = np.stack([np.minimum(one, two), np.maximum(one, two), kind.codes[first]])
    cells, counts = np.unique(triples, axis=1, return_counts=True)
    found = Counter({(int(s), int(t), kind.words[k]): int(n) for s, t, k, n in zip(*cells, counts, strict=True)})
    return found, Reconciled(copies.num_rows, len(first), int(equal.sum()), len(rows) - len(first), int((~known).sum()))


def positions(table: pa.Table, copies: pa.Table) -> tuple[Ints, Ints]:
    """Where the two rows of each pair of `copies` are in the corpus, by their ids; -1 where they are not. (P,) each."""
    ids = table["row_id"].combine_chunks()
    return tuple(  # type: ignore[return-value]
        np.asarray(pc.fill_null(pc.index_in(copies[name].combine_chunks(), ids), -1).to_numpy(), dtype=np.int64)
        for name in ("row_id_a", "row_id_b")
    )


def _same(table: pa.Table, column: str, a: Ints, b: Ints) -> Flags:
    """Whether two rows have an equal value (null equals nothing), (P,); a position of -1 is taken as 0."""
    values = table[column].combine_chunks()
    return flags(pc.equal(*(values.take(pa.array(np.maximum(side, 0))) for side in (a, b))))


def apart(table: pa.Table, copies: pa.Table) -> int:
    """Pairs of `copies` whose rows are in different groups; it must be 0."""
    a, b = positions(table, copies)
    known = (a >= 0) & (b >= 0)
    return int((~_same(table, "group_id", a, b) & known).sum())


def _removed(table: pa.Table, of: Coded) -> CrossTable:
    """Rows lost as copies: source of the lost row by source of the row that stayed."""
    kept = pc.fill_null(pc.index_in(table["duplicate_of"].combine_chunks(), table["row_id"].combine_chunks()), -1)
    place = np.asarray(kept.to_numpy(), dtype=np.int64)
    lost = place >= 0
    return crosstab(Coded(of.codes[lost], of.words), Coded(of.codes[place[lost]], of.words), keep=of.words)


def orphans(table: pa.Table) -> int:
    """Rows that name a copy that stays in their place which is not an accepted row; it must be 0."""
    named = table["duplicate_of"].drop_null()
    stays = table["row_id"].filter(pa.array(accepted(table))).combine_chunks()
    return int(len(named) - pc.sum(pc.is_in(named, value_set=stays)).as_py()) if len(named) else 0


def _groups(table: pa.Table, of: Coded) -> Groups:
    group, kept = _group_codes(table), accepted(table)
    every = group >= 0
    kept = kept & every
    split = coded(table["split"], taxonomy.SPLITS).codes
    return Groups(*_sizes(group[every], of.codes[every]), *_sizes(group[kept], of.codes[kept]),
                  _with_several(group[kept], split[kept]))  # fmt: skip


def _group_codes(table: pa.Table) -> Ints:
    """A number per group, -1 for a row without one, (N,)."""
    codes = table["group_id"].combine_chunks().dictionary_encode().indices
    return np.asarray(pc.fill_null(codes, -1).to_numpy(zero_copy_only=False), dtype=np.int64)


def _sizes(group: Ints, source: Ints) -> tuple[int, int, int]:
    """(groups, rows of the largest, groups with more than one source)."""
    sizes = np.bincount(group, minlength=1)
    return int((sizes > 0).sum()), int(sizes.max()), _with_several(group, source)


def _with_several(group: Ints, of: Ints) -> int:
    """How many groups have rows of more than one value."""
    pairs = np.unique(np.stack([group, of]), axis=1)[0]
    return int((np.bincount(pairs, minlength=1) > 1).sum())


def held_out_leaks(table: pa.Table, hints: pa.Table) -> int:
    """Accepted rows in train or val whose group holds a row that its publisher holds out as `test`; it must be 0.

    hints: (row_id, split) as published, of the sealed `intake`.
    """
    held = hints["row_id"].filter(pc.equal(hints["split"], "test")).combine_chunks()
    group = _group_codes(table)
    is_held = flags(pc.is_in(table["row_id"], value_set=held)) & (group >= 0)
    of_held = np.zeros(int(group.max(initial=-1)) + 1, bool)
    of_held[group[is_held]] = True
    fits = accepted(table) & flags(pc.is_in(table["split"], value_set=pa.array(["train", "val"]))) & (group >= 0)
    return int(of_held[group[fits]].sum())
