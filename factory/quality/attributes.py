"""The ABC of a lesion, measured from its image and mask.

Asymmetry: reflection about both principal axes through the centroid, area of the symmetric difference over twice the
area, mean of the two (Stolz et al. 1994 score the same two axes by eye). Border irregularity: perimeter^2 / (4 pi
area) - 1, so a disk has none (the compactness index of Golston et al. 1992). Color: how many of the six dermoscopic
colours of the ABCD rule (Stolz et al. 1994; Abbasi et al. 2004) cover a stated share of the lesion.

Shape is read from the sub-pixel outline of the slightly smoothed mask, never from its staircase, and by the same two
functions that state a phantom's truth from its analytic contour.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from factory import taxonomy
from factory.images import RGB, Mask, resized
from factory.phantom import measure_asymmetry, measure_irregularity
from factory.prompts import Attributes
from factory.quality.skin_tone import skin_lab, to_lab, vignette_mask, without_hair

Floats = NDArray[Any]

MIN_PIXELS = 12  # a smaller lesion has no shape to measure
COLOR_SHARE = 0.06  # a colour is there when it covers this share of the lesion
_TYPICAL_SKIN = np.asarray([65.0, 10.0, 15.0])  # where a lesion fills the view
_SIGMA = 0.7  # px; as little as removes the staircase
_PAD = 4
_MOST_IRREGULAR = 100.0
# Lab units; share of the threshold that is kept, as observers draw around the fade
_FAR, _SLACK = 30.0, 0.75

Channel = tuple[float, float]
# What a dermoscopic colour looks like on this skin, in Lab: (share of the skin's value, offset) for L, a and b. The
# colours' clinical definitions are relative too: what is white is paler than the skin around it. The numbers are a
# least-squares fit to phantoms of one colour each; the last rows were added from real lesions, whose dark brown was
# else called red on pink skin, and black where it is deep.
_REFERENCES: tuple[tuple[str, Channel, Channel, Channel], ...] = (
    ("light-brown", (0.85, -1.2), (0.82, 8.0), (0.85, 15.5)),
    ("dark-brown", (0.67, -1.6), (0.64, 10.1), (0.67, 14.2)),
    ("black", (0.51, -0.3), (0.32, 5.5), (0.55, 1.3)),
    ("blue-gray", (0.75, -1.5), (0.54, 2.0), (0.75, -10.1)),
    ("red", (0.84, -1.0), (0.89, 12.6), (0.88, 9.7)),
    ("white", (0.99, 5.7), (0.77, 1.0), (0.88, -6.3)),
    # Deeper than a phantom paints them.
    ("dark-brown", (0.55, 0.0), (1.0, 18.0), (1.0, 9.0)),
    ("dark-brown", (0.38, 0.0), (1.0, 2.0), (1.0, 0.0)),
    ("black", (0.15, 0.0), (0.1, 1.0), (0.1, 1.0)),
    ("red", (0.78, 0.0), (1.0, 24.0), (1.0, 1.0)),
)
_WEIGHTS = np.asarray([0.5, 1.0, 1.0])  # lightness varies most within one colour, so it counts half


def measure(rgb: RGB, mask: Mask) -> Attributes:
    """Asymmetry, border irregularity and colours of the lesion under `mask` (H, W) in `rgb` (H, W, 3).

    Shape is that of the largest piece with its holes filled. Raises ValueError for a mask without a lesion.
    """
    if mask.shape != rgb.shape[:2]:
        raise ValueError(f"mask must be of the image's size {rgb.shape[:2]}, got {mask.shape}; resize it first.")
    piece = largest_piece(mask)
    return Attributes(asymmetry(piece), border_irregularity(piece), colors(rgb, mask))


def largest_piece(mask: Mask) -> Mask:
    """The largest 8-connected component with its holes filled. Raises ValueError below `MIN_PIXELS`."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if count < 2 or areas.max() < MIN_PIXELS:
        found = 0 if count < 2 else int(areas.max())
        raise ValueError(f"mask must hold a lesion of at least {MIN_PIXELS} pixels, got {found}; leave this image out.")
    return np.asarray(ndimage.binary_fill_holes(labels == 1 + int(areas.argmax())))


def outline(piece: Mask) -> Floats:
    """The sub-pixel outline of one piece, (512, 2) as (x, y) in pixels, evenly spaced along its length.

    Pixels of the edge are moved along the gradient of the smoothed piece onto its half level.
    """
    soft: Floats = np.pad(piece, _PAD).astype(np.float32)
    smooth = cv2.GaussianBlur(soft, (0, 0), _SIGMA)
    # Smoothing can dissolve a hairline shape; it is then measured as it is.
    soft = smooth if (smooth > 0.5).sum() >= MIN_PIXELS else soft
    found, _ = cv2.findContours((soft > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = max(found, key=len)[:, 0].astype(np.float64)  # (K, 2)
    slope_y, slope_x = (np.gradient(soft, axis=axis) for axis in (0, 1))
    for _ in range(3):
        value, dx, dy = (_sampled(field, points) for field in (soft, slope_x, slope_y))
        step = (0.5 - value) / np.maximum(dx**2 + dy**2, 0.01)
        points += np.clip(step, -2, 2)[:, None] * np.stack([dx, dy], axis=1)
    return _evenly_spaced(points - _PAD)


def asymmetry(piece: Mask) -> float:
    """Mean over both principal axes of area(shape XOR its mirror image) / (2 area): 0 symmetric, below 1."""
    line = outline(piece)
    return float(np.mean(measure_asymmetry(line - line.mean(axis=0))))


def border_irregularity(piece: Mask) -> float:
    """perimeter^2 / (4 pi area) - 1: about 0 for a disk, growing with every lobe and notch."""
    line = outline(piece)
    # A hairline's outline may enclose next to nothing; any such shape is as irregular as can be told.
    with np.errstate(divide="ignore"):
        return float(np.clip(measure_irregularity(line), 0.0, _MOST_IRREGULAR))


def colors(rgb: RGB, mask: Mask) -> tuple[str, ...]:
    """The dermoscopic colours that cover at least `COLOR_SHARE` of the lesion, in the vocabulary's order.

    A pixel has the nearest reference colour, relative to the bare skin around. At least one is returned.
    """
    shares = color_shares(rgb, mask)
    present = tuple(name for name in taxonomy.COLORS if shares[name] >= COLOR_SHARE)
    return present or (max(shares, key=lambda name: shares[name]),)


def color_shares(rgb: RGB, mask: Mask) -> dict[str, float]:
    """The share of the lesion that has each dermoscopic colour; they sum to 1."""
    lab = cv2.GaussianBlur(to_lab(without_hair(rgb)), (0, 0), max(0.7, min(mask.shape) / 128))
    skin = skin_lab(rgb, mask)
    base = _TYPICAL_SKIN if skin is None else skin
    table = np.asarray([[share * base[k] + offset for k, (share, offset) in enumerate(row[1:])] for row in _REFERENCES])
    inside = lab[_core(mask)]
    nearest = np.linalg.norm((inside[:, None] - table[None]) * _WEIGHTS, axis=2).argmin(axis=1)  # (P, R) -> (P,)
    shares = dict.fromkeys(taxonomy.COLORS, 0.0)
    for row, count in zip(_REFERENCES, np.bincount(nearest, minlength=len(table)), strict=True):
        shares[row[0]] += float(count) / len(inside)
    return shares


def estimate_mask(rgb: RGB) -> Mask:
    """The lesion of an image without a mask, (H, W): a baseline by colour, not a trained segmenter.

    Distance in Lab from the skin at the borders, smoothed, cut by Otsu's threshold; the component that is largest
    and most central, its holes filled. The vignette and hair are left out. Empty where nothing stands out.
    """
    height, width = rgb.shape[:2]
    scale = 128 / min(height, width)
    small = resized(rgb, max(32, round(width * scale)), max(32, round(height * scale)))
    found = _estimate(small).astype(np.float32)
    return np.asarray(cv2.resize(found, (width, height), interpolation=cv2.INTER_LINEAR) >= 0.5)


def _estimate(rgb: RGB) -> Mask:
    lab = cv2.GaussianBlur(to_lab(without_hair(rgb)), (0, 0), 2.0)
    # Stickers and ink are green, blue or orange as no skin and no lesion is.
    usable = ~vignette_mask(rgb) & (lab[..., 1] > -3) & (lab[..., 2] > -18)
    edge = np.ones(usable.shape, bool)
    margin = max(2, round(0.08 * min(usable.shape)))
    edge[margin:-margin, margin:-margin] = False
    band = lab[edge & usable] if (edge & usable).sum() >= 32 else lab[usable]
    if not len(band):
        return np.zeros(usable.shape, bool)
    skin = np.median(band, axis=0)
    usable &= lab[..., 2] < skin[2] + 32
    distance = np.linalg.norm((lab - skin) * np.asarray([1.0, 1.0, 0.7], np.float32), axis=2)
    # Far is far: one black or white spot must not raise the threshold above the rest of the lesion.
    distance = np.where(usable, np.minimum(distance, _FAR), 0.0)
    return _central_piece(distance, _SLACK * _otsu(distance[usable]))


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


def _sampled(field: Floats, points: Floats) -> Floats:
    """Bilinear values of a (H, W) field at (K, 2) points (x, y)."""
    return np.asarray(ndimage.map_coordinates(field, points[:, ::-1].T, order=1, mode="nearest"))


def _evenly_spaced(points: Floats) -> Floats:
    """512 points at equal steps along a closed line, as many as a phantom's contour has."""
    closed = np.vstack([points, points[:1]])
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    at = np.linspace(0, along[-1], 512, endpoint=False)
    return np.stack([np.interp(at, along, closed[:, k]) for k in (0, 1)], axis=1)


def _core(mask: Mask) -> Mask:
    """The mask without its blurred edge, or the mask where nothing would be left."""
    core = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return np.asarray(core if core.sum() >= MIN_PIXELS else mask)
