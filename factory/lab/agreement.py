"""How far raters agree: Krippendorff's alpha with a bootstrap interval, and the share of units where two are equal.

Alpha is 1 - D_o / D_e, observed over expected disagreement, for any number of raters with values missing
(Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"): 1 is perfect agreement, 0 what chance gives, and
below 0 raters that contradict each other. Units with fewer than two ratings say nothing and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from factory.lab.intervals import proportion

Floats = NDArray[np.float64]

LEVELS: tuple[str, ...] = ("nominal", "ordinal", "interval")
NUM_RESAMPLES = 2000


class Alpha(NamedTuple):
    """Krippendorff's alpha with its percentile bootstrap interval; NaN where it is not defined.

    num_units: units with two ratings and more. num_ratings: the ratings in them. num_groups: what was resampled.
    """

    value: float
    low: float
    high: float
    num_units: int
    num_ratings: int
    num_groups: int

    def as_json(self) -> dict[str, float | int | None]:
        """The same with None for NaN, which JSON has no word for."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in self._asdict().items()
        }


def alpha(ratings: Sequence[Sequence[float]] | Floats, level: str) -> float:
    """Krippendorff's alpha of ratings (raters, units), NaN where a rating is missing.

    level: `nominal`, `ordinal` (values are ranks, in their numerical order) or `interval`. NaN if no unit has two
    ratings, or if all ratings are one value: then there is no disagreement that chance could have made. Raises
    ValueError for another level, an infinite rating, or a table that is not one.
    """
    counts, values = _counted(ratings, level)
    return _alpha(counts, values, level, np.ones(len(counts)))


def alpha_interval(
    ratings: Sequence[Sequence[float]] | Floats,
    level: str,
    groups: Sequence[str] | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Alpha:
    """Alpha with a percentile bootstrap over units, or over `groups` of units (one label per unit) drawn whole.

    Groups are for units that are not independent, such as several captions of one image. Resamples in which alpha is
    not defined are left out. Errors as in `alpha`.
    """
    counts, values = _counted(ratings, level)
    labels = np.arange(len(counts)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(labels) != len(counts):
        raise ValueError(f"groups must have one label per unit, got {len(labels)} for {len(counts)} units; align them.")
    paired = counts.sum(axis=1) >= 2
    counts, labels = counts[paired], np.unique(labels[paired], return_inverse=True)[1]
    num_groups = int(labels.max()) + 1 if len(labels) else 0
    value = _alpha(counts, values, level, np.ones(len(counts)))
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(num_resamples if num_groups > 1 and not math.isnan(value) else 0):
        times = np.bincount(rng.integers(0, num_groups, num_groups), minlength=num_groups)
        drawn.append(_alpha(counts, values, level, times[labels]))
    kept = np.array([one for one in drawn if not math.isnan(one)])
    tail = (1 - confidence) / 2
    low, high = np.quantile(kept, [tail, 1 - tail]) if len(kept) else (math.nan, math.nan)
    return Alpha(value, float(low), float(high), len(counts), int(counts.sum()), num_groups)


def pairwise_agreement(
    ratings: Sequence[Sequence[float]] | Floats, raters: Sequence[str], within: float = 0.0
) -> list[dict[str, Any]]:
    """For each two raters, the share of the units both rated in which they differ by at most `within`.

    ratings: (raters, units), NaN where missing. Each share has its Wilson interval (see `intervals.proportion`).
    """
    table = _table(ratings)
    if len(raters) != len(table):
        raise ValueError(f"raters must have one name per row, got {len(raters)} for {len(table)} rows; align them.")
    found = []
    for first, second in combinations(range(len(table)), 2):
        apart = np.abs(table[first] - table[second])
        both = apart[~np.isnan(apart)]
        found.append({"raters": [raters[first], raters[second]], **proportion(int((both <= within).sum()), len(both))})
    return found


def _table(ratings: Sequence[Sequence[float]] | Floats) -> Floats:
    table = np.asarray(ratings, dtype=np.float64)
    if table.ndim != 2 or np.isinf(table).any():
        raise ValueError(
            f"ratings must be finite numbers (raters, units) with NaN where missing, got shape {table.shape}; "
            "give one row per rater."
        )
    return table


def _counted(ratings: Sequence[Sequence[float]] | Floats, level: str) -> tuple[Floats, Floats]:
    """How often each unit got each value, (units, values), and the values (values,) in order."""
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}; choose how values compare.")
    table = _table(ratings)
    values = np.unique(table[~np.isnan(table)])
    return (table.T[:, :, None] == values).sum(axis=1).astype(np.float64), values


def _alpha(counts: Floats, values: Floats, level: str, times: NDArray[Any]) -> float:
    """Alpha of counts (units, values), each unit taken `times` (units,) as often."""
    rated = counts.sum(axis=1)
    weights = np.where(rated >= 2, times / np.maximum(rated - 1, 1), 0.0)
    weighted = counts * weights[:, None]
    coincidences = weighted.T @ counts - np.diag(weighted.sum(axis=0))  # (values, values): pairs within units
    totals = coincidences.sum(axis=0)  # n_c, the pairable ratings of each value
    distances = _distances(totals, values, level)
    expected = float(totals @ distances @ totals)
    if expected <= 0:
        return math.nan
    return 1 - (float(totals.sum()) - 1) * float((coincidences * distances).sum()) / expected


def _distances(totals: Floats, values: Floats, level: str) -> Floats:
    """The squared difference of each two values (values, values), Krippendorff's delta^2 for a level."""
    if level == "nominal":
        return 1.0 - np.eye(len(values))
    if level == "interval":
        return np.square(values[:, None] - values[None, :])
    # Ordinal: the ratings from one value to the other, half of those at either end. With middles of the ranks,
    # sum over g = c..k of n_g, less (n_c + n_k) / 2, is the difference of two middles.
    middles = np.cumsum(totals) - totals / 2
    return np.square(middles[:, None] - middles[None, :])
