"""All that is measured of a lesion, in one pass over its image and mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from factory.images import RGB, Mask, resized
from factory.prompts import Attributes
from factory.quality.attributes.border import abrupt_octants, compactness, fractal_dimension, radial_variance
from factory.quality.attributes.color import color_asymmetry, present, shares_of, view
from factory.quality.attributes.shape import asymmetry_axes, diameter, largest_piece, outline


@dataclass(frozen=True)
class Measurements(Attributes):
    """The ABC that captions are made of, and what else was measured; the package's docstring says what each is.

    `asymmetry_axes` is across the major, then the minor principal axis. `color_asymmetry` is in Lab units,
    `relative_diameter` a share of the image's shorter side, `diameter_mm` null without a scale. `color_shares` has
    one share per name of `taxonomy.COLORS`, in that order.
    """

    asymmetry_axes: tuple[float, float]
    color_asymmetry: float
    radial_variance: float
    fractal_dimension: float
    abrupt_octants: int
    color_shares: tuple[float, ...]
    relative_diameter: float
    diameter_mm: float | None


def measure(rgb: RGB, mask: Mask, *, mm_per_pixel: float | None = None, unstretch: float | None = None) -> Measurements:
    """All measurements of the lesion under `mask` (H, W) in `rgb` (H, W, 3).

    mm_per_pixel: of the image as it is handed over (after `unstretch`, of its unchanged side). unstretch: the width
    over height that the picture was taken at, where it was squeezed since; shape is measured after it is undone.
    Shape is that of the largest piece with its holes filled. Raises ValueError for a mask without a lesion.
    """
    if mask.shape != rgb.shape[:2]:
        raise ValueError(f"mask must be of the image's size {rgb.shape[:2]}, got {mask.shape}; resize it first.")
    if mm_per_pixel is not None and not (np.isfinite(mm_per_pixel) and mm_per_pixel > 0):
        raise ValueError(f"mm_per_pixel must be above 0, got {mm_per_pixel}; leave it out where no scale is known.")
    if unstretch is not None:
        rgb, mask = unstretched(rgb, unstretch), unstretched(mask, unstretch)
    line = outline(largest_piece(mask))
    seen = view(rgb, mask)
    shares = shares_of(seen)
    axes = asymmetry_axes(line)
    across = diameter(line)
    scale = min(seen.mask.shape) / min(mask.shape)
    return Measurements(
        asymmetry=sum(axes) / 2,
        border_irregularity=compactness(line),
        colors=present(shares),
        asymmetry_axes=axes,
        color_asymmetry=color_asymmetry(seen),
        radial_variance=radial_variance(line),
        fractal_dimension=fractal_dimension(line),
        # Pixel centres are at whole numbers, so a smaller raster is a scale and a half pixel.
        abrupt_octants=abrupt_octants(seen.lab, (line + 0.5) * scale - 0.5),
        color_shares=tuple(shares.values()),
        relative_diameter=across / min(mask.shape),
        diameter_mm=None if mm_per_pixel is None else across * mm_per_pixel,
    )


def unstretched(pixels: NDArray[Any], aspect: float) -> NDArray[Any]:
    """An image (H, W, 3) uint8 or mask (H, W) bool at width / height `aspect`; the side that is too short grows."""
    if not 0.1 <= aspect <= 10:
        raise ValueError(f"unstretch must be a width over height from 0.1 to 10, got {aspect}; 4 / 3 is usual.")
    height, width = pixels.shape[:2]
    size = (round(height * aspect), height) if width < height * aspect else (width, round(width / aspect))
    if pixels.dtype == np.bool_:
        return resized(pixels, *size)
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR))
