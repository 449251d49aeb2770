"""Polygons, curves and discs as antialiased coverage."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cv2
import numpy as np

from factory.phantom.fields import Array

_STEPS = 12  # points along a curve


def _fixed(points: Array) -> Array:
    """Pixels as OpenCV's fixed point of four bits; a pixel centre is at +0.5 in image shares but at +0 there."""
    return np.rint((points - 0.5) * 16)


@lru_cache(maxsize=1)
def _sixteenths() -> Array:
    """Coverage 0..255 of a pixel of which 0..16 of sixteen parts are covered, as a table of 256 entries."""
    return np.rint(np.minimum(np.arange(256), 16) * (255 / 16)).astype(np.uint8)


def polygon_cover(points: Array, side: int, fine: int) -> Array:
    """Polygon (vertices in pixels) as uint8 coverage 0..255, antialiased by drawing 2 or 4 times larger."""
    canvas = np.zeros((side * fine, side * fine), np.uint8)
    # Sixteen is what two halvings keep exact, and each of them is far faster than one step of four.
    value = 16 if fine == 4 else 255
    cv2.fillPoly(canvas, [_fixed(points * fine).astype(np.int32)], value, lineType=cv2.LINE_8, shift=4)
    if fine == 2:
        return _halved(canvas)
    return cv2.LUT(_halved(_halved(canvas)), _sixteenths())


def _halved(canvas: Array) -> Array:
    side = len(canvas) // 2
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA)


def _canvas(size: int) -> Array:
    """Room to draw on: twice the size, but for images that are large enough as they are."""
    side = size * 2 if size <= 256 else size
    return np.zeros((side, side), np.uint8)


def _coverage(canvas: Array, size: int) -> Array:
    small = canvas if len(canvas) == size else _halved(canvas)
    return small.astype(np.float32) / 255


def line_cover(curves: Array, widths: Sequence[float], values: Sequence[int], size: int) -> Array:
    """Antialiased curves (N, points, 2) in image shares, of widths in 1/128 of the side, as coverage 0..1."""
    canvas = _canvas(size)
    side = len(canvas)
    if len(curves):
        for points, width, value in zip(_fixed(curves * side).astype(np.int32), widths, values, strict=True):
            thick = width * side / 128
            # A line cannot be thinner than a pixel, so a finer one is drawn fainter.
            shade = int(value * min(1.0, thick))
            cv2.polylines(canvas, [points], False, shade, max(1, round(thick)), cv2.LINE_AA, 4)
    return _coverage(canvas, size)


def dot_cover(points: Array, radii: Array, size: int) -> Array:
    """Antialiased discs (centres (N, 2) and radii in image shares) as coverage 0..1."""
    canvas = _canvas(size)
    side = len(canvas)
    for (x, y), r in zip(_fixed(points * side).astype(int).tolist(), (radii * side * 16).tolist(), strict=True):
        cv2.circle(canvas, (x, y), max(6, int(r)), 255, -1, cv2.LINE_AA, 4)
    return _coverage(canvas, size)


@lru_cache(maxsize=1)
def _along() -> tuple[Array, Array]:
    """Position on a curve, and how far it bows there: (12, 1) each."""
    t = np.linspace(0, 1, _STEPS)[:, None]
    return t, t * (1 - t)


def bends(rng: np.random.Generator, angle: float, length: float, bend: float = 0.8) -> tuple[float, float, float]:
    """A random bend for a curve of this direction and length: what `curved` needs of it beside its start."""
    return length * np.cos(angle), length * np.sin(angle), rng.normal(0, bend)


def curved(starts: Any, ways: Sequence[tuple[float, float, float]]) -> Array:
    """Quadratic curves (N, 12, 2) from their starts (N, 2) and what `bends` gave for each."""
    if not ways:
        return np.zeros((0, _STEPS, 2))
    t, bow = _along()
    x, y, bend = np.array(ways).T
    way = np.stack([x, y], axis=1)
    side = np.stack([-y, x], axis=1) * bend[:, None]
    return np.asarray(starts)[:, None] + t * way[:, None] + bow * side[:, None]
