"""Normal skin in images of lesions: the largest square that keeps clear of what is not skin.

no_mask           it is not known where the lesion is
no_normal_skin    no square of the least side is clear of the lesion, its margin, a black border, a vignette and shadow
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from factory.images import RGB, Mask, brightest
from factory.quality.skin_tone import vignette_mask

NO_MASK, NO_NORMAL_SKIN = "no_mask", "no_normal_skin"
SHADOW = 0.6  # of the skin's median brightness, over an eighth of the side; below it is shadow
BLACK = 12  # grey levels; a row or column at the edge that has nothing brighter is border


class Box(NamedTuple):
    """A square in pixels: its left and top, and its side."""

    left: int
    top: int
    side: int

    def of(self, rgb: RGB) -> RGB:
        """What of an image (H, W, 3) lies in it, (side, side, 3)."""
        return np.ascontiguousarray(rgb[self.top : self.top + self.side, self.left : self.left + self.side])


def normal_square(rgb: RGB, mask: Mask | None, min_side: int, margin: float = 0.05) -> Box | str:
    """The largest square of normal skin in an image (H, W, 3) with its lesion's mask (H, W), or why there is none.

    margin: how far a square keeps from the lesion, as a share of the shorter side. Of equal squares the first, by rows.
    Sides are odd: a square is found by its middle, and may be one pixel less than the largest.
    """
    if mask is None:
        return NO_MASK
    reach = round(margin * min(mask.shape))
    clear = bright_window(rgb) & ~grown(mask, reach) & ~vignette_mask(rgb)
    clear &= ~_shadow(rgb, clear)
    # Chessboard distance to what is not clear, the picture's edge included: a square of side 2 d - 1 fits about it.
    depth = cv2.distanceTransform(np.pad(clear, 1).astype(np.uint8), cv2.DIST_C, cv2.DIST_MASK_3)[1:-1, 1:-1]
    top, left = divmod(int(depth.argmax()), depth.shape[1])
    half = round(float(depth.max())) - 1
    if 2 * half + 1 < max(1, min_side):
        return NO_NORMAL_SKIN
    return Box(left - half, top - half, 2 * half + 1)


def _shadow(rgb: RGB, skin: Mask) -> Mask:
    """Where the picture (H, W, 3) is much darker than most of its skin (H, W); hairs are too thin to count."""
    if not skin.any():
        return ~skin
    reach = max(1, min(skin.shape) // 8)
    level = cv2.blur(brightest(rgb).astype(np.float32), (reach, reach))
    return np.asarray(level < SHADOW * np.median(level[skin]))


def grown(mask: Mask, reach: int) -> Mask:
    """A mask (H, W) dilated by an ellipse of `reach` px."""
    if reach < 1:
        return mask
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel) > 0)


def bright_window(rgb: RGB) -> Mask:
    """The picture without the black rows and columns at its edges, (H, W)."""
    bright, found = brightest(rgb) > BLACK, np.zeros(rgb.shape[:2], bool)
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    if len(rows):
        found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return found
