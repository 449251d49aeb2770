"""Skin without the lesion, in CIE Lab: its tone, mottle and lines, freckles, follicles and other lesions."""

from __future__ import annotations

import cv2
import numpy as np

from factory.phantom.fields import Array, blur, f32, noise, shift_in_place, spread
from factory.phantom.settings import ITA_ENDS, PhantomSettings
from factory.phantom.strokes import dot_cover

# What more of each does to skin, in Lab: these two alone make it uneven.
_MELANIN = (-1.2, 0.35, 0.55)
_BLOOD = (-0.5, 1.0, 0.2)


def skin_lab(ita: float, blush: float = 0.5) -> tuple[float, float, float]:
    """Base skin in Lab from the individual typology angle.

    Melanin sets the angle; yellow (b*) peaks at middling melanin, red (a*) is haemoglobin (`blush`, 0..1) plus a share
    of melanin; lightness then follows from the definition ita = atan((L - 50) / b).
    """
    melanin = float(np.clip((ITA_ENDS[0] - ita) / (ITA_ENDS[0] - ITA_ENDS[1]), 0, 1))
    b = 10.5 + 9.0 * np.sin(np.pi * min(1.0, 0.1 + melanin)) ** 1.2
    a = 0.5 + 8.5 * blush + 3.0 * melanin
    return float(50 + b * np.tan(np.radians(ita))), float(a), float(b)


def paint_skin(rng: np.random.Generator, base: tuple[float, float, float], s: PhantomSettings, size: int) -> Array:
    """Mottled, finely lined skin in Lab."""
    mottle = s.mottle[0] + (s.mottle[1] - s.mottle[0]) * rng.uniform() ** 2
    grain = rng.uniform(*s.grain)
    uneven = noise(rng, 5, size, 2) + np.float32(0.8) * noise(rng, 18, size, 2)
    uneven *= np.float32(mottle)
    skin = spread(uneven[..., 0], _MELANIN) + spread(uneven[..., 1], _BLOOD)
    shift_in_place(skin, base)
    fine = noise(rng, 40, size) * 0.5 + noise(rng, 96, size) * 0.6
    skin[..., 0] += fine * np.float32(grain) + _furrows(rng, size) * np.float32(grain * rng.uniform(0, 1.1))
    return skin


def _furrows(rng: np.random.Generator, size: int) -> Array:
    """Two crossing sets of skin lines: noise stretched along a direction, then turned."""
    lines = np.zeros((size, size), np.float32)
    middle = ((size - 1) / 2, (size - 1) / 2)
    for _ in range(2):
        coarse = rng.standard_normal((90, 16), dtype=np.float32)
        strip = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)
        turn = cv2.getRotationMatrix2D(middle, float(rng.uniform(0, 180)), 1.45)
        lines += np.minimum(cv2.warpAffine(strip, turn, (size, size), borderMode=cv2.BORDER_REFLECT_101), 0.4)
    return lines


def freckles(rng: np.random.Generator, skin: Array, size: int) -> None:
    """Brown spots that are not the lesion."""
    count = int(rng.integers(3, 45))
    spots = dot_cover(rng.uniform(0, 1, (count, 2)), rng.uniform(0.003, 0.022, count) * rng.uniform(0.5, 1.1), size)
    spots = blur(spots, rng.uniform(0.004, 0.012) * size)
    skin += spread(spots, f32([-11, 4.5, 7]) * np.float32(rng.uniform(0.3, 1.1)))


def neighbours(rng: np.random.Generator, skin: Array, centre: tuple[float, float], radius: float, size: int) -> None:
    """One to three smaller lesions away from the one in the middle, brown, red or nearly black."""
    count = int(rng.integers(1, 4))
    around = rng.uniform(0, 2 * np.pi, count)
    radii = rng.uniform(0.15, 0.6, count) * min(radius, 0.12)
    away = radius * rng.uniform(1.5, 2.2) + radii + rng.uniform(0.03, 0.3, count)
    points = np.array(centre) + away[:, None] * np.stack([np.cos(around), np.sin(around)], axis=1)
    tone = f32(((-22, 8, 9), (-14, 15, 5), (-38, 5, 3))[rng.integers(3)]) * np.float32(rng.uniform(0.4, 1.2))
    uneven = np.clip(1 + 0.3 * noise(rng, 24, size), 0, None)
    skin += spread(blur(dot_cover(points, radii, size), rng.uniform(0.004, 0.02) * size) * uneven, tone)


def follicles(rng: np.random.Generator, skin: Array, size: int) -> None:
    """A loose lattice of pores, darker or paler than the skin."""
    step = rng.uniform(0.05, 0.11)
    line = np.arange(-step, 1 + step, step)
    points = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    points = points + rng.normal(0, step * 0.25, points.shape)
    pores = blur(dot_cover(points, np.full(len(points), rng.uniform(0.004, 0.010)), size), 0.006 * size)
    skin += spread(pores, f32([-9, 2, 3]) * np.float32(rng.choice([-0.5, 0.6, 1.0, 1.3])))
