"""Intervals against values computed elsewhere."""

from __future__ import annotations

import math

import pytest

from factory.lab.intervals import cross_validated, mean_of_two, proportion
from factory.quality.statistics import wilson


def test_a_proportion_of_eight_in_ten_has_the_textbook_interval() -> None:
    found = proportion(8, 10)
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)


def test_no_trials_know_nothing() -> None:
    assert proportion(0, 0) == {"value": None, "low": 0.0, "high": 1.0, "successes": 0, "trials": 0}


def test_the_mean_of_two_equal_proportions_is_narrower_by_the_root_of_two() -> None:
    _, low, high, _ = wilson(50, 100)
    found = mean_of_two((50, 100), (50, 100))
    assert found == pytest.approx((0.5 - (0.5 - low) / math.sqrt(2), 0.5 + (high - 0.5) / math.sqrt(2)))


def test_a_cross_validated_mean_has_a_wider_interval_than_independent_results_would() -> None:
    found = cross_validated([0.1, 0.2, 0.3, 0.4], folds=2, bounds=(-9.0, 9.0))
    deviation, t = math.sqrt(0.05 / 3), 3.182446  # of 3 degrees of freedom
    assert found["mean"] == pytest.approx(0.25)
    assert found["plain_high"] == pytest.approx(0.25 + t * deviation / 2, abs=1e-5)
    assert found["high"] == pytest.approx(0.25 + t * deviation * math.sqrt(0.25 + 1.0), abs=1e-5)


def test_an_interval_ends_where_its_values_must() -> None:
    found = cross_validated([0.7, 0.99], folds=2, bounds=(0.0, 1.0))
    assert (found["low"], found["high"], found["plain_low"], found["plain_high"]) == (0.0, 1.0, 0.0, 1.0)


def test_one_result_has_a_mean_and_no_interval() -> None:
    assert cross_validated([0.5], folds=3, bounds=(0.0, 1.0)) == {
        "mean": 0.5, "n": 1, "low": None, "high": None, "plain_low": None, "plain_high": None,
    }  # fmt: skip
