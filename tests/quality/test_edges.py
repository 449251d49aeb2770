"""The contrast of a mask's contour: more than one where it lies on the lesion's edge, about one elsewhere."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from factory import phantom
from factory.quality.edges import MAX_CONTRAST, edge_contrast
from factory.quality.statistics import auc


def disk(side: int = 64, radius: float = 16.0, x: float = 32.0, y: float = 32.0) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side]
    return np.asarray((columns - x) ** 2 + (rows - y) ** 2 < radius**2)


def picture(mask: np.ndarray, noise: float = 3.0) -> np.ndarray:
    """Dark where the mask is, with noise."""
    rng = np.random.default_rng(0)
    image = np.where(mask[..., None], (110.0, 80.0, 70.0), (210.0, 175.0, 160.0)) + rng.normal(
        0, noise, (*mask.shape, 3)
    )
    return np.asarray(np.clip(image, 0, 255).astype(np.uint8))


def shifted(mask: np.ndarray, rng: np.random.Generator, step: float) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    matrix = np.array([[1, 0, step * np.cos(angle)], [0, 1, step * np.sin(angle)]])
    return cv2.warpAffine(mask.astype(np.uint8), matrix, mask.shape[::-1], flags=cv2.INTER_NEAREST) > 0


@pytest.mark.parametrize(("settings", "least"), [(phantom.DEFAULT, 0.97), (phantom.HELD_OUT, 0.9)])
def test_it_tells_true_masks_of_200_phantoms_from_those_shifted_by_a_tenth_of_the_side(
    settings: phantom.PhantomSettings, least: float
) -> None:
    rng, true, false = np.random.default_rng(0), [], []
    for drawn in phantom.draw_many(11, range(200), 128, settings=settings):
        mask = np.asarray(drawn.mask, bool)
        true.append(edge_contrast(drawn.image, mask))
        false.append(edge_contrast(drawn.image, shifted(mask, rng, 12.8)))
    assert auc(np.array(true, float), np.array(false, float)).low > least
    assert np.median(np.array(true, float)) > 1.3 and np.median(np.array(false, float)) < 1.1


def test_it_falls_as_the_contour_leaves_the_edge_inwards_outwards_and_sideways() -> None:
    image = picture(disk())
    on = edge_contrast(image, disk())
    assert on is not None and on > 4
    for other in (disk(radius=12), disk(radius=21), disk(x=38)):
        off = edge_contrast(image, other)
        assert off is not None and off < on / 2


def test_a_picture_without_an_edge_has_none_there_and_one_without_noise_a_bounded_one() -> None:
    assert edge_contrast(np.full((64, 64, 3), 128, np.uint8), disk()) == 0
    assert edge_contrast(picture(disk(), noise=0.0), disk()) == MAX_CONTRAST


def test_nothing_and_everything_have_no_contour_and_the_images_border_is_none() -> None:
    image = picture(disk())
    assert edge_contrast(image, np.zeros((64, 64), bool)) is None
    assert edge_contrast(image, np.ones((64, 64), bool)) is None
    half = np.broadcast_to(np.arange(64) < 32, (64, 64))
    cut = edge_contrast(picture(half), half)
    assert cut is not None and cut > 4


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (200, 150), (300, 400)])
def test_it_is_a_number_at_every_size_and_for_a_lesion_smaller_than_the_shift(size: tuple[int, int]) -> None:
    mask = np.zeros(size, bool)
    mask[size[0] // 2, size[1] // 2 : size[1] // 2 + 2] = True
    found = edge_contrast(picture(mask), mask)
    assert found is not None and np.isfinite(found)


def test_hairs_across_the_contour_change_it_little() -> None:
    image = picture(disk(128, 32, 64, 64))
    hairy = image.copy()
    for at in range(10, 128, 24):
        cv2.line(hairy, (0, at), (127, at - 20), (30, 25, 20), 1)
    clean, found = (edge_contrast(shown, disk(128, 32, 64, 64)) for shown in (image, hairy))
    assert clean is not None and found is not None and found > clean / 3 and found > 3
