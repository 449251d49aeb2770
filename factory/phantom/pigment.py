"""The colours of a lesion: laid out in its own frame with exact shares, then warped to the image."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from factory.phantom.contour import ANGLES
from factory.phantom.fields import Array, blur, f32, grid, noise
from factory.phantom.truth import Attributes

_SIDE = 72  # cells along a side of the lesion frame


@lru_cache(maxsize=1)
def _frame() -> tuple[Array, Array, Array, Array]:
    """Of each cell of the lesion frame (half-side 1): x, y, radius and nearest contour vertex."""
    x, y = (2 * g - 1 for g in grid(_SIDE))
    vertex = (np.arctan2(y, x) % (2 * np.pi) * (ANGLES / (2 * np.pi))).astype(np.intp) % ANGLES
    return x.astype(float), y.astype(float), np.hypot(x, y), vertex


def _tints(skin: tuple[float, float, float], dull: float) -> dict[str, Array]:
    """The six dermoscopic colours in Lab, as seen on this skin; `dull` pulls them towards grey-brown."""
    light, a, b = skin
    keep = 1 - 0.45 * dull
    tints = {
        "white": (min(94, light + 9), a * 0.6, b * 0.45),
        "red": (light * 0.75, a + 20 * keep, b + 8),
        "light-brown": (light * 0.76, a + 12 * keep, b + 17 * keep),
        "dark-brown": (light * 0.47, a * 0.7 + 15 * keep, b * 0.7 + 16 * keep),
        "blue-gray": (light * 0.58, a * 0.3, -5.0 + b * 0.1),
        "black": (light * 0.2 + 3, 6.0, 6.0),
    }
    return {name: f32(tint) for name, tint in tints.items()}


def _wanted(rng: np.random.Generator, rho: Array) -> Array:
    """How little each cell wants the next colour: a spot, a band around the middle or the rim, made uneven."""
    x, y, _, _ = _frame()
    target = rng.uniform(-0.6, 0.6, 2)
    kind, steep = rng.integers(4), np.float32(rng.uniform(0.5, 3.0))
    shape = np.hypot(x - target[0], y - target[1]) if kind < 2 else rho if kind == 2 else -rho
    return shape * steep + 0.6 * noise(rng, 6, _SIDE) + rng.uniform(0.1, 0.6) * noise(rng, 18, _SIDE)


def painted(rng: np.random.Generator, contour: Array, colors: tuple[str, ...]) -> tuple[Array, Array, float]:
    """Colour index of each cell of the lesion frame, relative radius there, and the half-side of the frame.

    Every colour gets a share of the true area fixed in advance (5% at least), so the truth needs no threshold.
    """
    _, _, radius, vertex = _frame()
    radii = np.hypot(contour[:, 0], contour[:, 1]).astype(np.float32)
    half = float(radii.max()) * 1.03
    rho = radius * np.float32(half) / radii[vertex]
    inside = np.flatnonzero(rho.ravel() < 1)
    labels = np.zeros(_SIDE * _SIDE, np.intp)
    shares = rng.uniform(0.07, 0.32, len(colors) - 1)
    shares = np.maximum(0.05, shares * min(1.0, 0.7 / max(shares.sum(), 1e-6)))
    for k, share in enumerate(shares, start=1):
        want = _wanted(rng, rho)
        free = inside[labels[inside] == 0]
        take = min(len(free), int(np.ceil(share * len(inside))))
        labels[free[np.argpartition(want.ravel()[free], take - 1)[:take]]] = k
    return labels.reshape(_SIDE, _SIDE), rho, half


def paint_pigment(
    rng: np.random.Generator, at: Attributes, base: tuple[float, float, float], size: int
) -> tuple[Array, Array]:
    """Lab colour of the pigment and relative radius, warped from the lesion frame to the image."""
    keratosis = at.diagnosis == "seborrheic_keratosis"
    tints = _tints(base, rng.uniform(0.3, 1.0) if keratosis else rng.uniform(0, 0.4))
    labels, rho, half = painted(rng, at.contour, at.colors)
    table = np.stack([tints[c] for c in at.colors]) + rng.normal(0, 2.5, (len(at.colors), 3)).astype(np.float32)
    paint = blur(table.take(labels, axis=0), rng.uniform(0.8, 3.2))
    paint[..., 0] += (rho - 0.6) * np.float32(rng.normal(7.0, 7.0))
    both = cv2.merge([*cv2.split(paint), np.minimum(rho, 2)])
    both = cv2.warpAffine(both, _warp(at, half, size), (size, size), borderMode=cv2.BORDER_REPLICATE)
    return cv2.cvtColor(both, cv2.COLOR_BGRA2BGR), cv2.extractChannel(both, 3)  # the first three parts, and the fourth


def _warp(at: Attributes, half: float, size: int) -> Array:
    """From cells of the lesion frame to pixels of the image."""
    scale = 2 * half * at.radius * size / _SIDE  # image pixels per cell
    shift = [c * size - half * at.radius * size + 0.5 * scale - 0.5 for c in at.centre]
    return np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
