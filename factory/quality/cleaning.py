"""A sampled mask as a lesion is drawn by hand: one piece, without pinholes (SkinDualGen's post-processing).

The stage that stores samples is where it belongs, on the masks that leave the gate: a gate must judge what was sampled,
since pieces and holes are what it is to find, and the sampled mask stays beside the cleaned one.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from factory.images import Mask

THRESHOLD, MAX_HOLE = 0.5, 0.01


def cleaned(probability: NDArray[np.float32], threshold: float = THRESHOLD, max_hole: float = MAX_HOLE) -> Mask:
    """Mask probability (H, W) -> mask (H, W): above the threshold, the largest piece alone, its small holes filled.

    Pieces are 8-connected, of equal ones the uppermost stays. A hole is filled up to max_hole of the piece's area
    (SkinDualGen's abstract gives none; 1 % is derived); what is open to the border is no hole. Empty stays empty.
    """
    piece = _largest(probability > threshold)
    count, labels, stats, _ = cv2.connectedComponentsWithStats((~piece).astype(np.uint8), connectivity=4)
    outside = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    holes = np.setdiff1d(np.arange(1, count), outside)
    small = holes[stats[holes, cv2.CC_STAT_AREA] <= max_hole * int(piece.sum())]
    return np.asarray(piece | np.isin(labels, small))


def _largest(mask: Mask) -> Mask:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count == 1:
        return mask
    return np.asarray(labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()))
