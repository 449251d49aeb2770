"""Skin tone, each scale by itself: what publishers state, and the typology angle (ITA) that we measure.

No scale is turned into another: Fitzpatrick types say how skin burns, DDI's groups are pairs of them, MILK10k's go from
dark to light, and the angle is a colour under light that nobody calibrated (Groh et al. 2021). Where both a stated type
and an angle are there, they stand beside each other in a table of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from factory import taxonomy
from factory.release.corpus.composition import published_skin
from factory.release.corpus.crosstab import (
    NOT_STATED,
    Coded,
    CrossTable,
    Flags,
    accepted,
    coded,
    crosstab,
    numbers,
    sources,
)

SCALE_NAMES: dict[str, str] = {
    "fst": "Fitzpatrick type", "ddi": "DDI group (12: I and II, 34: III and IV, 56: V and VI)",
    "milk10k": "MILK10k class (0 dark to 5 light)", "ita": "ITA band", NOT_STATED: "scale not stated",
}  # fmt: skip
NO_ANGLE = "no angle"  # too little skin is seen, or its light is too blue


@dataclass(frozen=True)
class SkinScale:
    """Accepted rows by source and skin type, of one scale and one origin of its values (expert, annotators, phantom).

    `angles` lays the measured angle's bands beside the types; `quartiles` are the angle's in degrees by type, of the
    rows that have one.
    """

    scale: str
    origin: str
    by_source: CrossTable
    angles: CrossTable
    quartiles: tuple[tuple[float, float, float] | None, ...]


@dataclass(frozen=True)
class SkinTone:
    """coverage: accepted rows by source and by what is known; ita: by source and band of the measured angle."""

    coverage: CrossTable
    scales: tuple[SkinScale, ...]
    ita: CrossTable
    ita_quartiles: tuple[tuple[float, float, float] | None, ...]


def skin_tone(table: pa.Table) -> SkinTone:
    """Skin types as stated and angles as measured, of the accepted rows."""
    of, kept, stated = sources(table), accepted(table), published_skin(table)
    scale, origin = coded(table["skin_type_scale"], taxonomy.SKIN_TYPE_SCALES), coded(table["skin_type_source"])
    band, degrees = bands(table), numbers(table["ita"])
    pairs = np.unique(np.stack([scale.codes, origin.codes])[:, kept & stated], axis=1).T.tolist()
    found = [
        _scale(table, of, band, degrees, scale.words[s], origin.words[o],
               kept & stated & (scale.codes == s) & (origin.codes == o))
        for s, o in pairs
    ]  # fmt: skip
    return SkinTone(
        _coverage(of, kept, stated, scale, origin, pairs, band),
        tuple(found),
        crosstab(of, band, kept, keep=band.words),
        _quartiles(degrees, of, kept),
    )


def bands(table: pa.Table) -> Coded:
    """The band (I to VI) of each measured angle, by the bounds of `taxonomy.skin_type_of_ita`."""
    degrees = numbers(table["ita"])
    band = (degrees[:, None] <= np.array(taxonomy.ITA_BOUNDS)).sum(axis=1)
    return Coded(np.where(np.isnan(degrees), len(taxonomy.SKIN_TYPES), band), (*taxonomy.SKIN_TYPES, NO_ANGLE))


def band_bounds() -> tuple[str, ...]:
    """The bands in degrees, as the page writes them: `> 55`, `41 to 55`, ..., `at most -30`."""
    bounds = [f"{bound:g}" for bound in taxonomy.ITA_BOUNDS]
    return (f"> {bounds[0]}", *(f"{low} to {high}" for high, low in pairwise(bounds)), f"≤ {bounds[-1]}")


def _scale(
    table: pa.Table, of: Coded, band: Coded, degrees: np.ndarray, scale: str, origin: str, where: Flags
) -> SkinScale:
    order = taxonomy.SKIN_TYPE_WORDS.get(scale, ())
    chosen = table.select(["skin_type"]).filter(pa.array(where))
    types = coded(chosen["skin_type"], order, keep=True)
    by_source = crosstab(Coded(of.codes[where], of.words), types, keep=order)
    there = [i for i, n in enumerate(by_source.row_totals) if n]
    by_source = CrossTable(
        tuple(by_source.rows[i] for i in there), by_source.columns, tuple(by_source.counts[i] for i in there)
    )
    angles = crosstab(types, Coded(band.codes[where], band.words), keep=band.words)
    return SkinScale(scale, origin, by_source, angles, _quartiles(degrees[where], types))


def _quartiles(
    degrees: np.ndarray, by: Coded, where: Flags | None = None
) -> tuple[tuple[float, float, float] | None, ...]:
    """Lower quartile, median and upper quartile of the angle by word; None where no row has one."""
    usable = ~np.isnan(degrees) if where is None else ~np.isnan(degrees) & where
    values, codes = degrees[usable], by.codes[usable]
    order = np.argsort(codes, kind="stable")
    parts = np.split(values[order], np.cumsum(np.bincount(codes, minlength=len(by.words)))[:-1])
    return tuple(
        tuple(round(float(q), 1) for q in np.quantile(part, (0.25, 0.5, 0.75))) if len(part) else None  # type: ignore[misc]
        for part in parts
    )


def _coverage(
    of: Coded, kept: Flags, stated: Flags, scale: Coded, origin: Coded, pairs: list[list[int]], band: Coded
) -> CrossTable:
    """By source: each scale and origin that is stated, else a measured angle alone, else nothing."""
    names = tuple(f"{SCALE_NAMES.get(scale.words[s], scale.words[s])}, {origin.words[o]}" for s, o in pairs)
    which = np.where(band.codes == len(taxonomy.SKIN_TYPES), len(names) + 1, len(names))
    for i, (s, o) in enumerate(pairs):
        which[stated & (scale.codes == s) & (origin.codes == o)] = i
    words = (*names, "measured ITA alone", "nothing")
    return crosstab(of, Coded(which, words), kept, keep=words)
