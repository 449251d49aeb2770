"""Normal skin: the largest square clear of lesion, border and vignette, and why there is none."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from factory import phantom
from factory.images import RGB, Mask
from factory.quality.normal_skin import Box, bright_window, grown, normal_square
from factory.quality.skin_tone import vignette_mask


def skin(height: int = 60, width: int = 80) -> RGB:
    return np.full((height, width, 3), (200, 160, 140), np.uint8)


def rectangle(left: int, top: int, right: int, bottom: int, height: int = 60, width: int = 80) -> Mask:
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def largest_by_trying(clear: Mask) -> int:
    """The side of the largest clear square, by the textbook recursion."""
    best = np.zeros(clear.shape, int)
    for y, x in np.argwhere(clear):
        best[y, x] = 1 + (min(best[y - 1, x], best[y, x - 1], best[y - 1, x - 1]) if y and x else 0)
    return int(best.max())


def test_the_square_lies_beside_the_lesion() -> None:
    box = normal_square(skin(), rectangle(0, 0, 39, 60), min_side=10, margin=0.0)
    assert isinstance(box, Box) and box == (39, 0, 41)
    assert normal_square(skin(), rectangle(0, 0, 39, 60), min_side=42, margin=0.0) == "no_normal_skin"


def test_it_keeps_its_margin_from_the_lesion() -> None:
    box = normal_square(skin(), rectangle(0, 0, 40, 60), min_side=10, margin=0.1)  # 6 px of 60
    assert isinstance(box, Box) and box.left == 46 and box.side == 33


@pytest.mark.parametrize("index", range(6))
def test_it_is_the_largest_to_one_pixel_and_touches_nothing(index: int) -> None:
    drawn = phantom.draw(5, index, 96)
    found = normal_square(drawn.image, drawn.mask, min_side=3, margin=0.05)
    clear = bright_window(drawn.image) & ~grown(drawn.mask, 5) & ~vignette_mask(drawn.image)
    assert isinstance(found, Box)
    assert largest_by_trying(clear) - 1 <= found.side <= largest_by_trying(clear)
    assert clear[found.top : found.top + found.side, found.left : found.left + found.side].all()
    assert found.of(drawn.image).shape == (found.side, found.side, 3)


def test_black_borders_and_vignettes_are_no_skin() -> None:
    framed = np.pad(skin(40, 40), ((10, 10), (20, 20), (0, 0)))
    box = normal_square(framed, np.zeros((60, 80), bool), min_side=10, margin=0.0)
    assert isinstance(box, Box) and box.left >= 20 and box.top >= 10 and box.side == 35  # 40 less a margin of 2 px
    tube = cv2.circle(np.zeros((90, 90, 3), np.uint8), (45, 45), 40, (200, 160, 140), -1)
    inside = normal_square(tube, np.zeros((90, 90), bool), min_side=10, margin=0.0)
    assert isinstance(inside, Box) and 30 <= inside.side <= 57  # 80 / sqrt(2), less the vignette's own margin
    assert (inside.of(tube) > 100).all()


def test_what_gives_no_square_has_a_reason() -> None:
    assert normal_square(skin(), None, min_side=4) == "no_mask"
    assert normal_square(skin(), np.ones((60, 80), bool), min_side=1) == "no_normal_skin"
    assert normal_square(np.zeros((60, 80, 3), np.uint8), rectangle(0, 0, 2, 2), min_side=1) == "no_normal_skin"


def test_a_mask_grows_by_an_ellipse() -> None:
    point = np.zeros((9, 9), bool)
    point[4, 4] = True
    assert grown(point, 0) is point
    assert grown(point, 1).sum() == 5 and grown(point, 2)[2, 4] and not grown(point, 2)[2, 2]


def test_a_shadow_that_falls_across_the_skin_is_kept_clear_of() -> None:
    rgb = np.full((64, 64, 3), 180, np.uint8)
    rgb[:, :24] = np.linspace(20, 90, 24, dtype=np.uint8)[:, None]  # from black to a dim half
    mask = np.zeros((64, 64), bool)
    mask[30:34, 60:64] = True
    box = normal_square(rgb, mask, 8)
    assert isinstance(box, Box) and box.left >= 24 - 4 and box.of(rgb).mean() > 160
    rgb[::6, 30:] = 40  # hairs: dark, and too thin to be shadow
    hairy = normal_square(rgb, mask, 8)
    assert isinstance(hairy, Box) and hairy.side >= box.side - 4
