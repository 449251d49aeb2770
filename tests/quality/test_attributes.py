"""Attributes against shapes whose values are known by hand, and against phantoms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from factory import phantom, taxonomy
from factory.quality import attributes
from factory.quality.attributes import asymmetry, border_irregularity, color_shares, colors, estimate_mask, measure
from factory.quality.overlap import iou


def grid(size: int = 160) -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return x, y


@pytest.mark.parametrize("radius", [16, 24, 40, 70])
@pytest.mark.parametrize("shift", [0.0, 0.3, 0.5])
def test_a_disk_is_symmetric_and_smooth_at_any_size_and_place(radius: int, shift: float) -> None:
    x, y = grid()
    disk = (x - shift) ** 2 + (y - shift / 2) ** 2 <= radius**2
    assert asymmetry(disk) < 0.015
    assert border_irregularity(disk) < 0.03


@pytest.mark.parametrize("turn", [0.0, 0.3, 1.0])
def test_an_ellipse_is_symmetric_and_has_the_perimeter_of_ramanujan(turn: float) -> None:
    x, y = grid()
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    a, b = 60, 30
    perimeter = np.pi * (3 * (a + b) - np.sqrt((3 * a + b) * (a + 3 * b)))
    ellipse = (u / a) ** 2 + (v / b) ** 2 <= 1
    assert border_irregularity(ellipse) == pytest.approx(perimeter**2 / (4 * np.pi * np.pi * a * b) - 1, abs=0.04)
    assert asymmetry(ellipse) < 0.015


def test_a_square_and_a_scalene_triangle_have_their_textbook_values() -> None:
    x, y = grid()
    square = (np.abs(x) <= 40) & (np.abs(y) <= 40)
    assert border_irregularity(square) == pytest.approx(4 / np.pi - 1, abs=0.03)  # (8r)^2 / (4 pi 4r^2) - 1
    triangle = (x > -50) & (y > -50) & ((x + 50) / 100 + (y + 50) / 60 < 1)
    assert asymmetry(triangle) > 0.08


def test_half_a_disk_is_mirrored_across_one_axis_only() -> None:
    x, y = grid()
    half = (x**2 + y**2 <= 60**2) & (y >= 0)
    # Across its short axis it maps on itself. Across the long one, through the centroid at 4r / 3pi, the mirror
    # image's overlap is counted here on a grid four times finer.
    fine_x, fine_y = (g / 4 for g in grid(640))
    centre = 4 * 60 / (3 * np.pi)
    shape = (fine_x**2 + fine_y**2 <= 60**2) & (fine_y >= 0)
    mirror = (fine_x**2 + (2 * centre - fine_y) ** 2 <= 60**2) & (2 * centre - fine_y >= 0)
    expected = (shape ^ mirror).sum() / (2 * shape.sum()) / 2
    assert asymmetry(half) == pytest.approx(expected, abs=0.012)


def test_shape_is_the_largest_pieces_with_holes_filled() -> None:
    x, y = grid()
    disk = x**2 + y**2 <= 40**2
    holed = disk & ~(x**2 + y**2 <= 10**2)
    holed[2:6, 2:6] = True
    image = np.full((160, 160, 3), 150, np.uint8)
    assert measure(image, holed).border_irregularity == measure(image, disk).border_irregularity


@pytest.mark.parametrize("mask", [np.zeros((32, 32), bool), np.eye(32, dtype=bool) & (np.arange(32) < 8)])
def test_a_mask_without_a_lesion_is_refused(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match="at least 12 pixels"):
        measure(np.zeros((32, 32, 3), np.uint8), mask)


def test_a_hairline_shape_is_still_measured() -> None:
    line = np.zeros((40, 40), bool)
    line[20, 5:35] = True
    assert border_irregularity(line) > 2


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="of the image's size"):
        measure(np.zeros((32, 32, 3), np.uint8), np.ones((16, 16), bool))


@pytest.mark.parametrize(
    ("paint", "name"),
    [
        ((30, 25, 22), "black"), ((95, 60, 40), "dark-brown"), ((195, 150, 105), "light-brown"),
        ((205, 120, 115), "red"), ((120, 130, 150), "blue-gray"), ((240, 235, 230), "white"),
    ],
)  # fmt: skip
def test_a_plainly_painted_lesion_has_its_one_colour(paint: tuple[int, int, int], name: str) -> None:
    x, y = grid(96)
    image = np.full((96, 96, 3), (222, 184, 160), np.uint8)
    disk = x**2 + y**2 <= 22**2
    image[disk] = paint
    assert colors(image, disk) == (name,)


def test_two_halves_are_two_colours_and_shares_sum_to_one() -> None:
    x, y = grid(96)
    image = np.full((96, 96, 3), (222, 184, 160), np.uint8)
    disk = x**2 + y**2 <= 30**2
    image[disk] = (30, 25, 22)
    image[disk & (x > 0)] = (205, 120, 115)
    shares = color_shares(image, disk)
    assert set(shares) == set(taxonomy.COLORS) and sum(shares.values()) == pytest.approx(1.0)
    assert {"black", "red"} <= set(colors(image, disk)) and shares["black"] == pytest.approx(0.47, abs=0.08)


def test_a_lesion_that_fills_the_view_has_colours_by_typical_skin() -> None:
    dark = np.full((64, 64, 3), (60, 40, 30), np.uint8)
    assert "dark-brown" in colors(dark, np.ones((64, 64), bool)) or "black" in colors(dark, np.ones((64, 64), bool))


def test_phantom_truth_is_recovered() -> None:
    """160 phantoms at 128 px that no constant was fitted on: the stated accuracy of the measured captions."""
    drawn = [phantom.draw(77, index, 128) for index in range(160)]
    found = [measure(p.image, p.mask) for p in drawn]
    assert spearmanr([p.asymmetry for p in drawn], [m.asymmetry for m in found])[0] > 0.95
    assert spearmanr([p.border_irregularity for p in drawn], [m.border_irregularity for m in found])[0] > 0.9
    assert np.mean([abs(p.asymmetry - m.asymmetry) for p, m in zip(drawn, found, strict=True)]) < 0.01
    errors = np.asarray([abs(p.color_count - m.color_count) for p, m in zip(drawn, found, strict=True)])
    guess = np.median([p.color_count for p in drawn])
    assert errors.mean() < 0.75
    assert errors.mean() < np.mean([abs(p.color_count - guess) for p in drawn])


def test_estimated_masks_find_phantom_lesions() -> None:
    scores = [iou(p.mask, estimate_mask(p.image)) for p in (phantom.draw(78, index, 128) for index in range(40))]
    assert np.median(scores) > 0.75


def test_nothing_is_found_where_nothing_stands_out() -> None:
    assert not estimate_mask(np.full((64, 96, 3), 170, np.uint8)).any()
    assert not estimate_mask(np.zeros((64, 64, 3), np.uint8)).any()
    assert estimate_mask(np.full((64, 96, 3), 170, np.uint8)).shape == (64, 96)


def test_the_outline_has_as_many_points_as_a_phantoms() -> None:
    x, y = grid(64)
    line = attributes.outline(x**2 + y**2 <= 20**2)
    assert line.shape == (512, 2)
    assert np.hypot(*(line - 31.5).T) == pytest.approx(20, abs=0.5)
