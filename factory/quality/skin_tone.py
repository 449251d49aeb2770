"""Skin around a lesion: where it can be seen, its colour, and its individual typology angle.

    ITA = atan2(L* - 50, b*) in degrees, over skin that no lesion, hair, glare or vignette covers

Chardon et al. 1991; the bands are `taxonomy.ITA_BOUNDS`. Dermoscopic light is not calibrated and the angle agrees
only roughly with a Fitzpatrick type (Groh et al. 2021), so a type found here is stored with scale `ita`.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from factory import taxonomy
from factory.images import RGB, Mask, brightest

Floats = NDArray[Any]

_MIN_PIXELS = 64  # fewer visible skin pixels give no angle
_DARK, _BRIGHT = 38, 246  # grey levels of a vignette and of glare
_LEAST_YELLOW = 3.0  # b* of skin; less than this is blue light, and says nothing of the skin


def to_lab(rgb: RGB) -> Floats:
    """CIE Lab (D65) of sRGB pixels, (H, W, 3) float32: L 0..100."""
    return cv2.cvtColor(np.ascontiguousarray(rgb).astype(np.float32) / 255.0, cv2.COLOR_RGB2Lab)


def hair_mask(rgb: RGB) -> Mask:
    """Thin dark strands, (H, W): a black top-hat of the brightness, as in DullRazor (Lee et al. 1997).

    Long components only, so that globules and follicles stay; crossing strands are one component that fills little of
    its box.
    """
    value = brightest(rgb)
    side = min(value.shape)
    width = max(5, round(side / 18) | 1)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    strands = (cv2.morphologyEx(value, cv2.MORPH_BLACKHAT, kernel) > 24).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(strands, connectivity=8)
    box = stats[:, cv2.CC_STAT_WIDTH : cv2.CC_STAT_HEIGHT + 1]
    length = np.hypot(box[:, 0], box[:, 1])
    area = stats[:, cv2.CC_STAT_AREA]
    long = (length > side / 6) & ((area < length * width * 0.8) | (area < 0.35 * box.prod(axis=1)))
    long[0] = False
    found = long[labels].astype(np.uint8)
    return np.asarray(cv2.dilate(found, np.ones((3, 3), np.uint8)) > 0) if count > 1 else np.zeros(value.shape, bool)


def without_hair(rgb: RGB, hair: Mask | None = None) -> RGB:
    """The image with its strands replaced by the median of their neighbourhood.

    hair: that of `hair_mask`, where it is known already.
    """
    hair = hair_mask(rgb) if hair is None else hair
    if not hair.any():
        return rgb
    window = max(5, round(min(hair.shape) / 10) | 1)
    filled = rgb.copy()
    filled[hair] = cv2.medianBlur(rgb, window)[hair]
    return filled


def vignette_mask(rgb: RGB) -> Mask:
    """The dark tube around the view, (H, W): dark pixels connected to a corner, with a small margin."""
    dark = brightest(np.asarray(cv2.medianBlur(rgb, 5), np.uint8)) < _DARK
    return from_corners(dark, max(3, round(min(dark.shape) / 24) | 1))


def from_corners(dark: Mask, margin: int) -> Mask:
    """What of the dark (H, W) is connected to a corner of the picture, grown by a square of `margin` px, odd."""
    _, labels = cv2.connectedComponents(dark.astype(np.uint8), connectivity=4)
    corners = {int(labels[y, x]) for y in (0, -1) for x in (0, -1)} - {0}
    if not corners:
        return np.zeros(dark.shape, bool)
    found = np.isin(labels, list(corners)).astype(np.uint8)
    return np.asarray(cv2.dilate(found, np.ones((margin, margin), np.uint8)) > 0)


def skin_mask(rgb: RGB, mask: Mask, vignette: Mask | None = None, hair: Mask | None = None) -> Mask:
    """Where bare skin is seen, (H, W): a ring around the lesion, or all that is left where the ring is too small.

    vignette, hair: those of `vignette_mask` and `hair_mask`, where they are known already.
    """
    vignette = vignette_mask(rgb) if vignette is None else vignette
    hair = hair_mask(rgb) if hair is None else hair
    glare = (rgb[..., 0] > _BRIGHT) & (rgb[..., 1] > _BRIGHT) & (rgb[..., 2] > _BRIGHT)
    usable = ~(hair | vignette | glare | (brightest(rgb) < _DARK))
    side = min(mask.shape)
    near, far = (_dilated(mask, share * side) for share in (0.04, 0.22))
    ring = np.asarray(far & ~near & usable)
    if ring.sum() >= _MIN_PIXELS:
        return ring
    return np.asarray(~mask & usable)


def skin_lab(rgb: RGB, mask: Mask, vignette: Mask | None = None, hair: Mask | None = None) -> Floats | None:
    """Median Lab of the bare skin, (3,), after leaving out what is far from it; None where too little is seen."""
    seen = to_lab(rgb)[skin_mask(rgb, mask, vignette, hair)]
    if len(seen) < _MIN_PIXELS:
        return None
    middle = np.median(seen, axis=0)
    distance = np.linalg.norm(seen - middle, axis=1)
    near = seen[distance <= max(float(np.median(distance)) * 2.5, 1.0)]
    return np.asarray(np.median(near, axis=0))


def ita(rgb: RGB, mask: Mask, vignette: Mask | None = None) -> float:
    """The individual typology angle of the skin around the lesion, in degrees.

    NaN where too little skin is seen, or where the light is so blue that the skin has no yellow left (b* < 3).
    """
    lab = skin_lab(rgb, mask, vignette)
    if lab is None or lab[2] < _LEAST_YELLOW:
        return float("nan")
    return float(np.degrees(np.arctan2(lab[0] - 50.0, lab[2])))


def skin_type(rgb: RGB, mask: Mask) -> str | None:
    """The band (I to VI) of the angle, or None where the angle is NaN."""
    angle = ita(rgb, mask)
    return None if np.isnan(angle) else taxonomy.skin_type_of_ita(angle)


def _dilated(mask: Mask, reach_px: float) -> Mask:
    size = 2 * round(reach_px) + 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel) > 0)
