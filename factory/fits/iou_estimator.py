"""The estimator of the true IoU, fitted on planted faults: phantoms that the segmenter has not seen, as other cameras
and skins would show them, with masks of every fault and strength (`quality/faults.py`).

What it says is right on average for such a mix of right and wrong masks.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from factory import phantom
from factory.fits.disturbed import disturbed
from factory.models.estimator import IouEstimator
from factory.quality.faults import MIX, cases_of, plant
from factory.quality.overlap import agreement

SEED = 1401  # of phantoms that no other fit draws
BATCH, STEPS, LEARNING_RATE, WEIGHT_DECAY = 256, 1500, 5e-3, 1e-3
ROWS = 16  # pictures at once

Find = Callable[[np.ndarray], np.ndarray]


def agreements(find: Find, count: int, size: int, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
    """Of `count` pairs (count, 5) as `agreement` has it, and their true IoU (count,). find: pictures (N, H, W, 3) uint8
    to the probability of a lesion (N, H, W)."""
    cases = cases_of(MIX, seed, count)
    found, true = [], []
    for start in range(0, count, ROWS):
        pairs = [plant(seed, k, *cases[k], size, 0.0, phantom.DEFAULT) for k in range(start, min(count, start + ROWS))]
        pictures = [disturbed(pair.image, np.random.default_rng([seed, start + k, 5])) for k, pair in enumerate(pairs)]
        found.append(agreement(find(np.stack(pictures)), np.stack([pair.mask for pair in pairs])))
        true += [pair.true_iou for pair in pairs]
    return np.concatenate(found), np.array(true)


def fit_estimator(agreements: np.ndarray, true: np.ndarray, seed: int = 0) -> IouEstimator:
    """By cross-entropy with the true IoU (N,), of which the mean is what is least surprised."""
    rows, wanted = torch.from_numpy(agreements).float(), torch.from_numpy(true).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = IouEstimator()
        optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            chosen = torch.randint(len(rows), (BATCH,))
            loss = F.binary_cross_entropy_with_logits(model(rows[chosen]), wanted[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.double().eval()
