"""Whether a mask's contour lies on an edge of its image.

    contrast = median gradient on the contour / mean over the contour moved inwards and outwards of theirs

Where the contour follows the lesion's edge the gradient is larger on it than beside it; where it lies elsewhere, both
are the same skin or the same lesion and the ratio is near one. The median keeps out hairs and bubbles, which cross a
contour in few places. No segmenter is asked, so what it says of a mask does not depend on the segmenter's own faults.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from factory.images import RGB, Mask, reduced
from factory.quality.skin_tone import to_lab

Floats = NDArray[Any]

MAX_SIDE = 256  # px of the shorter side; a larger picture is reduced to it, since its details are smoothed away anyway
SHIFT = 0.05  # of the shorter side: how far inwards and outwards the contour is moved, at least MIN_SHIFT px
MIN_SHIFT = 3.0
FINEST = 1 / 128  # of the shorter side: details below are smoothed, and the contour is twice as wide, at least two px
LEAST = 0.01  # of CIE Lab a pixel: the gradient of a picture without noise
MAX_CONTRAST = 99.0


def edge_contrast(rgb: RGB, mask: Mask) -> float | None:
    """How many times larger the gradient of an image (H, W, 3) is on the contour of a mask (H, W) than on the same
    contour moved by SHIFT both ways; 0 to MAX_CONTRAST. None where there is no contour, or nothing beside it.

    The image's border is no contour.
    """
    rgb, mask = reduced(rgb, MAX_SIDE), reduced(mask, MAX_SIDE)
    if not mask.any() or mask.all():
        return None
    side = min(mask.shape)
    gradient, depth = _gradient(rgb, FINEST * side), _depth(mask)
    shift, reach = max(MIN_SHIFT, SHIFT * side), max(1.0, FINEST * side)
    inner, contour, outer = (np.abs(depth - moved) <= reach for moved in (shift, 0.0, -shift))
    beside = [float(np.median(gradient[band])) for band in (inner, outer) if band.any()]
    if not beside:
        return None
    return min(MAX_CONTRAST, float(np.median(gradient[contour])) / max(float(np.mean(beside)), LEAST))


def _gradient(rgb: RGB, sigma: float) -> Floats:
    """Its magnitude over all channels of CIE Lab, (H, W) in Lab a pixel."""
    lab = cv2.GaussianBlur(to_lab(rgb), (0, 0), sigma)
    along, across = (cv2.Sobel(lab, cv2.CV_32F, dx, 1 - dx, scale=1 / 8) for dx in (1, 0))
    return np.asarray(np.sqrt((along**2 + across**2).sum(axis=-1)))


def _depth(mask: Mask) -> Floats:
    """How deep each pixel (H, W) lies in the mask, px; negative outside, half a pixel on either side of the contour."""
    inside = mask.astype(np.uint8)
    within, without = (cv2.distanceTransform(part, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for part in (inside, 1 - inside))
    return np.where(mask, within - 0.5, 0.5 - without)
