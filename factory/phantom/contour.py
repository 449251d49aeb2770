"""The outline of a lesion, and what is measured of it: asymmetry, border irregularity, caliper.

A contour is (512, 2), in the lesion frame, of area pi.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from factory.phantom.fields import Array
from factory.phantom.settings import ASYMMETRY_LEVELS, LEVELS
from factory.phantom.strokes import polygon_cover

ANGLES = 512  # vertices: the fixed analytical resolution of perimeter and area
_HARMONICS = 30


def level(value: float, cuts: tuple[float, float]) -> str:
    """Name of the level of `value`, given the upper edges of low and medium."""
    return LEVELS[int(value >= cuts[0]) + int(value >= cuts[1])]


def measure_asymmetry(contour: Array) -> tuple[float, float]:
    """Symmetric difference with the mirror image over twice the area, across the major and the minor axis."""
    side = 160
    scale = (side / 2 - 4) / float(np.abs(contour).max())
    shape = polygon_cover(contour * scale + side / 2, side, 2)
    m = cv2.moments(shape)
    cx, cy = m["m10"] / m["m00"], m["m01"] / m["m00"]
    angle = 0.5 * np.arctan2(2 * m["mu11"], m["mu20"] - m["mu02"])
    across = []
    for a in (angle, angle + np.pi / 2):
        c, s = np.cos(2 * a), np.sin(2 * a)
        flip = np.array([[c, s, cx - c * cx - s * cy], [s, -c, cy - s * cx + c * cy]])
        other = cv2.warpAffine(shape, flip, (side, side), flags=cv2.INTER_LINEAR)
        across.append(float(cv2.norm(shape, other, cv2.NORM_L1) / (2.0 * m["m00"])))
    return across[0], across[1]


def measure_irregularity(contour: Array) -> float:
    """perimeter^2 / (4 pi area) - 1 of the closed contour."""
    following = np.concatenate([contour[1:], contour[:1]])
    perimeter = np.hypot(*(following - contour).T).sum()
    area = 0.5 * abs(np.sum(contour[:, 0] * following[:, 1] - contour[:, 1] * following[:, 0]))
    return float(perimeter**2 / (4 * np.pi * area) - 1)


def caliper(contour: Array) -> float:
    """The largest distance between two parallel tangents, tried at 64 directions."""
    reach = contour @ _directions()
    return float(np.ptp(reach, axis=0).max())


@lru_cache(maxsize=1)
def _angles() -> tuple[Array, Array, Array]:
    """The angle of each vertex, its cosine and its sine."""
    theta = np.linspace(0, 2 * np.pi, ANGLES, endpoint=False)
    return theta, np.cos(theta), np.sin(theta)


@lru_cache(maxsize=1)
def _directions() -> Array:
    theta = _angles()[0][: ANGLES // 2 : 4]
    return np.stack([np.cos(theta), np.sin(theta)])


@lru_cache(maxsize=1)
def _harmonics() -> tuple[Array, Array, Array, Array]:
    """Of harmonics 1..30: whether it is low, how amplitudes fall off among low and high ones, and its turns."""
    k = np.arange(1, _HARMONICS + 1)
    low = k <= 5
    return low, (6 / k) ** 1.25, np.where(low, k**0.7, 1.0), np.outer(k, _angles()[0])


def _ellipse(rng: np.random.Generator) -> Array:
    turned = _angles()[0] - rng.uniform(0, np.pi)
    stretch = 1 + 0.75 * rng.beta(1.3, 2.4)
    return 1 / np.hypot(np.cos(turned) / np.sqrt(stretch), np.sin(turned) * np.sqrt(stretch))


def _waves(rng: np.random.Generator, uneven: float, ragged: float) -> Array:
    """Logarithm of the radii's departure from an ellipse."""
    low, fall, damp, turns = _harmonics()
    amplitude = np.where(low, 0.02 + 0.19 * uneven, (0.003 + 0.036 * ragged) * fall)
    amplitude = amplitude * rng.normal(size=_HARMONICS) / damp
    amplitude[0] *= 0.5  # the first harmonic mostly shifts a shape
    phase = rng.uniform(0, 2 * np.pi, _HARMONICS)
    waves = turns + phase[:, None]
    return np.clip(amplitude @ np.cos(waves, out=waves), -0.9, 0.7)


def draw_contour(rng: np.random.Generator, uneven: float, ragged: float) -> Array:
    """Closed star-shaped contour of area pi: an ellipse, low harmonics (uneven), high ones and notches (ragged)."""
    theta, cosine, sine = _angles()
    radii = _ellipse(rng) * np.exp(_waves(rng, uneven, ragged))
    for _ in range(rng.poisson(2.2 * uneven * ragged + 0.2)):
        away = np.angle(np.exp(1j * (theta - rng.uniform(0, 2 * np.pi))))
        depth, width = rng.uniform(-0.2, 0.45), rng.uniform(0.08, 0.4)
        radii = radii * (1 - depth * np.exp(-((away / width) ** 2)))
    area = 0.5 * np.sum(radii**2) * 2 * np.pi / ANGLES
    radii *= np.sqrt(np.pi / area)
    return np.stack([radii * cosine, radii * sine], axis=1)


def levelled_contour(rng: np.random.Generator, atypia: float, wanted: str | None) -> tuple[Array, tuple[float, float]]:
    """A contour and its two asymmetries; their mean falls in the wanted level, by drawing again with a nudge."""
    uneven = float(np.clip(0.65 * atypia + 0.35 * rng.uniform(), 0, 1))
    ragged = float(np.clip(0.6 * atypia + 0.4 * rng.uniform(), 0, 1)) ** 1.3
    while True:
        contour = draw_contour(rng, uneven, ragged)
        axes = measure_asymmetry(contour)
        found = level(sum(axes) / 2, ASYMMETRY_LEVELS)
        if wanted is None or found == wanted:
            return contour, axes
        # Shrinking both ends in an ellipse, growing ends in a blob, so every level is reached.
        step = 0.85 if LEVELS.index(found) > LEVELS.index(wanted) else 1.15
        uneven, ragged = max(0.01, min(1.6, uneven * step)), max(0.01, min(1.6, ragged * step))
