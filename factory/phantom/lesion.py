"""The lesion over the skin: pigment and structures, weighted by an edge that is crisp here and soft there."""

from __future__ import annotations

import numpy as np

from factory.phantom.fields import Array, blur, f32, mix, noise, scale_in_place, spread
from factory.phantom.pigment import paint_pigment
from factory.phantom.settings import PhantomSettings
from factory.phantom.structures import paint_structures
from factory.phantom.truth import Attributes


def paint_lesion(
    rng: np.random.Generator,
    at: Attributes,
    base: tuple[float, float, float],
    s: PhantomSettings,
    lab: Array,
    cover: Array,
) -> None:
    """Paint the lesion into `lab`, the skin of tone `base`; `cover` is the filled contour, 0..1."""
    size = cover.shape[0]
    paint, rho = paint_pigment(rng, at, base, size)
    paint += _roughness(rng, size)
    paint_structures(rng, at, paint, size)
    edge = _strength(rng, at, s, cover, rho)
    if rng.uniform() < 0.35:
        _halo(rng, lab, cover, at.radius)
    mix(lab, paint, edge)


def _roughness(rng: np.random.Generator, size: int) -> Array:
    """Unevenness of the pigment, down to a few pixels."""
    rough = scale_in_place(noise(rng, 13, size, 3), [1.0, 0.45, 0.6])
    rough *= np.float32(rng.uniform(0.5, 4.5))
    rough[..., 0] += noise(rng, 30, size) * rng.uniform(0.5, 4) + noise(rng, 70, size) * rng.uniform(0.5, 4)
    return rough


def _strength(rng: np.random.Generator, at: Attributes, s: PhantomSettings, cover: Array, rho: Array) -> Array:
    """How far the pigment covers the skin, 0..1: the edge, paler outwards and in patches."""
    crispness = rng.uniform(0.6, 1) if at.diagnosis == "seborrheic_keratosis" else rng.uniform(0, 1) ** 1.6
    edge = _edge(rng, cover, at.radius, crispness, s)
    edge *= 1 - np.float32(0.55 * (1 - crispness) * rng.uniform()) * np.clip(rho, 0, 1) ** 2
    patches = np.clip(1 + rng.uniform(0, 0.3) * noise(rng, 7, cover.shape[0]), 0.4, 1)
    edge *= patches * np.float32(rng.uniform(*s.opacity) ** 0.7)
    return edge


def _halo(rng: np.random.Generator, lab: Array, cover: Array, radius: float) -> None:
    """Redness or a tan around the lesion, fading outwards."""
    reach = blur(cover, radius * rng.uniform(0.1, 0.25) * cover.shape[0])
    tone = (f32([-3, 6, 1]), f32([-3, 3, 6]))[rng.integers(2)]
    lab += spread(reach, tone * np.float32(rng.uniform(0.3, 1)))


def _edge(rng: np.random.Generator, cover: Array, radius: float, crispness: float, s: PhantomSettings) -> Array:
    """Pigment strength 0..1: the filled contour, blurred sector by sector and frayed.

    The visible edge lies a little inside the contour where it is blurred, as observers draw around the whole fade.
    """
    size = cover.shape[0]
    crisp = min(rng.uniform(*s.crisp), 0.14 * radius)
    soft = crisp + (min(rng.uniform(*s.soft), 0.26 * radius) - crisp) * (1 - crispness)
    where = np.clip(0.5 + 0.7 * noise(rng, 4, size), 0, 1)
    sharp = blur(cover, crisp * size)
    edge = sharp + (blur(cover, max(soft, crisp) * size) - sharp) * where
    fray = noise(rng, 18, size) + noise(rng, 44, size) + 0.8 * noise(rng, 80, size)
    edge += fray * edge * (1 - edge) * np.float32(rng.uniform(0.2, 1.2))
    edge = np.clip((edge - 0.3) / 0.55, 0, 1)
    return edge * edge * (3 - 2 * edge)
