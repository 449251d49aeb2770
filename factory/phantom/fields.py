"""Grids, random streams and smooth fields, and the few ways in which they are blurred, coloured and blended.

Images are (size, size, 3) float32 and fields (size, size) float32. `*_in_place` and `mix` write into their first
argument; everything else returns a new array, but for `blur`, which may return what it was given.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def generator(seed: int, index: int, stream: int) -> np.random.Generator:
    """The random stream number `stream` of one phantom."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index, stream])))


def f32(value: Any) -> Array:
    return np.asarray(value, np.float32)


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[Array, Array]:
    """Pixel centres as shares of the image side: x and y, float32."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = np.meshgrid(line, line)
    return x, y


def _resize(coarse: Array, size: int) -> Array:
    ratio = size / coarse.shape[0]
    # Linear is enough, and faster, where a coefficient spans few pixels; over many its creases would show.
    how = cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR if ratio < 2.5 else cv2.INTER_CUBIC
    return cv2.resize(coarse, (size, size), interpolation=how)


def noise(rng: np.random.Generator, cells: int, size: int, channels: int = 1) -> Array:
    """Smooth noise of about unit deviation with `cells` coefficients a side, the same at every size."""
    shape = (cells, cells) if channels == 1 else (cells, cells, channels)
    return _resize(rng.standard_normal(shape, dtype=np.float32), size)


def blur(image: Array, sigma: float) -> Array:
    """Gaussian blur; below a fifth of a pixel there is nothing to do."""
    return image if sigma < 0.2 else cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)


# Numpy broadcasts over a short last axis some twenty times slower than over a long one: hence whole rows of pixels.


def _rows(image: Array, tone: Any) -> tuple[Array, Array]:
    """The image as (size, 3 * size), and a three-part tone repeated along such a row."""
    tones = np.empty(image.shape[1:], np.float32)
    tones[:] = tone
    return image.reshape(len(image), -1), tones.reshape(-1)


def scale_in_place(image: Array, tone: Any) -> Array:
    """`image` (S, S, 3) times a tone (3,)."""
    rows, tones = _rows(image, tone)
    rows *= tones
    return image


def shift_in_place(image: Array, tone: Any) -> Array:
    """`image` (S, S, 3) plus a tone (3,)."""
    rows, tones = _rows(image, tone)
    rows += tones
    return image


def triple(weight: Array) -> Array:
    """A field (S, S) as a grey image (S, S, 3)."""
    return cv2.merge([weight, weight, weight])


def spread(weight: Array, tone: Any) -> Array:
    """A field (S, S) times a tone (3,), as an image (S, S, 3)."""
    return cv2.merge([weight * np.float32(part) for part in tone])


def mix(image: Array, colour: Any, weight: Array) -> None:
    """Blends a colour (3,) or an image (S, S, 3) into `image` (S, S, 3), in place, by a weight (S, S) in [0, 1]."""
    over = f32(colour)
    if over.ndim == 1:
        rows, tones = _rows(np.empty_like(image), over)
        rows[:] = tones
        over = rows.reshape(image.shape)
    cv2.blendLinear(over, image, weight, 1 - weight, image)
