"""theta by size, fitted on pairs whose truth is known.

The rule: within each stratum of size, the overlap at which the smaller of precision and recall is largest; of several,
the one in the middle of the widest run. Strata are thirds of the masks' areas.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

STRATA = 3
GRID = np.round(np.arange(0.2, 0.9501, 0.005), 3)


def fit_thresholds(overlaps: ArrayLike, good: ArrayLike, areas: ArrayLike) -> list[list[float]]:
    """[largest area, theta] by stratum, as `gate.theta_by_area` takes it.

    overlaps (N,) as the gate measures them, good (N,) bool, areas (N,) of the masks it was shown, as shares of the
    image. A stratum without good or without bad pairs is a ValueError.
    """
    overlap, right, area = np.asarray(overlaps, float), np.asarray(good, bool), np.asarray(areas, float)
    edges = np.quantile(area, np.arange(1, STRATA + 1) / STRATA, method="inverted_cdf")
    stratum = np.searchsorted(edges[:-1], area)
    found = []
    for number, edge in enumerate(edges):
        inside = stratum == number
        if not right[inside].any() or right[inside].all():
            raise ValueError(
                f"every third of sizes must have good and bad pairs, got {int(right[inside].sum())} good of "
                f"{int(inside.sum())} up to an area of {edge:.3f}; plant more."
            )
        found.append([round(float(edge), 4), _theta(overlap[inside], right[inside])])
    return found


def _theta(overlap: np.ndarray, good: np.ndarray) -> float:
    accepted = overlap[None] >= GRID[:, None]  # (G, N)
    hits = (accepted & good).sum(1)
    worse = np.minimum(hits / np.maximum(accepted.sum(1), 1), hits / good.sum())
    best = np.flatnonzero(worse >= worse.max() - 1e-12)
    run = max(np.split(best, np.flatnonzero(np.diff(best) > 1) + 1), key=len)
    return float(GRID[run[len(run) // 2]])
