"""The camera: light, exposure and white balance, then defocus, sensor noise and compression."""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from factory.phantom.fields import Array, blur, f32, grid, spread, triple
from factory.phantom.settings import PhantomSettings


@lru_cache(maxsize=8)
def _centred(size: int) -> tuple[Array, Array, Array]:
    """Pixel centres from the middle, x and y in shares of the image side, and their squared distance."""
    x, y = (g - np.float32(0.5) for g in grid(size))
    return x, y, x**2 + y**2


def light(rng: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> None:
    """Uneven illumination, exposure and white balance, all multiplicative."""
    x, y, bowl = _centred(size)
    strength, a = rng.uniform(*s.illumination), rng.uniform(0, 2 * np.pi)
    slope = x * np.float32(np.cos(a)) + y * np.float32(np.sin(a))
    if rng.uniform() < s.red_light:
        rgb *= spread(np.ones((size, size), np.float32), f32([1.2, 0.85, 0.75]) ** np.float32(rng.uniform(0.5, 1.2)))
    shade = 1 + np.float32(strength) * slope - np.float32(2 * strength * rng.uniform()) * bowl
    uneven, blue = s.cast
    tilt = rng.normal(0, uneven)
    gain = f32([1 - tilt, 1 + rng.normal(0, 0.25 * uneven), 1 + tilt + rng.uniform(0, 2 * blue)])
    rgb *= spread(shade, gain * np.float32(np.exp(rng.uniform(*np.log(s.exposure))) / gain.mean()))


def expose(rng: np.random.Generator, grain: np.random.Generator, rgb: Array, s: PhantomSettings, size: int) -> Array:
    """Defocus, sensor noise (from `grain`) and compression; returns the eight-bit image and spoils `rgb`."""
    rgb = blur(rgb, rng.uniform(*s.blur) * size / 128)
    deviation = np.float32(rng.uniform(*s.noise) / 255)
    rgb += triple(grain.standard_normal((size, size), dtype=np.float32) * deviation)
    np.clip(rgb, 0, 1, out=rgb)
    rgb *= 255
    rgb += 0.5
    image = rgb.astype(np.uint8)
    quality, pressed = int(rng.integers(55, 92)), rng.uniform() < s.jpeg
    if pressed:
        _, code = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        image = np.asarray(cv2.imdecode(code, cv2.IMREAD_COLOR))
    return image
