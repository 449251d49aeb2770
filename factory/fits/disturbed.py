"""Pictures as other lamps, lenses and skins would have taken them, so that a fit on phantoms does not end with them.

Each change is generic and comes with a chance of its own. None is one of the renderer's: its settings stay what they
are, and those that no fit may use (`phantom.HELD_OUT`) stay unseen.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from factory.images import RGB

Picture = NDArray[np.float32]  # (H, W, 3) in 0..1


def disturbed(image: RGB, rng: np.random.Generator) -> RGB:
    """The picture (H, W, 3) uint8, darker or tinted, unevenly lit, faded, mottled, crossed by hairs, blurred, noisy and
    compressed, each or not. What is in it stays where it is."""
    picture: Picture = np.asarray(image, np.float32) / np.float32(255)
    for chance, change in _CHANGES:
        if rng.random() < chance:
            picture = np.clip(change(picture, rng), 0, 1).astype(np.float32)
    pixels = np.asarray((picture * 255).round(), np.uint8)
    return _compressed(pixels, rng) if rng.random() < 0.4 else pixels


def _relit(picture: Picture, rng: np.random.Generator) -> Picture:
    """Gamma, exposure, and a gain for each channel."""
    gains = rng.uniform(0.7, 1.1) * (1 + rng.normal(0, 0.08, 3))
    return np.asarray(picture ** np.exp(rng.normal(0, 0.25)) * gains)


def _shaded(picture: Picture, rng: np.random.Generator) -> Picture:
    """Brighter towards one side."""
    x, y = _grid(picture)
    angle = rng.uniform(0, 2 * np.pi)
    return np.asarray(picture * (1 + rng.uniform(0, 0.35) * (np.cos(angle) * x + np.sin(angle) * y)[..., None]))


def _vignetted(picture: Picture, rng: np.random.Generator) -> Picture:
    x, y = _grid(picture)
    return np.asarray(picture * (1 - rng.uniform(0, 0.2) * (x**2 + y**2)[..., None]))


def _faded(picture: Picture, rng: np.random.Generator) -> Picture:
    """Nearer to what surrounds each place: less contrast, of a lesion too."""
    surrounds = cv2.GaussianBlur(picture, (0, 0), 0.3 * picture.shape[0], borderType=cv2.BORDER_REFLECT)
    return np.asarray(picture + rng.uniform(0, 0.6) * (surrounds - picture))


def _mottled(picture: Picture, rng: np.random.Generator) -> Picture:
    """Light and dark of one random grain, and somewhat of each colour."""
    grain = int(rng.integers(4, 28))
    grains = rng.standard_normal((grain, grain, 1)) + rng.uniform(0, 0.6) * rng.standard_normal((grain, grain, 3))
    field = cv2.resize(grains.astype(np.float32), picture.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    return np.asarray(picture * (1 + rng.uniform(0, 0.12) * field))


def _hairy(picture: Picture, rng: np.random.Generator) -> Picture:
    """Bent dark strokes, more or less transparent."""
    side, drawn = picture.shape[0], np.ascontiguousarray(picture)
    along = np.linspace(0, 1, 12)
    for _ in range(int(rng.integers(5, 70))):
        angles = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.6) * along
        steps = np.stack([np.cos(angles), np.sin(angles)], 1) * side * rng.uniform(0.01, 0.07)
        points = rng.uniform(-0.08, 1.08, 2) * side + np.cumsum(steps, 0)
        dark = rng.uniform(0.05, 0.45)
        cv2.polylines(drawn, [np.round(points * 8).astype(np.int32)], False, (dark, 0.9 * dark, 0.8 * dark),
                      int(rng.integers(1, 3)), cv2.LINE_AA, 3)  # fmt: skip
    opacity = rng.uniform(0.4, 1)
    return np.asarray((1 - opacity) * picture + opacity * drawn)


def _blurred(picture: Picture, rng: np.random.Generator) -> Picture:
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.3, 1.6)))


def _noisy(picture: Picture, rng: np.random.Generator) -> Picture:
    return np.asarray(picture + rng.normal(0, rng.uniform(0, 0.025), picture.shape))


def _compressed(pixels: RGB, rng: np.random.Generator) -> RGB:
    quality = int(rng.integers(40, 95))
    encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)


def _grid(picture: Picture) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x (1, W) and y (H, 1) from -1 to 1."""
    height, width = picture.shape[:2]
    return np.linspace(-1, 1, width)[None], np.linspace(-1, 1, height)[:, None]


_CHANGES = (
    (0.8, _relit), (0.5, _shaded), (0.3, _vignetted), (0.4, _faded), (0.4, _blurred), (0.6, _mottled), (0.5, _hairy),
    (0.6, _noisy),
)  # fmt: skip
