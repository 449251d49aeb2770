from __future__ import annotations

import pyarrow as pa
import pytest

from factory.release.counts import acceptance, funnel


def _samples() -> pa.Table:
    outcomes = ["accepted"] * 5 + ["rejected"] * 3 + ["failed"]
    reasons = [None] * 5 + ["low_iou", "low_iou", "empty_mask", "out_of_memory"]
    diagnosis = ["nevus", "melanoma", None] * 3
    return pa.table({"outcome": outcomes, "reason": reasons, "diagnosis": diagnosis})


def test_the_funnel_adds_up_to_the_plan() -> None:
    found = funnel(_samples(), 12)
    assert (found.accepted, found.num_rejected, found.num_failed, found.waiting) == (5, 3, 1, 3)
    assert found.rejected == {"low_iou": 2, "empty_mask": 1} and list(found.rejected) == ["low_iou", "empty_mask"]
    assert found.accepted + found.num_rejected + found.num_failed + found.waiting == found.planned == 12


def test_more_samples_than_planned_is_excess_and_not_a_negative_wait() -> None:
    found = funnel(_samples(), 7)
    assert (found.waiting, found.excess) == (0, 2)


def test_without_a_plan_what_was_made_counts_and_without_samples_all_waits() -> None:
    assert funnel(_samples(), None).planned == 9
    assert funnel(None, 4).waiting == 4


def test_early_rejection_saves_the_calls_that_were_not_run() -> None:
    calls = pa.table({"calls_run": [20, 14, None], "num_inference_steps": [20, 20, 20]})
    table = _samples().slice(0, 3).append_column("calls_run", calls["calls_run"])
    found = funnel(table.append_column("num_inference_steps", calls["num_inference_steps"]), 3)
    assert found.calls_saved == pytest.approx(6 / 40)
    outcomes = table["outcome"].to_pylist()
    assert found.by_call == [
        (call, int(outcomes[place] == "accepted"), int(outcomes[place] == "rejected"))
        for call, place in ((14, 1), (20, 0))
    ]
    assert funnel(_samples(), 3).calls_saved is None
    none_run = table.set_column(3, "calls_run", pa.nulls(3, pa.int64()))
    assert funnel(none_run.append_column("num_inference_steps", calls["num_inference_steps"]), 3).calls_saved is None


def test_acceptance_is_counted_per_group_in_the_given_order() -> None:
    rates = acceptance(_samples(), "diagnosis", ("melanoma", "nevus", "vascular"))
    assert [(r.group, r.accepted, r.made) for r in rates] == [("melanoma", 2, 3), ("nevus", 2, 3), ("not stated", 1, 3)]
    assert rates[0].share == pytest.approx(2 / 3)
    assert (rates[0].low, rates[0].high) == pytest.approx((0.2077, 0.9385), abs=5e-5)  # Wilson, 2 of 3
