"""Table 1: each dataset's images by label and resolution, what every filter takes from it, and the filter of size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from factory import taxonomy
from factory.records import ACCEPTED, FAILED
from factory.release.corpus.crosstab import (
    Coded,
    CrossTable,
    Flags,
    Ints,
    accepted,
    coded,
    counted,
    crosstab,
    flags,
    labels,
    nested,
    numbers,
    sources,
)  # fmt: skip

# In the order they work: a row that would fall to several falls to the first. `too_small` and the copies are reasons
# of rejection; `other` holds any reason that is not known here.
FILTERS: dict[str, str] = {
    "excluded_label": "label excluded by the policy",
    "failed": "missing or unreadable",
    "too_small": "short side too small",
    "exact_duplicate": "equal pixels",
    "published_duplicate": "published as a repeat",
    "near_duplicate": "copy of another photograph",
    "other": "other reasons",
}
THRESHOLDS = (64, 96, 112, 128, 256)  # px of the short side


@dataclass(frozen=True)
class Labels:
    """Rows by what the label policy makes of their label, in the order of crosstab.LABELS."""

    benign: int
    malignant: int
    not_stated: int

    @property
    def total(self) -> int:
        return self.benign + self.malignant + self.not_stated


@dataclass(frozen=True)
class Filter:
    """What one filter takes from a dataset, and what is left after it."""

    name: str
    lost: Labels
    left: Labels


@dataclass(frozen=True)
class Sizes:
    """Published sizes as (width, height) px, ordered by their number of pixels; the median is an image's own (the lower
    of two). short: smallest, median and largest short side. `known` rows were decoded, in `distinct` sizes."""

    known: int
    distinct: int
    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]
    short: tuple[int, int, int]


@dataclass(frozen=True)
class Dataset:
    """One row of Table 1. `filters` are in the order of FILTERS; splits are of accepted rows."""

    source: str
    title: str
    modality: str
    listed: Labels
    filters: tuple[Filter, ...]
    accepted: Labels
    sizes: Sizes | None
    splits: dict[str, int]

    def lost(self, name: str) -> int:
        """Rows that one filter takes."""
        return sum(f.lost.total for f in self.filters if f.name == name)


@dataclass(frozen=True)
class Threshold:
    """What a least short side of `side` px would drop: rows by label, of those whose size is known, and by source."""

    side: int
    dropped: Labels
    by_source: tuple[int, ...]


@dataclass(frozen=True)
class SizeFilter:
    """The filter of size at several thresholds. min_side: the one in force, None where it is not recorded; known: rows
    of known size by source; unknown: rows that were excluded or failed before their size was seen."""

    min_side: int | None
    sources: tuple[str, ...]
    known: tuple[int, ...]
    unknown: tuple[int, ...]
    short: tuple[tuple[int, int, int] | None, ...]
    thresholds: tuple[Threshold, ...]

    def at(self, side: int) -> Threshold:
        return next(t for t in self.thresholds if t.side == side)


def datasets(table: pa.Table, titles: dict[str, str]) -> tuple[Dataset, ...]:
    """Table 1, a row per source by name; `titles` names what it can."""
    of, label, fell = sources(table), labels(table), _filter_of(table)
    listed, kept = counted(of, label), accepted(table)
    lost = np.stack([counted(of, label, fell == f) for f in range(len(FILTERS))])  # (F, S, 3)
    left = listed[None] - lost.cumsum(axis=0)
    modality = crosstab(of, coded(table["modality"], taxonomy.MODALITIES))
    split = counted(of, coded(table["split"], taxonomy.SPLITS, keep=True), kept)
    sizes = _sizes(table, of)
    return tuple(
        Dataset(
            source=name,
            title=titles.get(name, name),
            modality=", ".join(m for m, n in zip(modality.columns, modality.counts[s], strict=True) if n),
            listed=_labels(listed[s]),
            filters=tuple(
                Filter(filter_, _labels(lost[f, s]), _labels(left[f, s])) for f, filter_ in enumerate(FILTERS)
            ),
            accepted=_labels(left[-1, s]),
            sizes=sizes[s],
            splits=dict(zip(taxonomy.SPLITS, split[s].tolist(), strict=False)),
        )
        for s, name in enumerate(of.words)
    )


def total(table: pa.Table) -> Dataset:
    """All datasets as one row of Table 1."""
    one = pa.array(["all"], pa.string()).take(pa.array(np.zeros(table.num_rows, np.int64)))
    together = table.set_column(table.schema.get_field_index("source"), "source", pa.chunked_array([one]))
    return datasets(together, {"all": "All datasets"})[0]


def _filter_of(table: pa.Table) -> Ints:
    """The filter that a row fell to, by its place in FILTERS; -1 for an accepted row. (N,)."""
    reason = coded(table["reason"], null="")
    place = {name: i for i, name in enumerate(FILTERS)}
    known = np.array([place.get(word, place["other"]) for word in reason.words], dtype=np.int64)
    fell = np.where(flags(pc.equal(table["outcome"], FAILED)), place["failed"], known[reason.codes])
    return np.where(flags(pc.equal(table["outcome"], ACCEPTED)), -1, fell)


def failures(table: pa.Table) -> CrossTable:
    """Why rows failed, by source."""
    return crosstab(sources(table), coded(table["reason"]), flags(pc.equal(table["outcome"], FAILED)))


def other_reasons(table: pa.Table) -> CrossTable:
    """Reasons of rejection that are not filters known here, by source."""
    return crosstab(sources(table), coded(table["reason"]), _filter_of(table) == list(FILTERS).index("other"))


def _labels(counts: Ints) -> Labels:
    return Labels(*(int(n) for n in counts))


# ------------------------------------------------------------------------------------------------------- sizes


def _known(table: pa.Table) -> Flags:
    return flags(pc.and_(pc.is_valid(table["source_width"]), pc.is_valid(table["source_height"])))


def _sizes(table: pa.Table, of: Coded) -> list[Sizes | None]:
    """Published sizes per source; None where none is known."""
    known = _known(table)
    width, height = (numbers(table[f"source_{side}"])[known].astype(np.int64) for side in ("width", "height"))
    codes, short = of.codes[known], np.minimum(width, height)
    by_area = np.lexsort((height, width, width * height, codes))
    by_short = np.lexsort((short, codes))
    starts = np.concatenate([[0], np.cumsum(np.bincount(codes, minlength=len(of.words)))])
    pairs = np.unique(np.stack([codes, width, height]), axis=1)[0]
    distinct = np.bincount(pairs, minlength=len(of.words))
    found: list[Sizes | None] = []
    for s in range(len(of.words)):
        first, last = int(starts[s]), int(starts[s + 1]) - 1
        if last < first:
            found.append(None)
            continue
        ends = [first, (first + last) // 2, last]
        least, median, most = ((int(width[i]), int(height[i])) for i in by_area[ends])
        low, middle, high = (int(v) for v in short[by_short[ends]])
        found.append(Sizes(last - first + 1, int(distinct[s]), least, median, most, (low, middle, high)))
    return found


def size_filter(table: pa.Table, min_side: int | None, thresholds: Sequence[int] = THRESHOLDS) -> SizeFilter:
    """What thresholds of the short side would drop, from the sizes of rows that were dropped and of those that stayed.

    Copies are counted too, as the filter of size comes before theirs.
    """
    of, label, known = sources(table), labels(table), _known(table)
    short = np.minimum(numbers(table["source_width"]), numbers(table["source_height"]))  # NaN where not known
    found = []
    for side in sorted({*thresholds, *([] if min_side is None else [min_side])}):
        dropped = counted(of, label, known & (short < side))  # (S, 3)
        found.append(Threshold(side, _labels(dropped.sum(axis=0)), tuple(dropped.sum(axis=1).tolist())))
    sizes = _sizes(table, of)
    seen = nested(counted(of, Coded(known.astype(np.int64), ("unknown", "known"))))
    return SizeFilter(
        min_side, of.words, tuple(k for _, k in seen), tuple(u for u, _ in seen),
        tuple(None if s is None else s.short for s in sizes), tuple(found),
    )  # fmt: skip
