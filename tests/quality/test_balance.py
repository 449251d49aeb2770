"""Sampling weights against shares worked out by hand, and what the cap promises for any cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory.quality.balance import capped, effective_size, sampling_weights, targeted, tempered

CELLS = np.repeat([0, 1, 2], [100, 25, 4])  # roots 10, 5 and 2


def test_square_root_sampling_draws_cells_by_the_root_of_their_size() -> None:
    weights = sampling_weights(CELLS, alpha=0.5)
    assert np.bincount(CELLS, weights) == pytest.approx([10 / 17, 5 / 17, 2 / 17])
    assert weights[0] == pytest.approx(10 / 17 / 100) and weights[-1] == pytest.approx(2 / 17 / 4)


def test_alpha_one_leaves_the_data_as_they_are_and_alpha_zero_makes_cells_equal() -> None:
    assert sampling_weights(CELLS, alpha=1.0) == pytest.approx(np.full(129, 1 / 129))
    assert np.bincount(CELLS, sampling_weights(CELLS, alpha=0.0)) == pytest.approx([1 / 3] * 3)


def test_no_image_is_drawn_more_often_than_the_cap_and_the_rest_goes_to_the_others_in_proportion() -> None:
    weights = sampling_weights(CELLS, alpha=0.0, max_repeat=2.0)
    shares = np.bincount(CELLS, weights)
    # In 129 draws each cell would have 43. That of 4 images may have 8, so the other two have 60.5 each; that of 25
    # may have 50, and what is left is 71.
    assert shares * 129 == pytest.approx([71, 50, 8])
    assert (weights * 129).max() == pytest.approx(2.0)


def test_a_cap_of_one_is_the_data_as_they_are() -> None:
    assert sampling_weights(CELLS, alpha=0.0, max_repeat=1.0) == pytest.approx(np.full(129, 1 / 129))


def test_targets_are_shares_of_classes_and_sources_are_tempered_within() -> None:
    cells, classes = np.repeat([0, 1, 2], [90, 10, 20]), np.array([0, 0, 1])  # class 0 is of two sources
    weights = sampling_weights(cells, alpha=0.5, classes=classes, targets={0: 1.0, 1: 1.0})
    shares = np.bincount(cells, weights)
    assert shares[:2].sum() == pytest.approx(0.5) and shares[2] == pytest.approx(0.5)
    assert shares[0] / shares[1] == pytest.approx(3.0)  # the root of 9


def test_rows_that_may_not_be_drawn_have_no_weight() -> None:
    weights = sampling_weights(np.array([0, -1, 1, -1, 1]), alpha=1.0)
    assert weights == pytest.approx([1 / 3, 0, 1 / 3, 0, 1 / 3])


def test_kishs_effective_size() -> None:
    assert effective_size(np.full(50, 0.02)) == pytest.approx(50)
    assert effective_size(np.array([3.0, 1.0])) == pytest.approx(16 / 10)
    assert effective_size(np.array([1.0, 0.0, 0.0])) == 1.0 and effective_size(np.zeros(3)) == 0.0
    # Square roots of 100, 25 and 4: each row's weight is root / n / 17.
    squares = (10**2 / 100 + 5**2 / 25 + 2**2 / 4) / 17**2
    assert effective_size(sampling_weights(CELLS)) == pytest.approx(1 / squares)


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=12), st.floats(0, 1), st.floats(1, 50),
)  # fmt: skip
def test_weights_sum_to_one_and_keep_the_cap_whatever_the_cells(sizes: list[int], alpha: float, cap: float) -> None:
    cells = np.repeat(np.arange(len(sizes)), sizes)
    weights = sampling_weights(cells, alpha=alpha, max_repeat=cap)
    assert math.isclose(weights.sum(), 1.0, rel_tol=1e-9)
    assert (weights * len(cells)).max() <= cap * (1 + 1e-9)
    assert 0 < effective_size(weights) <= len(cells) * (1 + 1e-9)
    free = tempered(np.array(sizes), alpha)
    shares = capped(free, np.array(sizes), cap)
    below = shares * len(cells) / sizes < cap * (1 - 1e-6)
    assert np.ptp((shares / free)[below]) < 1e-9 * len(cells) if below.any() else True  # one factor for all below it


def test_what_cannot_be_drawn_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="alpha must be from 0"):
        sampling_weights(CELLS, alpha=1.5)
    with pytest.raises(ValueError, match="max_repeat must be at least 1 .*raise it"):
        sampling_weights(CELLS, max_repeat=0.5)
    with pytest.raises(ValueError, match="must number at least one row"):
        sampling_weights(np.array([-1, -1]))
    with pytest.raises(ValueError, match="classes must say the class of each cell"):
        sampling_weights(CELLS, targets={0: 1.0})
    with pytest.raises(ValueError, match="targets must name a class that has images"):
        targeted(np.array([5]), np.array([0]), {3: 1.0}, 0.5)
    with pytest.raises(ValueError, match="targets must be shares of 0 or more"):
        targeted(np.array([5]), np.array([0]), {0: -1.0}, 0.5)
    # Half of the images have no target: those of the other half must be drawn twice at least.
    with pytest.raises(ValueError, match="max_repeat must be at least 2"):
        sampling_weights(np.array([0, 0, 1, 1]), classes=np.array([0, 1]), targets={0: 1.0}, max_repeat=1.5)
