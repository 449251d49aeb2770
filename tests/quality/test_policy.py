"""The policy: total, ordered, one reason."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from factory import records
from factory.quality.policy import REASONS, decide, iou_threshold, shape_scores, shifted_disk_iou
from factory.recipe import GateSection

GATE = GateSection()
GOOD: dict[str, float | None] = {"iou": 0.9, "score_area": 0.2, "score_solidity": 0.95}


def test_good_scores_are_accepted_without_a_reason() -> None:
    assert decide(GOOD, GATE) == ("accepted", None)


@pytest.mark.parametrize(
    ("score", "value", "reason"),
    [
        ("iou", float("nan"), "non_finite"),
        ("score_confidence", math.inf, "non_finite"),
        ("score_area", 0.003, "empty_mask"),
        ("score_area", 0.96, "full_mask"),
        ("iou", 0.69, "low_iou"),
        ("score_solidity", 0.59, "implausible_shape"),
    ],
)
def test_each_rule_rejects_by_its_own_name(score: str, value: float, reason: str) -> None:
    assert decide(GOOD | {score: value}, GATE) == ("rejected", reason)
    assert reason in REASONS


@pytest.mark.parametrize(
    ("score", "bound", "value", "reason"),
    [
        ("score_hausdorff_px", {"max_hausdorff_px": 4.0}, 4.1, "far_boundary"),
        ("score_holes", {"max_holes": 0.2}, 0.21, "implausible_shape"),
        ("score_shape", {"max_shape_distance": 6.0}, 6.1, "implausible_shape"),
        ("score_background_psnr", {"min_background_psnr": 25.0}, 24.9, "changed_background"),
        ("score_edge_contrast", {"min_edge_contrast": 1.2}, 1.19, "faint_edge"),
    ],
)
def test_rules_without_a_bound_of_their_own_are_off_until_one_is_given(
    score: str, bound: dict[str, float], value: float, reason: str
) -> None:
    assert decide(GOOD | {score: value}, GATE) == ("accepted", None)
    asked = GateSection(**bound)
    assert decide(GOOD | {score: value}, asked) == ("rejected", reason) and reason in REASONS
    assert decide(GOOD | {score: bound.popitem()[1]}, asked) == ("accepted", None)
    assert decide(GOOD | {score: value}, asked, "checkpoint") == ("accepted", None)
    assert decide(GOOD | {score: None}, asked) == ("accepted", None)


def test_the_first_rule_that_fails_is_the_reason() -> None:
    worst = {"iou": 0.0, "score_area": 0.0, "score_solidity": 0.0}
    assert decide(worst, GATE)[1] == "empty_mask"
    assert decide(worst | {"score_area": 0.2}, GATE)[1] == "low_iou"


def test_scores_that_were_not_computed_skip_their_rules() -> None:
    assert decide({}, GATE) == ("accepted", None)
    assert decide(dict.fromkeys(("iou", *records.SCORES)), GATE) == ("accepted", None)


def test_a_checkpoint_looks_at_the_latent_overlap_with_slack_and_not_at_solidity() -> None:
    early = {"score_latent_iou": 0.5, "score_area": 0.2, "score_solidity": 0.1}
    eased = GateSection(checkpoint_slack=0.25)
    assert decide(early, eased, "checkpoint") == ("accepted", None)
    assert decide(early | {"score_latent_iou": 0.44}, eased, "checkpoint") == ("rejected", "low_iou")
    assert decide(early | {"iou": 0.9, "score_solidity": 0.9}, eased) == ("accepted", None)


def test_a_negative_slack_asks_more_of_an_early_overlap_than_of_the_last() -> None:
    asked = GateSection(checkpoint_slack=-0.05)
    for overlap, outcome in ((0.74, "rejected"), (0.76, "accepted")):
        assert decide({"score_latent_iou": overlap, "score_area": 0.2}, asked, "checkpoint")[0] == outcome
    assert decide({"iou": 0.71, "score_area": 0.2}, asked) == ("accepted", None)


def test_an_early_lesion_may_be_a_little_smaller_than_a_finished_one() -> None:
    section = GateSection(min_area=0.1, checkpoint_area_slack=0.1)
    assert decide({"score_area": 0.095}, section) == ("rejected", "empty_mask")
    assert decide({"score_area": 0.095}, section, "checkpoint") == ("accepted", None)
    assert decide({"score_area": 0.089}, section, "checkpoint") == ("rejected", "empty_mask")


@pytest.mark.parametrize(("radius", "expected"), [(2, 0.52), (3, 0.65), (4, 0.73), (6, 0.81)])
def test_a_disk_shifted_by_one_cell_keeps_what_the_papers_page_says(radius: float, expected: float) -> None:
    assert shifted_disk_iou(radius, 1) == pytest.approx(expected, abs=0.006)


def test_a_disk_shifted_off_itself_keeps_nothing() -> None:
    assert shifted_disk_iou(2, 4) == 0 and shifted_disk_iou(0, 1) == 0 and shifted_disk_iou(2, 0) == 1


def test_small_lesions_need_less_overlap_and_large_ones_the_whole() -> None:
    assert iou_threshold(0.2, GATE) == GATE.min_iou == iou_threshold(None, GATE)
    assert 0.5 < iou_threshold(0.004, GATE) < 0.62
    assert iou_threshold(0.004, GateSection(shift_tolerance=0.0)) == 0.7
    small = {"iou": 0.66, "score_area": 0.004}
    assert decide(small, GATE)[0] == "accepted" and decide(small | {"score_area": 0.2}, GATE)[0] == "rejected"


@given(
    st.dictionaries(st.sampled_from(("iou", *records.SCORES)), st.one_of(st.none(), st.floats(-2, 2))),
    st.sampled_from(["final", "checkpoint"]),
)
def test_every_set_of_scores_has_a_verdict_and_a_reason_exactly_when_rejected(scores: dict, stage: str) -> None:
    outcome, reason = decide(scores, GATE, stage)
    assert (outcome == "accepted") == (reason is None) and (reason is None or reason in REASONS)


def test_shape_scores_of_a_square_a_torn_square_and_nothing() -> None:
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    assert shape_scores(mask) == {
        "score_area": 0.25, "score_solidity": 1.0, "score_components": 1.0, "score_holes": 0.0,
    }  # fmt: skip
    ring = mask.copy()
    ring[15:25, 15:25] = False
    assert shape_scores(ring)["score_holes"] == pytest.approx(100 / 400) and shape_scores(ring)["score_solidity"] < 1
    mask[14:26, :] = False
    torn = shape_scores(mask)
    assert torn["score_components"] == 2.0 and torn["score_solidity"] == pytest.approx(160 / 400)
    assert shape_scores(np.zeros((8, 8), bool)) == dict.fromkeys(torn, 0.0)
