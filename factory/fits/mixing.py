"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) as timm's `Mixup` in its mode `elem`, drawn row by row.

timm mixes a row with its neighbour in the batch and draws from a global generator, so another number of workers or a
resumed fit would mix otherwise. Here the other row comes from the examples, and all draws from the row's own noise.

    B rows  S side in pixels  K classes
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor
from torch.nn import functional as F

from factory.fits.objective import RowNoise

SWITCH = 0.5  # the share of rows that are cut rather than blended, where both are asked for


def mixed(
    pixels: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor, noise: RowNoise, classes: int, *,
    mixup: float, cutmix: float, smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each row with its other one: pixels (B, 3, S, S) and soft targets (B, K).

    mixup, cutmix: alpha of their beta distributions, 0 for none; smoothing: of the labels, spread over all classes.
    """
    u = noise.uniform(4).double().numpy()  # (B, 4): which, how much, centre
    cut = (u[:, 0] < SWITCH) if mixup and cutmix else np.full(len(u), bool(cutmix))
    alpha = np.where(cut, cutmix, mixup)
    share = beta.ppf(u[:, 1], alpha, alpha) if mixup or cutmix else np.ones(len(u))  # (B,), of the row itself
    side, found, kept = pixels.shape[-1], pixels.clone(), torch.ones(len(pixels), dtype=torch.float64)
    for row in range(len(u)):
        if cut[row]:
            top, bottom, left, right = box(side, share[row], u[row, 2], u[row, 3])
            found[row, :, top:bottom, left:right] = others[row, :, top:bottom, left:right]
            kept[row] = 1 - (bottom - top) * (right - left) / side**2
        else:
            found[row] = pixels[row] * share[row] + others[row] * (1 - share[row])
            kept[row] = share[row]
    weight = kept.float().unsqueeze(1).to(pixels.device)  # (B, 1)
    targets = F.one_hot(labels, classes) * weight + F.one_hot(other_labels, classes) * (1 - weight)  # (B, K)
    return found, targets * (1 - smoothing) + smoothing / classes


def box(side: int, share: float, across: float, down: float) -> tuple[int, int, int, int]:
    """The rows and columns that are cut out: a square of 1 - share of the area round (down, across), each in [0, 1) of
    the side, clipped at the edge as timm's `rand_bbox` clips it."""
    length = int(side * math.sqrt(1 - share))
    y, x = int(down * side), int(across * side)
    near = [max(0, at - length // 2) for at in (y, x)]
    far = [min(side, at + (length + 1) // 2) for at in (y, x)]
    return near[0], far[0], near[1], far[1]
