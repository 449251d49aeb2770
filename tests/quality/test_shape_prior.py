"""The shape prior: a mask comes back from its description, and what is drawn looks like what was seen."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from factory import phantom
from factory.images import Mask
from factory.quality import shape_prior
from factory.quality.overlap import iou
from factory.quality.policy import shape_scores
from factory.quality.shape_prior import MIN_MASKS, ShapePrior, describe, render


def ellipse(size: int, x: float, y: float, a: float, b: float, angle: float = 0.0) -> Mask:
    box = ((x, y), (2 * a, 2 * b), angle)
    return np.asarray(cv2.ellipse(np.zeros((size, size), np.uint8), box, 1, -1) > 0)


@pytest.fixture(scope="module")
def phantoms() -> list[tuple[Mask, str]]:
    found = [phantom.draw(3, number, 64) for number in range(120)]
    return [(drawn.mask, drawn.diagnosis) for drawn in found]


@pytest.fixture(scope="module")
def prior(phantoms: list[tuple[Mask, str]]) -> ShapePrior:
    return ShapePrior.fit([mask for mask, _ in phantoms], [name for _, name in phantoms])


def test_a_disk_has_no_harmonics_and_its_own_area_and_centre() -> None:
    found = describe(ellipse(128, 40, 70, 20, 20))
    assert found is not None and len(found) == 3 + 2 * shape_prior.ORDER
    assert math.exp(found[0]) == pytest.approx(math.pi * 20**2 / 128**2, rel=0.06)
    assert found[1:3] == pytest.approx([40.5 / 128, 70.5 / 128], abs=0.005)
    assert np.abs(found[3:]).max() < 0.01


def test_an_ellipse_is_mostly_its_second_harmonic() -> None:
    found = describe(ellipse(128, 64, 64, 40, 20))
    assert found is not None
    harmonics = np.hypot(found[3 : 3 + shape_prior.ORDER], found[3 + shape_prior.ORDER :])
    assert harmonics.argmax() == 1 and harmonics[1] > 5 * np.delete(harmonics, [1, 3]).max()


def test_a_mask_comes_back_from_its_description_at_any_size(phantoms: list[tuple[Mask, str]]) -> None:
    masks = [mask for mask, _ in phantoms[:24] if not (mask[[0, -1]].any() or mask[:, [0, -1]].any())]
    assert len(masks) > 8
    again = [render(described, 64) for mask in masks if (described := describe(mask)) is not None]
    assert float(np.median(iou(np.stack(masks), np.stack(again)))) > 0.9
    for mask in masks[:4]:
        described = describe(mask)
        assert described is not None
        larger = render(described, 256)
        assert larger.mean() == pytest.approx(mask.mean(), rel=0.15)


def test_a_description_is_a_function_of_the_mask_alone_whatever_memory_held() -> None:
    """A lesion at the image's edge: its reach goes beyond it."""
    mask = ellipse(64, 8, 30, 14, 20)
    first = describe(mask)
    for value in (1.0, 0.0, 7.0):
        held = np.full((64, shape_prior.ANGLES, shape_prior.RADII), value, np.float32)
        del held  # memory that the next picture may be given
        np.testing.assert_array_equal(describe(mask), first)
    assert first is not None and np.abs(first[3:]).max() < 0.5


def test_only_the_largest_piece_counts_and_its_holes_are_filled() -> None:
    whole = ellipse(64, 30, 30, 14, 14)
    torn = whole & ~ellipse(64, 30, 30, 4, 4) | ellipse(64, 55, 55, 3, 3)
    np.testing.assert_array_equal(describe(torn), describe(whole))
    assert describe(np.zeros((8, 8), bool)) is None


def test_what_is_drawn_lies_inside_and_has_areas_that_were_seen(
    prior: ShapePrior, phantoms: list[tuple[Mask, str]]
) -> None:
    rng = np.random.default_rng(0)
    drawn = [prior.sample(rng, name, 64) for name in ("nevus", "melanoma", "dermatofibroma") for _ in range(60)]
    areas = np.array([mask.mean() for mask in drawn])
    seen = np.array([mask.mean() for mask, _ in phantoms])
    assert all(mask.any() and not mask[[0, -1]].any() and not mask[:, [0, -1]].any() for mask in drawn)
    assert 0.9 * seen.min() < areas.min() and areas.max() < 1.1 * seen.max() + 0.02
    assert np.log(areas).mean() == pytest.approx(np.log(seen).mean(), abs=0.5 * np.log(seen).std())
    assert len({mask.tobytes() for mask in drawn}) == len(drawn)
    solid, wanted = (
        np.median([shape_scores(mask)["score_solidity"] for mask in masks])
        for masks in (drawn, [mask for mask, _ in phantoms])
    )
    assert solid == pytest.approx(wanted, abs=0.03)  # as smooth as what was seen


def test_draws_are_a_function_of_the_seed(prior: ShapePrior) -> None:
    one, same, other = (prior.sample(np.random.default_rng(seed), "nevus", 32) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_a_star_is_far_from_lesions_and_lesions_are_near(prior: ShapePrior, phantoms: list[tuple[Mask, str]]) -> None:
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radius = np.where(np.arange(60) % 10 < 5, 24, 8)
    points = np.stack([32 + radius * np.cos(angle), 32 + radius * np.sin(angle)], axis=1).round().astype(np.int32)
    star = cv2.fillPoly(np.zeros((64, 64), np.uint8), [points], 1) > 0
    distances = sorted(prior.mahalanobis(mask, name) for mask, name in phantoms)
    assert prior.mahalanobis(star) > distances[-1]
    # The mean square distance of what a Gaussian was fitted on is its dimension, but for the shrinkage.
    assert np.mean(np.square(distances)) == pytest.approx(3 + 2 * shape_prior.ORDER, rel=0.5)
    assert prior.log_density(star) < min(prior.log_density(mask) for mask, _ in phantoms)
    nothing = np.zeros((64, 64), bool)
    assert prior.mahalanobis(nothing) == math.inf and prior.log_density(nothing) == -math.inf


def test_the_log_density_is_that_of_a_gaussian(prior: ShapePrior, phantoms: list[tuple[Mask, str]]) -> None:
    from scipy.stats import multivariate_normal

    row = describe(phantoms[0][0])
    assert row is not None
    wanted = multivariate_normal(prior.pool.mean, prior.pool.covariance).logpdf(row)
    assert prior.pool.log_density(row) == pytest.approx(wanted)


def test_a_diagnosis_with_few_masks_is_given_what_all_have() -> None:
    rng = np.random.default_rng(0)
    large = [ellipse(64, 32, 32, *rng.uniform(18, 24, 2)) for _ in range(MIN_MASKS)]
    small = [ellipse(64, 32, 32, *rng.uniform(5, 7, 2)) for _ in range(MIN_MASKS)]
    rare = [ellipse(64, 32, 32, 12, 12)]
    prior = ShapePrior.fit([*large, *small, *rare], ["nevus"] * MIN_MASKS + ["melanoma"] * MIN_MASKS + ["scar"])
    assert set(prior.by_diagnosis) == {"nevus", "melanoma"}
    assert prior.of("scar") is prior.of(None) is prior.pool and prior.pool.count == 2 * MIN_MASKS + 1
    areas = [
        np.mean([prior.sample(np.random.default_rng(k), name, 64).mean() for k in range(10)])
        for name in ("nevus", "melanoma")
    ]
    assert areas[0] > 5 * areas[1]


def test_it_is_saved_and_loaded_to_the_last_bit(prior: ShapePrior, tmp_path: Path) -> None:
    prior.save(tmp_path / "prior.json")
    again = ShapePrior.load(tmp_path / "prior.json")
    assert set(again.by_diagnosis) == set(prior.by_diagnosis)
    for one, other in zip((again.pool, again.of("nevus")), (prior.pool, prior.of("nevus")), strict=True):
        assert np.array_equal(one.covariance, other.covariance) and np.array_equal(one.mean, other.mean)
        assert (one.count, one.log_area) == (other.count, other.log_area)
    (tmp_path / "prior.json").write_text('{"order": 3}')
    with pytest.raises(ValueError, match="a shape prior must have 8 harmonics, got 3 in"):
        ShapePrior.load(tmp_path / "prior.json")


def test_one_mask_is_no_prior() -> None:
    with pytest.raises(ValueError, match="must be fitted on at least two masks that are not empty, got 1"):
        ShapePrior.fit([ellipse(32, 16, 16, 5, 5), np.zeros((32, 32), bool)], ["nevus", "nevus"])


def test_a_mask_of_thousands_of_pieces_costs_no_canvas_for_each() -> None:
    import tracemalloc

    noisy = np.random.default_rng(0).random((512, 512)) < 0.06
    noisy[200:260, 200:260] = True
    tracemalloc.start()
    described = describe(noisy)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()
    assert described is not None and math.exp(described[0]) == pytest.approx(60**2 / 512**2, rel=0.1)
