"""Sampling weights that keep one large source, or one frequent diagnosis, from drowning all others.

Images are counted in cells (here: one source and one diagnosis). Tempered sampling draws a cell of n images with a
probability in proportion to n^alpha: alpha 1 leaves the data as they are, 1/2 is square-root sampling, 0 draws every
cell equally often (Mahajan et al. 2018, ECCV, for hashtags; Conneau & Lample 2019, NeurIPS, section 3.1, for
languages). A small cell would then be shown again and again, so no image is drawn more than `max_repeat` times in
expectation while as many are drawn as there are; what the cap takes from a cell goes to the others in proportion.

What weights cost is Kish's effective sample size (Kish 1965, Survey Sampling): (sum w)^2 / sum w^2, the number of
equally weighted images whose mean varies as much. Images of one patient are no independent ones, so it is an upper
bound. Letters: N rows, K cells.

    weights = sampling_weights(cells, alpha=0.5, max_repeat=8)      # (N,), one per row
    rng.choice(len(weights), size=batch_size, p=weights)            # or torch's WeightedRandomSampler
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def sampling_weights(
    cells: NDArray[Any],
    *,
    alpha: float = 0.5,
    max_repeat: float | None = None,
    classes: NDArray[Any] | None = None,
    targets: Mapping[int, float] | None = None,
) -> Floats:
    """The probability of each row at one draw, (N,), which sums to 1; rows of cell -1 are never drawn.

    cells: (N,) numbers from 0, or -1. max_repeat: the most often that one image is expected in as many draws as there
    are images; None: no cap. With `targets` each class gets its share of the draws, so far as the cap allows, and
    tempering is among the cells of a class; classes: (K,) the class of each cell. Raises ValueError where there is
    nothing to draw, or a number is out of its range.
    """
    cells = np.asarray(cells, dtype=np.int64)
    drawn = cells >= 0
    if not drawn.any():
        raise ValueError("cells must number at least one row that may be drawn, got none; choose other rows.")
    counts = np.bincount(cells[drawn])
    if targets is None:
        shares = tempered(counts, alpha)
    elif classes is None:
        raise ValueError("classes must say the class of each cell where targets are given, got none; give both.")
    else:
        shares = targeted(counts, np.asarray(classes), targets, alpha)
    if max_repeat is not None:
        shares = capped(shares, counts, max_repeat)
    each = shares / np.maximum(counts, 1)
    return np.where(drawn, each[np.maximum(cells, 0)], 0.0)


def tempered(counts: NDArray[Any], alpha: float) -> Floats:
    """The share of the draws that each cell gets, (K,), in proportion to n^alpha; an empty cell gets none."""
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be from 0 (equal cells) to 1 (as they are), got {alpha}; choose another.")
    counts = np.asarray(counts, dtype=np.float64)
    raised = np.where(counts > 0, np.power(np.maximum(counts, 1.0), alpha), 0.0)
    return np.asarray(raised / raised.sum())


def targeted(counts: NDArray[Any], classes: NDArray[Any], targets: Mapping[int, float], alpha: float) -> Floats:
    """The share of each cell, (K,): each class its target, shared among its cells in proportion to n^alpha.

    Targets need not sum to 1; a class without a target, or without an image, gets nothing.
    """
    within = np.power(np.maximum(np.asarray(counts, dtype=np.float64), 1.0), alpha) * (np.asarray(counts) > 0)
    shares = np.zeros(len(within))
    for name, target in targets.items():
        if not (np.isfinite(target) and target >= 0):
            raise ValueError(f"targets must be shares of 0 or more, got {target} for class {name}; correct it.")
        members = (classes == name) & (within > 0)
        if members.any():
            shares[members] = target * within[members] / within[members].sum()
    if not shares.sum() > 0:
        raise ValueError("targets must name a class that has images, got none; name classes of these cells.")
    tempered(np.ones(1), alpha)  # the same range holds
    return shares / shares.sum()


def capped(shares: Floats, counts: NDArray[Any], max_repeat: float) -> Floats:
    """The shares with none above `max_repeat` draws per image, (K,): min(limit, c x share) with the c that sums to 1.

    Raises ValueError where the cells with a share are too few images to fill all draws under the cap.
    """
    counts = np.asarray(counts, dtype=np.float64)
    limits = max_repeat * counts / counts.sum()
    some = np.flatnonzero(shares > 0)
    least = counts.sum() / counts[some].sum()
    if not max_repeat >= least:
        raise ValueError(
            f"max_repeat must be at least {least:.4g} (images / images with a share), got {max_repeat}; raise it."
        )
    order = some[np.argsort(limits[some] / shares[some], kind="stable")]  # the first to reach their limit first
    full = np.concatenate([[0.0], np.cumsum(limits[order])[:-1]])  # mass of those before, at their limit
    open_ = shares[order][::-1].cumsum()[::-1]  # share of this one and those after
    factor = (1.0 - full) / open_
    reached = factor * shares[order] > limits[order] * (1 + 1e-12)
    first_free = int(np.argmin(reached)) if not reached.all() else len(order) - 1
    return np.minimum(limits, factor[first_free] * shares)


def effective_size(weights: NDArray[Any]) -> float:
    """Kish's effective sample size of weights (N,) >= 0; 0 where all are 0. Of shares (S,), it is the effective number
    of sources: Hill's number of order 2 (Hill 1973, Ecology 54), the inverse of Simpson's index."""
    weights = np.asarray(weights, dtype=np.float64)
    squares = float(np.square(weights).sum())
    return float(weights.sum()) ** 2 / squares if squares else 0.0
