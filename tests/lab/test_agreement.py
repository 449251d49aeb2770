"""Krippendorff's alpha on published data, and against his definition written out pair by pair."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from factory.lab.agreement import LEVELS, alpha, alpha_interval, pairwise_agreement

NA = math.nan

# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", section C: four observers, twelve units, missing
# values. He prints .743 nominal, .815 ordinal and .849 interval.
FOUR_OBSERVERS = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NA, NA, NA],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NA, 3],
    [NA, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NA],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NA],
]
# The same paper, section A: binary data of two observers without missing values, alpha .095.
TWO_OBSERVERS_BINARY = [[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]
# Section B: nominal data of two observers, alpha .692; a to e as 1 to 5.
TWO_OBSERVERS = [[1, 1, 2, 2, 4, 3, 3, 3, 5, 4, 4, 1], [2, 1, 2, 2, 2, 3, 3, 3, 5, 4, 4, 4]]
# "Krippendorff's alpha" in Wikipedia, "A computational example": three coders, fifteen units, .691 and .811.
THREE_CODERS = [
    [NA, NA, NA, NA, NA, 3, 4, 1, 2, 1, 1, 3, 3, NA, 3],
    [1, NA, 2, 1, 3, 3, 4, 3, NA, NA, NA, NA, NA, NA, NA],
    [NA, NA, 2, 1, 3, 4, 4, NA, 2, 1, 1, 3, 3, NA, 4],
]


@pytest.mark.parametrize(
    ("ratings", "level", "printed"),
    [
        (FOUR_OBSERVERS, "nominal", 0.743), (FOUR_OBSERVERS, "ordinal", 0.815), (FOUR_OBSERVERS, "interval", 0.849),
        (TWO_OBSERVERS_BINARY, "nominal", 0.095), (TWO_OBSERVERS, "nominal", 0.692),
        (THREE_CODERS, "nominal", 0.691), (THREE_CODERS, "interval", 0.811),
    ],
)  # fmt: skip
def test_published_worked_examples_come_out_as_printed(ratings: list[list[float]], level: str, printed: float) -> None:
    assert alpha(ratings, level) == pytest.approx(printed, abs=0.0005)


def written_out(ratings: np.ndarray, level: str) -> float:
    """Alpha by its definition: mean squared distance of pairs within units over that of all pairs, in plain loops."""
    units = [[v for v in unit if not math.isnan(v)] for unit in ratings.T.tolist()]
    units = [unit for unit in units if len(unit) > 1]
    pooled = [v for unit in units for v in unit]
    times = Counter(pooled)
    ordered = sorted(times)

    def ordinal(a: float, b: float) -> float:
        a, b = min(a, b), max(a, b)
        between = sum(times[v] for v in ordered[ordered.index(a) : ordered.index(b) + 1])
        return (between - (times[a] + times[b]) / 2) ** 2 if a != b else 0.0

    metrics: dict[str, Callable[[float, float], float]] = {
        "nominal": lambda a, b: float(a != b), "ordinal": ordinal, "interval": lambda a, b: (a - b) ** 2,
    }  # fmt: skip
    distance = metrics[level]

    def total(values: list[float]) -> float:
        return sum(distance(a, b) for i, a in enumerate(values) for j, b in enumerate(values) if i != j)

    n = len(pooled)
    observed = sum(total(unit) / (len(unit) - 1) for unit in units) / n
    expected = total(pooled) / (n * (n - 1))
    return 1 - observed / expected


@pytest.mark.parametrize("level", LEVELS)
def test_alpha_is_its_definition_on_random_ratings_with_gaps(level: str) -> None:
    rng = np.random.default_rng(5)
    for raters, units, values in ((2, 9, 2), (3, 14, 5), (6, 20, 4), (4, 7, 9)):
        ratings = rng.integers(0, values, (raters, units)).astype(float) ** 1.5  # uneven steps, for the interval level
        ratings[rng.random(ratings.shape) < 0.35] = NA
        assert alpha(ratings, level) == pytest.approx(written_out(ratings, level), abs=1e-12)


def test_units_with_one_rating_change_nothing() -> None:
    more = np.hstack([np.array(FOUR_OBSERVERS), [[NA] * 2, [4, NA], [NA] * 2, [NA, NA]]])
    for level in LEVELS:
        assert alpha(more, level) == pytest.approx(alpha(FOUR_OBSERVERS, level), abs=1e-12)


def test_equal_raters_have_one_and_raters_without_variation_or_pairs_none() -> None:
    assert alpha([[1, 2, 5], [1, 2, 5]], "ordinal") == 1.0
    assert math.isnan(alpha([[3, 3], [3, 3]], "ordinal"))
    assert math.isnan(alpha([[1, NA], [NA, 2]], "interval"))
    assert math.isnan(alpha(np.empty((2, 0)), "nominal"))
    found = alpha_interval([[3, 3], [3, 3]], "ordinal")
    assert found.as_json() == {
        "value": None, "low": None, "high": None, "num_units": 2, "num_ratings": 4, "num_groups": 2,
    }  # fmt: skip


def test_the_interval_holds_the_value_narrows_with_units_and_is_the_same_for_a_seed() -> None:
    rng = np.random.default_rng(1)
    truth = rng.integers(1, 6, 400)
    ratings = np.clip([truth + rng.integers(-1, 2, 400) for _ in range(3)], 1, 5)
    small, large = (alpha_interval(ratings[:, :n], "ordinal", num_resamples=400) for n in (40, 400))
    assert small.low < small.value < small.high
    assert large.high - large.low < 0.6 * (small.high - small.low)
    assert small == alpha_interval(ratings[:, :40], "ordinal", num_resamples=400)
    assert small != alpha_interval(ratings[:, :40], "ordinal", num_resamples=400, seed=1)
    assert large.num_units == large.num_groups == 400 and large.num_ratings == 1200


def test_the_interval_covers_the_alpha_of_the_population_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)

    def sample(units: int) -> np.ndarray:
        truth = rng.integers(1, 6, units)
        return np.clip([truth + rng.integers(-1, 2, units) for _ in range(2)], 1, 5)

    true = alpha(sample(60_000), "ordinal")
    hits = [
        f.low <= true <= f.high for f in (alpha_interval(sample(80), "ordinal", num_resamples=150) for _ in range(60))
    ]
    assert 0.86 <= np.mean(hits) <= 1.0


def test_copied_units_of_one_group_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(3)
    ratings = rng.integers(1, 6, (2, 30)).astype(float)
    groups = [str(i) for i in range(30)]
    alone = alpha_interval(ratings, "interval", groups, num_resamples=500)
    copied = alpha_interval(np.repeat(ratings, 4, axis=1), "interval", np.repeat(groups, 4).tolist(), num_resamples=500)
    blind = alpha_interval(np.repeat(ratings, 4, axis=1), "interval", num_resamples=500)
    assert copied.num_groups == alone.num_groups == 30
    assert copied.high - copied.low > 0.85 * (alone.high - alone.low)
    assert blind.high - blind.low < 0.7 * (alone.high - alone.low)


def test_pairwise_shares_count_the_units_both_rated() -> None:
    found = pairwise_agreement([[1, 2, 3, NA], [1, 3, NA, 4], [1, 2, 1, 4]], ["a", "b", "c"])
    assert [(f["raters"], f["successes"], f["trials"]) for f in found] == [
        (["a", "b"], 1, 2), (["a", "c"], 2, 3), (["b", "c"], 2, 3),
    ]  # fmt: skip
    assert pairwise_agreement([[1, 2], [2, 2]], ["a", "b"], within=1)[0]["value"] == 1.0
    assert pairwise_agreement([[NA], [2]], ["a", "b"])[0]["value"] is None
    assert found[1]["low"] == pytest.approx(0.2077, abs=1e-3)  # Wilson, 2 of 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: alpha([[1, 2], [1, 2]], "ratio"), "level must be one of nominal, ordinal, interval, got 'ratio'"),
        (lambda: alpha([1, 2], "nominal"), "ratings must be finite numbers"),  # type: ignore[list-item]
        (lambda: alpha([[1, math.inf]], "interval"), "ratings must be finite numbers"),
        (lambda: alpha_interval([[1, 2], [1, 2]], "nominal", ["a"]), "groups must have one label per unit, got 1"),
        (lambda: pairwise_agreement([[1], [2]], ["a"]), "raters must have one name per row, got 1 for 2"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
