"""Intervals: every number in a report that was measured on a sample carries one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[Any]


class Interval(NamedTuple):
    """An estimate with its confidence bounds; `num` is the number of independent observations behind it."""

    value: float
    low: float
    high: float
    num: int


def mean_interval(values: Sequence[float] | Floats, level: float = 0.95) -> Interval:
    """Mean of independent observations (seeds, folds) with Student's t. One observation has no bounds (NaN)."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"values must be finite and at least one, got {array.tolist()[:8]}; drop failed runs first.")
    mean, count = float(array.mean()), int(array.size)
    if count == 1:
        return Interval(mean, float("nan"), float("nan"), 1)
    reach = float(stats.t.ppf((1 + level) / 2, count - 1) * array.std(ddof=1) / np.sqrt(count))
    return Interval(mean, mean - reach, mean + reach, count)


def wilson(successes: int, trials: int, level: float = 0.95) -> Interval:
    """A proportion with Wilson's score interval (Wilson 1927); of no trials nothing is known (NaN in 0..1)."""
    if not 0 <= successes <= trials:
        raise ValueError(f"successes must be from 0 to trials, got {successes} of {trials}; count them again.")
    if trials == 0:
        return Interval(float("nan"), 0.0, 1.0, 0)
    z, p = float(stats.norm.ppf((1 + level) / 2)), successes / trials
    middle = (p + z**2 / (2 * trials)) / (1 + z**2 / trials)
    reach = z / (1 + z**2 / trials) * np.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    # At the ends the bounds are exact, and rounding must not put them outside.
    low = 0.0 if successes == 0 else float(middle - reach)
    high = 1.0 if successes == trials else float(middle + reach)
    return Interval(p, low, high, trials)


def auc(above: Floats, below: Floats, level: float = 0.95) -> Interval:
    """The chance that a value of `above` (M,) is larger than one of `below` (N,), ties counting half; the area under
    the ROC curve. Its interval is DeLong, DeLong & Clarke-Pearson's (1988, Biometrics 44), by ranks; `num` is M + N.
    """
    first, second = np.asarray(above, np.float64), np.asarray(below, np.float64)
    m, n = first.size, second.size
    if not m or not n:
        raise ValueError(f"both groups must hold at least one value, got {m} and {n}; leave the comparison out.")
    together = stats.rankdata(np.concatenate([first, second]))
    over = (together[:m] - stats.rankdata(first)) / n  # of each value above: the share of those below that it beats
    under = 1 - (together[m:] - stats.rankdata(second)) / m
    value = float(over.mean())
    if m == 1 or n == 1:
        return Interval(value, float("nan"), float("nan"), m + n)
    reach = float(stats.norm.ppf((1 + level) / 2) * np.sqrt(over.var(ddof=1) / m + under.var(ddof=1) / n))
    return Interval(value, max(0.0, value - reach), min(1.0, value + reach), m + n)


def bootstrap(
    statistic: Callable[..., float],
    groups: Sequence[str] | Floats,
    *arrays: Floats,
    num_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of `statistic(*arrays)` that draws whole groups: rows of one are not independent.

    `groups` and every array have one entry per row. Resamples where the statistic is NaN (a class was not drawn) are
    left out; `num` is the number of groups.
    """
    labels = np.asarray(groups)
    if not len(labels) or any(len(array) != len(labels) for array in arrays):
        sizes = [len(array) for array in arrays]
        raise ValueError(f"arrays must have one entry per group label, got {len(labels)} and {sizes}; align them.")
    _, codes = np.unique(labels, return_inverse=True)
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(num_resamples):
        rows = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        drawn.append(statistic(*(array[rows] for array in arrays)))
    kept = np.asarray(drawn)[np.isfinite(drawn)]
    value = float(statistic(*arrays))
    if not len(kept):
        return Interval(value, float("nan"), float("nan"), len(members))
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), len(members))
