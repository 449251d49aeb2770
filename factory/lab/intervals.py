"""Intervals of the experiments, all at 95 %: proportions, the mean of two of them, and repeated cross-validation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from factory.quality.statistics import wilson


def proportion(successes: int, trials: int) -> dict[str, float | int | None]:
    """A proportion with its Wilson interval; its value is null and its interval (0, 1) without trials."""
    found = wilson(successes, trials)
    value = found.value if trials else None
    return {"value": value, "low": found.low, "high": found.high, "successes": successes, "trials": trials}


def mean_of_two(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    """Interval of the mean of two independent proportions, each (successes, trials), from their Wilson intervals.

    Newcombe's square-and-add (1998, Statistics in Medicine 17), for half the sum instead of the difference.
    """
    shares = [successes / trials if trials else 0.5 for successes, trials in (first, second)]
    bounds = [wilson(*first), wilson(*second)]
    below = math.hypot(*(share - bound.low for share, bound in zip(shares, bounds, strict=True)))
    above = math.hypot(*(bound.high - share for share, bound in zip(shares, bounds, strict=True)))
    centre = sum(shares) / 2
    return centre - below / 2, centre + above / 2


def cross_validated(values: Sequence[float], folds: int, bounds: tuple[float, float]) -> dict[str, float | int | None]:
    """Mean over repeated k-fold results with two t-intervals, cut at the `bounds` that no value can pass.

    low, high: variance inflated by (1/n + 1/(folds - 1)) in place of 1/n, because folds share their training rows
    (Nadeau & Bengio 2003, Machine Learning 52; Bouckaert & Frank 2004). plain_low, plain_high: as if the n results
    were independent, which they are not. Null where fewer than two results leave no spread.
    """
    n = len(values)
    mean = float(np.mean(values)) if n else None
    if n < 2 or mean is None:
        return {"mean": mean, "n": n, "low": None, "high": None, "plain_low": None, "plain_high": None}
    deviation, t = float(np.std(values, ddof=1)), float(stats.t.ppf(0.975, n - 1))
    wide, plain = t * deviation * math.sqrt(1 / n + 1 / (folds - 1)), t * deviation / math.sqrt(n)
    least, most = bounds
    return {
        "mean": mean, "n": n, "low": max(least, mean - wide), "high": min(most, mean + wide),
        "plain_low": max(least, mean - plain), "plain_high": min(most, mean + plain),
    }  # fmt: skip


def over_seeds(values: Sequence[float], bounds: tuple[float, float]) -> dict[str, float | int | None]:
    """Mean over seeds with its t-interval, cut at the `bounds` that no value can pass; null for fewer than two."""
    n = len(values)
    mean = float(np.mean(values)) if n else None
    if n < 2 or mean is None:
        return {"mean": mean, "n": n, "low": None, "high": None}
    half = float(stats.t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return {"mean": mean, "n": n, "low": max(bounds[0], mean - half), "high": min(bounds[1], mean + half)}
