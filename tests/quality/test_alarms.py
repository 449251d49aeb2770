"""Alarms go off for what is wrong, and over all looks seldom for what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from factory import records
from factory.quality.alarms import COLUMNS, FIRST_LOOK, LEVEL, Alarm, alarms, surely_above


def found(samples: list[dict[str, Any]], *planned: Any) -> list[Alarm]:
    return alarms(records.rows_to_table("samples", samples).select(list(COLUMNS)), *planned)


def rows(rejected: list[bool], diagnosis: str = "nevus", overlaps: Any = None) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": f"{diagnosis}{k}", "diagnosis": diagnosis, "skin_type": "I", "calls_run": 20,
            "num_inference_steps": 20, "iou": 0.8 if overlaps is None else float(overlaps[k]),
            "outcome": "rejected" if bad else "accepted", "reason": "low_iou" if bad else None,
        }
        for k, bad in enumerate(rejected)
    ]  # fmt: skip


def test_the_bound_is_where_the_evidence_is_what_is_allowed() -> None:
    from scipy.special import betaln

    least = surely_above(60, 100)
    evidence = betaln(61, 41) - 60 * np.log(least) - 40 * np.log(1 - least)
    assert evidence == pytest.approx(np.log(1 / LEVEL)) and 0.4 < least < 0.6
    assert surely_above(0, 50) == 0.0 and surely_above(1, 1) < 0.05 < surely_above(9, 9) < 1
    assert surely_above(600, 1000) > least and surely_above(60, 100, LEVEL / 10) < least


def test_over_all_looks_a_bound_is_wrong_no_more_often_than_it_says() -> None:
    """400 runs at exactly 40%, each looked at thirty times."""
    drawn = np.random.default_rng(0).random((400, 600)) < 0.4
    wrong = 0
    for run in drawn:
        counts = np.cumsum(run)
        wrong += any(surely_above(int(counts[n - 1]), n) > 0.4 for n in range(20, 601, 20))
    assert wrong / len(drawn) <= LEVEL


def test_a_cell_that_is_surely_rejected_too_often_is_named_with_its_numbers_and_a_planned_one_is_not() -> None:
    rng = np.random.default_rng(1)
    bad, fine = list(rng.random(300) < 0.7), list(rng.random(300) < 0.3)
    samples = rows(bad, "melanoma") + rows(fine)
    (alarm,) = found(samples)
    assert (alarm.kind, alarm.where) == ("rejected_too_often", "melanoma I")
    assert f"{sum(bad)} of 300 rejected, surely above" in alarm.text and 0.5 < alarm.value < 0.7
    assert found(samples, {("melanoma", "I"): 0.3}) == []
    assert found(rows(bad[:6], "melanoma")) == []  # too few to be sure


def test_failed_rows_are_no_ones_verdict() -> None:
    samples = rows([True] * 40)
    for row in samples:
        row |= {"outcome": "failed", "reason": "error", "iou": None, "calls_run": None}
    assert found(samples) == []


def test_a_call_that_only_a_verdict_needed_is_an_alarm() -> None:
    samples = rows([False] * 10)
    samples[3]["calls_run"] = 21
    (alarm,) = found(samples)
    assert alarm.kind == "extra_calls" and alarm.text.startswith("1 samples took more calls than planned")


def test_scores_that_change_are_told_and_those_that_do_not_seldom_are() -> None:
    rng = np.random.default_rng(2)
    count = 4 * FIRST_LOOK
    steady = rng.beta(8, 2, count)
    fallen = np.where(np.arange(count) < count // 2, steady, steady - 0.1)
    (alarm,) = found(rows([False] * count, overlaps=fallen))
    assert alarm.kind == "scores_drift" and "median 0.7" in alarm.text and "after 0.8" in alarm.text
    wrong = sum(bool(found(rows([False] * count, overlaps=rng.beta(8, 2, count)))) for _ in range(60))
    assert wrong <= 6


def test_samples_that_do_not_help_to_find_small_lesions_are_an_alarm_where_the_gate_accepts_as_it_should() -> None:
    def worth(mean: float | None, low: float | None, high: float | None, control: float = 0.3) -> dict[str, Any]:
        found = {"false_negative_rate_small": {"mean": mean, "low": low, "high": high}}
        arms = {"real_repeated": {"false_negative_rate_small": {"mean": control}}}
        return {"tasks": {"segment": {"differences": {"real_synthetic - real_repeated": found}, "arms": arms}}}

    table = records.rows_to_table("samples", rows([False] * 50)).select(list(COLUMNS))
    (alarm,) = alarms(table, worth=worth(-0.01, -0.04, 0.03))
    assert alarm.kind == "small_not_found" and "-0.010 (-0.040 to 0.030), surely no gain of 0.05" in alarm.text
    assert alarms(table, worth=worth(-0.1, -0.2, -0.01)) == [] == alarms(table, worth=worth(None, None, None))
    assert alarms(table, worth=worth(-0.2, -0.41, 0.01)) == [] == alarms(table, worth=worth(-0.3, None, None))
    assert alarms(table, worth=worth(0.0, 0.0, 0.0, control=0.0)) == []
    assert alarms(table, worth={"tasks": {"segment": {"not_run": "too few"}}}) == []
    refused = records.rows_to_table("samples", rows([True] * 50)).select(list(COLUMNS))
    assert [alarm.kind for alarm in alarms(refused, worth=worth(0.0, -0.01, 0.1))] == ["rejected_too_often"]
