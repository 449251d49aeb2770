"""Attributes against shapes whose values are known by hand, and against phantoms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from factory import phantom, taxonomy
from factory.quality import attributes
from factory.quality.attributes import (
    abrupt_octants,
    asymmetry,
    border_irregularity,
    color_asymmetry,
    color_shares,
    colors,
    estimate_mask,
    estimated,
    fractal_dimension,
    measure,
    outline,
    radial_variance,
    separability,
    unstretched,
    view,
)
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


SKIN, BROWN = (222, 184, 160), (95, 60, 40)


def painted(mask: np.ndarray, paint: tuple[int, int, int] = BROWN) -> np.ndarray:
    """A lesion of one colour on skin of one colour."""
    image = np.full((*mask.shape, 3), SKIN, np.uint8)
    image[mask] = paint
    return image


def test_radial_variance_is_that_of_an_ellipse_computed_from_its_equation() -> None:
    x, y = grid()
    assert radial_variance(outline(x**2 + y**2 <= 50**2)) < 0.005
    a, b = 60, 30
    t = np.linspace(0, 2 * np.pi, 20000, endpoint=False)
    steps = np.hypot(a * np.sin(t), b * np.cos(t))  # points are even along the line, not in the angle
    distance = np.hypot(a * np.cos(t), b * np.sin(t))
    mean = np.average(distance, weights=steps)
    expected = np.sqrt(np.average((distance - mean) ** 2, weights=steps)) / mean
    assert radial_variance(outline((x / a) ** 2 + (y / b) ** 2 <= 1)) == pytest.approx(expected, abs=0.01)


def test_fractal_dimension_is_one_for_a_disk_and_that_of_koch_for_a_snowflake() -> None:
    angle = np.linspace(0, 2 * np.pi, 512, endpoint=False)
    disk = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert fractal_dimension(disk) == pytest.approx(1.0, abs=0.03)
    flake = np.exp(-2j * np.pi * np.arange(4) / 3)  # a triangle, closed
    for _ in range(5):
        ends = flake[1:] - flake[:-1]
        tip = flake[:-1] + ends * (0.5 + 1j * np.sqrt(3) / 6)
        flake = np.concatenate(
            [np.stack([flake[:-1], flake[:-1] + ends / 3, tip, flake[:-1] + ends * 2 / 3], axis=1).ravel(), flake[-1:]]
        )
    along = np.linspace(0, len(flake) - 1, 512, endpoint=False)  # every side has the same length
    at = np.interp(along, np.arange(len(flake)), flake.real), np.interp(along, np.arange(len(flake)), flake.imag)
    assert fractal_dimension(np.stack(at, axis=1)) == pytest.approx(np.log(4) / np.log(3), abs=0.08)


def test_a_sharp_edge_ends_abruptly_in_all_octants_and_a_faded_one_in_none() -> None:
    x, y = grid(128)
    disk = x**2 + y**2 <= 36**2
    assert measure(painted(disk), disk).abrupt_octants == 8
    far = np.clip((np.hypot(x, y) - 16) / 40, 0, 1)[..., None]  # from brown to skin over 40 px
    faded = np.round((1 - far) * np.asarray(BROWN) + far * np.asarray(SKIN)).astype(np.uint8)
    assert measure(faded, disk).abrupt_octants == 0


def test_a_disk_with_one_sharp_half_ends_abruptly_in_that_half_alone() -> None:
    x, y = grid(128)
    ellipse = (x / 44) ** 2 + (y / 30) ** 2 <= 1
    lab = np.zeros((128, 128, 3), np.float32)
    lab[ellipse & (y > 0), 0] = 50.0  # a difference of 50 below the long axis, none above
    assert abrupt_octants(lab, outline(ellipse)) == 4


def test_a_pale_lesion_has_too_little_contrast_to_end_abruptly() -> None:
    x, y = grid(128)
    disk = x**2 + y**2 <= 36**2
    for difference, expected in ((7.0, 0), (9.0, 8)):
        lab = np.zeros((128, 128, 3), np.float32)
        lab[disk, 0] = difference
        assert abrupt_octants(lab, outline(disk)) == expected


def test_an_octant_beyond_the_image_does_not_count_as_abrupt() -> None:
    x, y = grid(96)
    half = (x**2 + (y - 47.5) ** 2) <= 30**2  # cut through its middle by the lower edge
    assert 3 <= measure(painted(half), half).abrupt_octants < 8


def test_colour_asymmetry_is_nought_for_mirrored_colours_and_counts_halves() -> None:
    x, y = grid(128)
    ellipse = (x / 50) ** 2 + (y / 30) ** 2 <= 1
    even, rings, halves = painted(ellipse), painted(ellipse), painted(ellipse)
    rings[(x / 25) ** 2 + (y / 15) ** 2 <= 1] = (30, 25, 22)
    halves[ellipse & (x > 0)] = (30, 25, 22)
    found = [color_asymmetry(view(image, ellipse)) for image in (even, rings, halves)]
    assert found[0] < 1 and found[1] < 2.5
    # Across the short axis every pixel meets the other colour, across the long one its own: half of the difference.
    lab = view(halves, ellipse).lab
    gap = np.linalg.norm(lab[64, 40] - lab[64, 88])
    assert found[2] == pytest.approx(gap / 2, rel=0.1)


def test_measurements_are_of_all_the_image_holds_and_shares_follow_the_vocabulary() -> None:
    x, y = grid(128)
    disk = x**2 + y**2 <= 32**2
    found = measure(painted(disk, (30, 25, 22)), disk, mm_per_pixel=0.1)
    assert found.relative_diameter == pytest.approx(64 / 128, abs=0.015)
    assert found.diameter_mm == pytest.approx(6.4, abs=0.15)
    assert measure(painted(disk), disk).diameter_mm is None
    assert found.color_shares[taxonomy.COLORS.index("black")] == pytest.approx(1.0, abs=0.02)
    assert found.asymmetry == pytest.approx(sum(found.asymmetry_axes) / 2)


def test_a_squeezed_disk_is_a_disk_again_once_it_is_unstretched() -> None:
    x, y = grid(120)
    squeezed = (x / 30) ** 2 + (y / 40) ** 2 <= 1  # a disk of a 4:3 picture in a square
    image = painted(squeezed)
    assert measure(image, squeezed).radial_variance > 0.08
    found = measure(image, squeezed, unstretch=4 / 3)
    assert found.radial_variance < 0.01 and found.border_irregularity < 0.04
    assert found.relative_diameter == pytest.approx(80 / 120, abs=0.02)


@pytest.mark.parametrize(("aspect", "shape"), [(4 / 3, (90, 120)), (0.5, (180, 90)), (1.0, (90, 90))])
def test_unstretching_grows_the_side_that_is_too_short(aspect: float, shape: tuple[int, int]) -> None:
    assert unstretched(np.zeros((90, 90, 3), np.uint8), aspect).shape == (*shape, 3)
    assert unstretched(np.zeros((90, 90), bool), aspect).shape == shape


@pytest.mark.parametrize("aspect", [0.0, -1.0, 40.0])
def test_an_aspect_that_no_camera_has_is_refused(aspect: float) -> None:
    with pytest.raises(ValueError, match="unstretch must be a width over height"):
        unstretched(np.zeros((8, 8, 3), np.uint8), aspect)


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan")])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    x, y = grid(64)
    disk = x**2 + y**2 <= 20**2
    with pytest.raises(ValueError, match="mm_per_pixel must be above 0"):
        measure(painted(disk), disk, mm_per_pixel=scale)


def test_one_lesion_has_nearly_the_same_colours_and_shape_at_two_sizes() -> None:
    small, large = (phantom.draw(79, 3, size) for size in (128, 256))
    one, two = measure(small.image, small.mask), measure(large.image, large.mask)
    assert np.abs(np.subtract(one.color_shares, two.color_shares)).max() < 0.12
    assert one.asymmetry == pytest.approx(two.asymmetry, abs=0.01)
    assert one.relative_diameter == pytest.approx(two.relative_diameter, abs=0.02)


def test_separability_is_one_for_two_values_and_three_quarters_for_an_even_spread() -> None:
    values = np.asarray([0.0] * 30 + [5.0] * 10)
    assert separability(values, values > 1) == pytest.approx(1.0)
    even = np.linspace(0, 1, 10000)
    assert separability(even, even > 0.5) == pytest.approx(0.75, abs=0.001)  # (1/4)(1/2)^2 over 1/12
    assert separability(even, even > 2) == 0.0 and separability(np.ones(9), np.arange(9) > 4) == 0.0


def test_a_plain_lesion_is_found_with_more_confidence_than_one_in_noise() -> None:
    x, y = grid(128)
    disk = x**2 + y**2 <= 30**2
    clear = painted(disk)
    noise = np.random.default_rng(0).normal(0, 1, (128, 128, 3))
    faint = np.clip(np.full((128, 128, 3), SKIN) - 6.0 * disk[..., None] + 25 * noise, 0, 255).astype(np.uint8)
    (mask, sure), (_, unsure) = estimated(clear), estimated(faint)
    assert iou(disk, mask) > 0.85 and sure > 0.85
    assert unsure < sure - 0.15
    assert estimated(np.zeros((64, 64, 3), np.uint8))[1] == 0.0
