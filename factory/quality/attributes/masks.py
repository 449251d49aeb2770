"""A lesion's mask where there is none, by colour alone, and how far it can be believed."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from factory.images import RGB, Mask, resized
from factory.quality.skin_tone import to_lab, vignette_mask, without_hair

Floats = NDArray[Any]

_SIDE = 128  # px of the shorter side that a mask is found at
# Lab units; share of the threshold that is kept, as observers draw around the fade
_FAR, _SLACK = 30.0, 0.75


def estimate_mask(rgb: RGB) -> Mask:
    """The lesion of an image without a mask, (H, W): a baseline by colour, not a trained segmenter.

    Distance in Lab from the skin at the borders, smoothed, cut by Otsu's threshold; the component that is largest
    and most central, its holes filled. The vignette and hair are left out. Empty where nothing stands out.
    """
    return estimated(rgb)[0]


def estimated(rgb: RGB) -> tuple[Mask, float]:
    """`estimate_mask` and its confidence, 0..1.

    The confidence is Otsu's separability (Otsu 1979, eta): the variance between the mask and the rest over the
    total variance, of the smoothed colour distance from the skin. 0 where nothing was found, and at most 0.75
    for values that are spread evenly: only what is above that speaks of an edge.
    """
    height, width = rgb.shape[:2]
    scale = _SIDE / min(height, width)
    small = resized(rgb, max(32, round(width * scale)), max(32, round(height * scale)))
    distance, usable = _distance(small)
    if not usable.any():
        return np.zeros((height, width), bool), 0.0
    found = _central_piece(distance, _SLACK * _otsu(distance[usable]))
    full = cv2.resize(found.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR) >= 0.5
    return np.asarray(full), separability(distance[usable], found[usable])


def separability(values: Floats, inside: Mask) -> float:
    """Variance between two classes over the total variance (Otsu 1979), 0..1; 0 where either class is empty."""
    share, total = float(inside.mean()), float(values.var())
    if not 0 < share < 1 or total <= 0:
        return 0.0
    gap = float(values[inside].mean() - values[~inside].mean())
    return min(1.0, share * (1 - share) * gap**2 / total)


def _distance(rgb: RGB) -> tuple[Floats, Mask]:
    """Colour distance from the skin at the borders, (H, W), and where it can be told."""
    lab = cv2.GaussianBlur(to_lab(without_hair(rgb)), (0, 0), 2.0)
    # Stickers and ink are green, blue or orange as no skin and no lesion is.
    usable = ~vignette_mask(rgb) & (lab[..., 1] > -3) & (lab[..., 2] > -18)
    edge = np.ones(usable.shape, bool)
    margin = max(2, round(0.08 * min(usable.shape)))
    edge[margin:-margin, margin:-margin] = False
    band = lab[edge & usable] if (edge & usable).sum() >= 32 else lab[usable]
    if not len(band):
        return np.zeros(usable.shape, np.float32), np.zeros(usable.shape, bool)
    skin = np.median(band, axis=0)
    usable &= lab[..., 2] < skin[2] + 32
    away = (lab - skin) * np.asarray([1.0, 1.0, 0.7], np.float32)
    distance = np.sqrt(np.einsum("hwc,hwc->hw", away, away))
    # Far is far: one black or white spot must not raise the threshold above the rest of the lesion.
    return np.where(usable, np.minimum(distance, _FAR), 0.0), usable


def _central_piece(distance: Floats, threshold: float) -> Mask:
    """The component above the threshold with the largest sum of closeness to the middle."""
    over = cv2.morphologyEx((distance > threshold).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, labels = cv2.connectedComponents(over, connectivity=8)
    if count < 2:
        return np.zeros(over.shape, bool)
    y, x = (np.linspace(-1, 1, n) for n in over.shape)
    closeness = np.exp(-4.0 * (y[:, None] ** 2 + x[None] ** 2))
    weight = ndimage.sum_labels(closeness * distance, labels, np.arange(1, count))
    return np.asarray(ndimage.binary_fill_holes(labels == 1 + int(np.argmax(weight))))


def _otsu(values: Floats) -> float:
    top = float(values.max()) or 1.0
    scaled = np.clip(values / top * 255, 0, 255).astype(np.uint8)
    cut, _ = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    return float(cut) / 255 * top
