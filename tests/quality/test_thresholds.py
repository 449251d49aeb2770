"""theta by size: where precision and recall are balanced in each third, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from factory.quality.policy import decide, iou_threshold
from factory.quality.thresholds import fit_thresholds
from factory.recipe import GateSection, RecipeError, load


def test_each_third_gets_the_middle_of_the_gap_between_good_and_bad() -> None:
    areas = np.repeat([0.01, 0.1, 0.4], 20)
    good = np.tile(np.arange(20) < 13, 3)
    overlaps = np.where(good, 0.8, 0.6) - np.repeat([0.3, 0.1, 0.0], 20)
    found = fit_thresholds(overlaps, good, areas)
    assert [edge for edge, _ in found] == [0.01, 0.1, 0.4]
    assert [theta for _, theta in found] == pytest.approx([0.4, 0.6, 0.7], abs=0.006)


def test_where_they_overlap_the_smaller_of_precision_and_recall_is_as_large_as_it_can_be() -> None:
    rng = np.random.default_rng(0)
    good = rng.random(3000) < 0.65
    overlaps = np.clip(np.where(good, 0.75, 0.55) + rng.normal(0, 0.1, 3000), 0, 1)
    areas = rng.random(3000)
    for edge, theta in fit_thresholds(overlaps, good, areas):
        inside = (areas <= edge) & (areas > edge - 1 / 3 - 0.02)
        accepted = overlaps[inside] >= theta
        precision, recall = good[inside][accepted].mean(), accepted[good[inside]].mean()
        assert abs(precision - recall) < 0.03 and precision > 0.8


def test_a_third_without_bad_pairs_is_refused_with_its_counts() -> None:
    with pytest.raises(ValueError, match="every third of sizes must have good and bad pairs, got 4 good of 4 up to"):
        fit_thresholds(np.ones(12), np.ones(12, bool), np.arange(12) / 12)


def test_the_policy_takes_the_theta_of_the_lesions_stratum_and_the_last_one_beyond_it() -> None:
    section = GateSection(theta_by_area=[[0.02, 0.5], [0.1, 0.6], [0.3, 0.7]])
    assert [iou_threshold(area, section) for area in (0.01, 0.02, 0.05, 0.3, 0.9)] == [0.5, 0.5, 0.6, 0.7, 0.7]
    assert iou_threshold(None, section) == section.min_iou
    assert decide({"iou": 0.55, "score_area": 0.02}, section) == ("accepted", None)
    assert decide({"iou": 0.55, "score_area": 0.05}, section) == ("rejected", "low_iou")


def test_strata_out_of_order_are_refused_with_their_areas() -> None:
    with pytest.raises(RecipeError, match=r"gate.theta_by_area.*must name strata by growing area, got areas"):
        load(None, ["gate.theta_by_area=[[0.3, 0.7], [0.1, 0.6]]"])


def test_a_policy_with_theta_by_size_comes_back_from_a_recipe_as_it_was() -> None:
    wanted = load(None, ["gate.theta_by_area=[[0.1, 0.6], [0.3, 0.7]]"])
    assert wanted.gate.theta_by_area == [[0.1, 0.6], [0.3, 0.7]]
    assert GateSection(**wanted.gate.model_dump(mode="json")) == wanted.gate
    with pytest.raises(RecipeError, match=r"gate.theta_by_area\[0\]"):
        load(None, ["gate.theta_by_area=[[0.1, 0.6, 0.7]]"])
