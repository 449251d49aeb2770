"""The shape of a lesion: its largest piece, that piece's sub-pixel outline, its asymmetry and its diameter."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from factory.images import Mask
from factory.phantom import measure_asymmetry

Floats = NDArray[Any]

MIN_PIXELS = 12  # a smaller lesion has no shape to measure
# As little smoothing as removes the staircase without rounding the lobes: 0.7 px at a radius of 22 px, growing with the
# fourth root, so that compactness has the least bias at every size (fitted on 300 phantoms at 128 and at 256 px).
_SIGMA, _AT_RADIUS, _GROWTH = 0.7, 22.0, 0.25
_SIGMAS = (0.5, 1.2)
_PAD = 4
_POINTS = 512  # as many as a phantom's contour has


def largest_piece(mask: Mask) -> Mask:
    """The largest 8-connected component with its holes filled. Raises ValueError below `MIN_PIXELS`."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = stats[1:, cv2.CC_STAT_AREA]
    if count < 2 or areas.max() < MIN_PIXELS:
        found = 0 if count < 2 else int(areas.max())
        raise ValueError(f"mask must hold a lesion of at least {MIN_PIXELS} pixels, got {found}; leave this image out.")
    piece = (labels == 1 + int(areas.argmax())).astype(np.uint8)
    edge, _ = cv2.findContours(piece, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(piece, edge, -1, 1, cv2.FILLED)
    return np.asarray(piece > 0)


def outline(piece: Mask) -> Floats:
    """The sub-pixel outline of one piece, (512, 2) as (x, y) in pixels, evenly spaced along its length.

    Pixels of the edge are moved along the gradient of the smoothed piece onto its half level.
    """
    left, top, width, height = cv2.boundingRect(piece.astype(np.uint8))
    corner = np.asarray([left, top]) - _PAD
    soft: Floats = np.pad(piece[top : top + height, left : left + width], _PAD).astype(np.float32)
    smooth = cv2.GaussianBlur(soft, (0, 0), _sigma(float(np.sqrt(soft.sum() / np.pi))))
    # Smoothing can dissolve a hairline shape; it is then measured as it is.
    soft = smooth if (smooth > 0.5).sum() >= MIN_PIXELS else soft
    found, _ = cv2.findContours((soft > 0.5).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    points = max(found, key=len)[:, 0].astype(np.float32)  # (K, 2)
    fields = cv2.merge([soft, *(_slope(soft, axis) for axis in (1, 0))])
    for _ in range(3):
        seen = sampled(fields, points)
        step = (0.5 - seen[:, 0]) / np.maximum((seen[:, 1:] ** 2).sum(axis=1), 0.01)
        points += np.clip(step, -2, 2)[:, None] * seen[:, 1:]
    return _evenly_spaced(points.astype(np.float64)) + corner


def asymmetry_axes(line: Floats) -> tuple[float, float]:
    """Of an outline: area(shape XOR its mirror image) / (2 area) across the major, then the minor principal axis."""
    return measure_asymmetry(line - line.mean(axis=0))


def asymmetry(piece: Mask) -> float:
    """Mean over both principal axes of area(shape XOR its mirror image) / (2 area): 0 symmetric, below 1."""
    return float(np.mean(asymmetry_axes(outline(piece))))


def diameter(line: Floats) -> float:
    """The largest distance between two points of an outline (the largest Feret diameter), in its unit."""
    hull = cv2.convexHull(line.astype(np.float32))[:, 0]
    away = hull[:, None] - hull[None]
    return float(np.sqrt((away**2).sum(axis=2).max()))


def sampled(field: Floats, points: Floats) -> Floats:
    """Bilinear values of a field (H, W, C) at points (..., 2) as (x, y): (..., C), the edge's value outside."""
    x, y = (np.atleast_2d(points[..., k]).astype(np.float32) for k in (0, 1))
    found = cv2.remap(field, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(found).reshape(*points.shape[:-1], -1)


def _sigma(radius: float) -> float:
    """Smoothing in px for a lesion of this radius (of the disk of equal area) in px."""
    return float(np.clip(_SIGMA * (radius / _AT_RADIUS) ** _GROWTH, *_SIGMAS))


def _slope(field: Floats, axis: int) -> Floats:
    kernel = np.asarray([[-0.5, 0.0, 0.5]])
    kernel = kernel if axis == 1 else kernel.T
    return cv2.filter2D(field, cv2.CV_32F, kernel, borderType=cv2.BORDER_REPLICATE)


def _evenly_spaced(points: Floats) -> Floats:
    """512 points at equal steps along a closed line."""
    closed = np.vstack([points, points[:1]])
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(closed, axis=0).T))])
    at = np.linspace(0, along[-1], _POINTS, endpoint=False)
    return np.stack([np.interp(at, along, closed[:, k]) for k in (0, 1)], axis=1)
