"""The worth experiment: what may meet what, equal budgets, cells that are used again, honest verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from factory import images, phantom, records
from factory.lab import learners, worth
from factory.lab.learners import CLASSIFY, SEGMENT, balanced_draw, dihedral, fit, lesion_found, predict
from factory.recipe import WorthSection
from factory.storage import open_store

SECTION = WorthSection(
    seeds=1, folds=2, steps=3, batch_size=4, image_size=32, classifier="test_efficientnet", max_real=1000
)


def _encoded(index: int, seed: int = 6, wanted: str | None = None) -> dict[str, Any]:
    drawn = phantom.draw(seed, index, 32, diagnosis=wanted)
    return {
        "image": records.image_struct(images.encode_png(drawn.image), "i.png"),
        "mask": records.image_struct(images.encode_mask(drawn.mask), "m.png"),
        "diagnosis": drawn.diagnosis,
    }


@pytest.fixture(scope="module")
def real() -> pa.Table:
    """24 training rows, two per group, and four rows that must never be seen."""
    rows = []
    for index in range(28):
        wanted = "melanoma" if index // 2 % 3 == 0 else "nevus"
        rows.append(_encoded(index, wanted=wanted) | {
            "row_id": f"r{index}", "record_id": f"c{index}", "group_id": f"g{index // 2}",
            "malignant": wanted == "melanoma", "split": "train" if index < 24 else "test", "outcome": "accepted",
        })  # fmt: skip
    return records.rows_to_table("corpus", rows)


@pytest.fixture(scope="module")
def synthetic() -> pa.Table:
    """Eight accepted samples, the first with a parent, and one rejected."""
    rows = []
    for index in range(9):
        rows.append(_encoded(index, seed=7) | {
            "sample_id": f"s{index}", "parents": ["c0"] if index == 0 else [],
            "outcome": "rejected" if index == 8 else "accepted", "reason": "iou" if index == 8 else None,
        })  # fmt: skip
    return records.rows_to_table("samples", rows)


@pytest.fixture(scope="module")
def data(real: pa.Table, synthetic: pa.Table) -> worth.Data:
    return worth._data(real, synthetic, SECTION, {})


@pytest.fixture(scope="module")
def run(real: pa.Table, synthetic: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("run")
    return directory, worth.run_worth(open_store(str(directory)), real, synthetic, SECTION, progress=lambda line: None)


def test_only_accepted_rows_of_the_training_split_take_part(data: worth.Data) -> None:
    assert data.num_real == 24
    assert data.rows.ids[24:] == [f"s{index}" for index in range(8)]


@pytest.mark.parametrize("task", [CLASSIFY, SEGMENT])
def test_groups_never_cross_folds_and_every_real_row_is_held_out_once(task: learners.Task, data: worth.Data) -> None:
    folds = worth.folds_of(task, data, 3, seed=5)
    for train, held_out in folds:
        assert not {data.groups[row] for row in train} & {data.groups[row] for row in held_out}
    assert sorted(row for _, held_out in folds for row in held_out) == list(range(24))


def test_synthetic_rows_are_never_held_out_and_only_one_arm_learns_from_them(data: worth.Data) -> None:
    for task in (CLASSIFY, SEGMENT):
        for cell in worth._cells(task, data, SECTION):
            assert max(cell.held_out) < data.num_real
            assert (max(cell.train) >= data.num_real) == (cell.arm == "real_synthetic")


def test_a_sample_is_left_out_where_its_parents_group_is_held_out(data: worth.Data) -> None:
    seen = []
    for train, held_out in worth.folds_of(CLASSIFY, data, 2, seed=0):
        rows, excluded = worth.usable_synthetic(CLASSIFY, data, train, held_out, 0)
        parent_is_held_out = "g0" in {data.groups[row] for row in held_out}
        assert (24 in rows) == (not parent_is_held_out)
        assert excluded == int(parent_is_held_out)
        seen.append(excluded)
    assert sorted(seen) == [0, 1]


def test_a_sample_that_copies_a_real_image_counts_as_its_kin(real: pa.Table, synthetic: pa.Table) -> None:
    data = worth._data(real, synthetic, SECTION, {"s3": ["c4"]})
    assert data.related[3] == {"g2"}
    assert data.related[0] == {"g0"}


def test_a_parent_that_is_not_a_real_row_is_counted(real: pa.Table, synthetic: pa.Table) -> None:
    rows = synthetic.to_pylist()
    rows[1]["parents"] = ["elsewhere"]
    data = worth._data(real, records.rows_to_table("samples", rows), SECTION, {})
    assert data.counts["unknown_parents"] == 1


def test_the_repeated_arm_sees_as_many_images_in_as_many_steps(data: worth.Data) -> None:
    cells = list(worth._cells(CLASSIFY, data, SECTION))
    for real_only, repeated, mixed in zip(cells[::3], cells[1::3], cells[2::3], strict=True):
        assert (real_only.arm, repeated.arm, mixed.arm) == worth.ARMS
        assert repeated.steps == mixed.steps > real_only.steps == 3
        assert repeated.train.tolist() == real_only.train.tolist()
        # Three steps per len(train) rows, so one for every further four rows, rounded up.
        assert mixed.steps == -(-3 * len(mixed.train) // len(real_only.train))


def test_too_many_samples_are_cut_to_three_per_real_row(
    real: pa.Table, synthetic: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worth, "MAX_RATIO", 0.25)
    data = worth._data(real, synthetic, SECTION, {})
    rows, excluded = worth.usable_synthetic(CLASSIFY, data, np.arange(12), np.arange(12, 24), 0)
    assert len(rows) == 3 and excluded == 0


def test_fewer_real_rows_are_a_subset_of_more(real: pa.Table) -> None:
    training = real.filter(pc.equal(real["split"], "train"))
    few, more = (set(worth._subset(training, most)["row_id"].to_pylist()) for most in (5, 9))
    assert len(few) == 5 and few < more


def test_the_summary_holds_every_arm_and_the_paired_differences(run: tuple[Path, dict[str, Any]]) -> None:
    directory, summary = run
    assert json.loads((directory / worth.SUMMARY).read_text()) == summary
    for name, task in summary["tasks"].items():
        assert set(task["arms"]) == set(worth.ARMS)
        for metric, _ in worth.METRICS[name]:
            arms = {arm: task["arms"][arm][metric]["mean"] for arm in worth.ARMS}
            difference = task["differences"]["real_synthetic - real_repeated"][metric]
            if difference["n"] == 2:
                assert difference["mean"] == pytest.approx(arms["real_synthetic"] - arms["real_repeated"])
    missed = summary["tasks"]["segment"]["arms"]["real"]["false_negative_rate"]
    assert missed["lesions"] == 24
    assert missed["wilson_low"] <= missed["pooled"] <= missed["wilson_high"]
    assert summary["counts"]["synthetic_rows_without_parents"] == 7


def test_a_second_run_fits_nothing_and_says_the_same(
    run: tuple[Path, dict[str, Any]], real: pa.Table, synthetic: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, summary = run

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a cell was fitted again")

    monkeypatch.setattr(worth, "fit", refuse)
    again = worth.run_worth(open_store(str(directory)), real, synthetic, SECTION, progress=lambda line: None)
    assert again == summary


def test_other_samples_leave_the_real_arm_as_it_was(
    run: tuple[Path, dict[str, Any]], real: pa.Table, synthetic: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = run
    fitted: list[int] = []
    plain = worth.fit

    def counted(task: Any, data: Any, rows: Any, *rest: Any) -> torch.nn.Module:
        fitted.append(int(max(rows) >= 24))
        return plain(task, data, rows, *rest)

    monkeypatch.setattr(worth, "fit", counted)
    rows = synthetic.to_pylist()
    rows[5] |= _encoded(50, seed=7)
    worth.run_worth(
        open_store(str(directory)), real, records.rows_to_table("samples", rows), SECTION, progress=lambda line: None
    )
    assert fitted == [1] * 4  # the mixed arm of two tasks and two folds, and nothing else


def test_a_fit_is_a_function_of_its_seed(data: worth.Data) -> None:
    rows = np.arange(data.num_real)
    first, again, other = (
        predict(fit(CLASSIFY, data.rows, rows, SECTION, 2, seed), data.rows, rows) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_u_net_learns_its_own_lesions(data: worth.Data) -> None:
    rows = np.arange(4)
    section = SECTION.model_copy(update={"batch_size": 4})
    model = fit(SEGMENT, data.rows, rows, section, 60, 0)
    assert SEGMENT.measure(predict(model, data.rows, rows), data.rows, rows, 0.0)["dice"] > 0.8  # type: ignore[operator]


def test_a_lesion_is_found_by_one_component_that_covers_half_of_the_union() -> None:
    true = np.zeros((16, 16), bool)
    true[4:8, 4:12] = True  # 32 pixels
    half, two_quarters = np.zeros_like(true), np.zeros_like(true)
    half[4:8, 4:8] = True  # 16 of 32: exactly one half
    two_quarters[4:8, 4:7] = True
    two_quarters[4:8, 9:12] = True  # 24 of 32 together, 12 each
    assert lesion_found(half, true)
    assert not lesion_found(two_quarters, true)
    assert not lesion_found(np.zeros_like(true), true)


def test_every_batch_has_an_equal_share_of_each_class() -> None:
    strata = [np.arange(0, 90), np.arange(90, 100)]
    chosen = balanced_draw(np.random.default_rng(0), strata, 32)
    assert (chosen >= 90).sum() == 16


def test_an_image_and_its_mask_turn_together() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 6, 3), dtype=np.uint8)
    turned, masks = dihedral(np.random.default_rng(1), pixels, pixels[..., 0] > 127)
    assert np.array_equal(masks, turned[..., 0] > 127)
    assert not np.array_equal(turned, pixels)


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better", "verdict"),
    [
        (0.01, 0.2, True, "better"), (0.01, 0.2, False, "worse"), (-0.2, -0.01, True, "worse"),
        (-0.2, -0.01, False, "better"), (-0.1, 0.2, True, "no difference shown"),
        (None, None, True, "no difference shown"),
    ],
)  # fmt: skip
def test_a_verdict_needs_an_interval_clear_of_zero(
    low: float | None, high: float | None, higher_is_better: bool, verdict: str
) -> None:
    assert worth._verdict({"low": low, "high": high}, higher_is_better) == verdict


def test_a_task_without_enough_groups_is_not_run_and_says_why(
    real: pa.Table, synthetic: pa.Table, tmp_path: Path
) -> None:
    benign = [row | {"malignant": False, "mask": None} for row in real.to_pylist()]
    table = records.rows_to_table("corpus", benign)
    summary = worth.run_worth(open_store(str(tmp_path)), table, synthetic, SECTION, progress=lambda line: None)
    assert summary["tasks"]["classify"] == {
        "not_run": "benign and malignant must each have at least 2 groups, got 12 and 0"
    }
    assert summary["tasks"]["segment"] == {"not_run": "no real row has what it needs"}


def test_one_group_of_masks_is_not_enough_to_fold(real: pa.Table, synthetic: pa.Table) -> None:
    rows = [row | {"group_id": "g"} for row in real.to_pylist()]
    data = worth._data(records.rows_to_table("corpus", rows), synthetic, SECTION, {})
    assert worth._why_not(SEGMENT, data, 2) == "there must be at least 2 groups, got 1"


def test_no_accepted_samples_are_refused(real: pa.Table, synthetic: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="synthetic must hold at least one accepted image, got none; synthesize"):
        worth.run_worth(open_store(str(tmp_path)), real, synthetic.slice(8), SECTION)
