"""Intervals against textbook values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from factory.quality.statistics import bootstrap, mean_interval, wilson


def test_students_t_of_five_seeds() -> None:
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    # mean 3, sd 1.5811, t(0.975, 4) = 2.7764
    assert (found.value, found.num) == (3.0, 5)
    assert found.high == pytest.approx(3 + 2.7764 * 1.5811 / math.sqrt(5), abs=1e-3)
    assert found.low == pytest.approx(6 - found.high)


def test_one_observation_has_no_bounds_and_none_is_refused() -> None:
    alone = mean_interval([0.4])
    assert alone.value == 0.4 and math.isnan(alone.low) and alone.num == 1
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite and at least one"):
            mean_interval(bad)


def test_wilson_of_eight_in_ten() -> None:
    found = wilson(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))


def test_wilson_at_the_ends_stays_between_zero_and_one() -> None:
    assert wilson(0, 20).low == 0.0 and wilson(20, 20).high == 1.0
    assert wilson(0, 0)[1:] == (0.0, 1.0, 0)
    with pytest.raises(ValueError, match="from 0 to trials"):
        wilson(3, 2)


def test_rows_of_one_group_do_not_count_as_independent() -> None:
    rng = np.random.default_rng(1)
    means = np.repeat(rng.normal(size=20), 25)
    groups = np.repeat(np.arange(20), 25)
    clustered = bootstrap(np.mean, groups, means, num_resamples=400)
    naive = bootstrap(np.mean, np.arange(500), means, num_resamples=400)
    assert clustered.num == 20 and naive.num == 500
    assert (clustered.high - clustered.low) > 3 * (naive.high - naive.low)
    assert clustered.low < clustered.value < clustered.high
    assert clustered == bootstrap(np.mean, groups, means, num_resamples=400)


def test_resamples_without_a_value_are_left_out() -> None:
    never = bootstrap(lambda x: float("nan"), ["a", "b"], np.ones(2), num_resamples=5)
    assert math.isnan(never.low) and never.num == 2
    with pytest.raises(ValueError, match="one entry per group label"):
        bootstrap(np.mean, ["a", "b"], np.ones(3))
