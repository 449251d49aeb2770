"""Sweeps of theta and of prompt banks: the same samples filtered, cells used again, honest refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from factory import images, phantom, records
from factory.lab import learners, worth
from factory.lab.sweeps import BANKS, THETA, prompt_banks, theta_sweep
from factory.recipe import GateSection, WorthSection
from factory.storage import open_store

SECTION = WorthSection(
    seeds=1, folds=2, steps=2, batch_size=4, image_size=32, classifier="test_efficientnet", max_real=1000
)
OVERLAPS = (0.45, 0.55, 0.65, 0.72, 0.78, 0.85, 0.95, 0.99)


def encoded(index: int, seed: int) -> dict[str, Any]:
    drawn = phantom.draw(seed, index, 32, diagnosis="melanoma" if index % 2 else "nevus")
    return {
        "image": records.image_struct(images.encode_png(drawn.image), "i.png"), "diagnosis": drawn.diagnosis,
        "mask": records.image_struct(images.encode_mask(drawn.mask), "m.png"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def real() -> pa.Table:
    return records.rows_to_table("corpus", [
        encoded(k, 6) | {"row_id": f"r{k}", "record_id": f"c{k}", "group_id": f"g{k}", "malignant": bool(k % 2),
                         "split": "train", "outcome": "accepted"} for k in range(12)
    ])  # fmt: skip


def made(**change: Any) -> pa.Table:
    rows = []
    for k, overlap in enumerate(OVERLAPS):
        row = encoded(k, 7) | {
            "sample_id": f"s{k}", "parents": [], "iou": overlap, "score_area": 0.05 * (k + 1), "score_solidity": 0.9,
            "calls_run": 4, "num_inference_steps": 4, "bank": "minimal" if k < 3 else "standard",
            "outcome": "accepted" if overlap >= 0.7 else "rejected",
        }  # fmt: skip
        row["reason"] = None if row["outcome"] == "accepted" else "low_iou"
        rows.append(row | (change if k == 0 else {}))
    return records.rows_to_table("samples", rows)


def test_every_theta_filters_the_same_samples_and_what_two_share_is_fitted_once(
    real: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, fits = open_store(str(tmp_path)), []
    monkeypatch.setattr(worth, "fit", lambda *given: fits.append(given) or learners.fit(*given))
    said: list[str] = []
    thetas = [0.5, 0.7, 0.75, 0.999]
    found = theta_sweep(store, real, made(), GateSection(), thetas, SECTION, progress=said.append)
    assert [row["name"] for row in found["rows"]] == ["0.5", "0.7", "0.75", "0.999"]
    assert [row["accepted"]["successes"] for row in found["rows"]] == [7, 5, 4, 0]
    assert [row["by_diagnosis"]["melanoma"]["successes"] for row in found["rows"]] == [4, 3, 2, 0]
    assert [row["by_size"]["small"]["successes"] for row in found["rows"]] == [2, 0, 0, 0]
    assert "tasks" not in found["rows"][-1] and found["rows"][0]["counts"]["synthetic_rows"] == 7
    assert store.exists(THETA) and any(line.startswith("0.7 ") and "5 of    8  62.5%" in line for line in said)
    # Two tasks by two folds and three arms for each theta that kept any; the real arm is one for all of them.
    cells, asked = len(store.list(worth.CELLS)), 4 * 3 * 3
    assert len(fits) == cells <= asked - 4 * 2
    again = theta_sweep(store, real, made(), GateSection(), thetas, SECTION, progress=said.append)
    assert again == found and len(fits) == cells


def test_each_bank_is_judged_as_the_runs_gate_did(real: pa.Table, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    found = prompt_banks(store, real, made(), SECTION, progress=lambda line: None)
    assert [(row["name"], row["accepted"]["successes"], row["accepted"]["trials"]) for row in found["rows"]] == [
        ("minimal", 0, 3), ("standard", 5, 5)
    ]  # fmt: skip
    assert store.exists(BANKS) and "tasks" not in found["rows"][0]
    with pytest.raises(ValueError, match="samples must be planned with a quota of each prompt bank, got none; plan wi"):
        prompt_banks(store, real, made().set_column(
            made().schema.get_field_index("bank"), "bank", pa.nulls(len(OVERLAPS), pa.string())), SECTION)  # fmt: skip


def test_samples_that_were_stopped_early_or_not_kept_are_refused(real: pa.Table, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for change, count in (({"calls_run": 3}, 1), ({"iou": 0.9, "image": None}, 0)):
        with pytest.raises(ValueError, match=f"to their end and kept .* got 8 of which {count} were stopped early"):
            theta_sweep(store, real, made(**change), GateSection(), [0.5], SECTION)


def test_a_sample_that_broke_is_kept_by_no_theta_and_none_at_all_is_refused(real: pa.Table, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    unscored = dict.fromkeys(("iou", "score_area", "score_solidity", "image", "mask"))
    broken = made(**unscored, calls_run=2, outcome="rejected", reason="non_finite")
    found = theta_sweep(store, real, broken, GateSection(), [0.5], SECTION, progress=lambda line: None)
    assert (found["rows"][0]["accepted"]["successes"], found["rows"][0]["accepted"]["trials"]) == (7, 8)
    assert not store.exists("lab/near_copies.json")
    with pytest.raises(ValueError, match="got 0 of which 0 were stopped early"):
        theta_sweep(store, real, made().slice(0, 0), GateSection(), [0.5], SECTION)


def test_without_calibration_the_plain_overlap_is_swept(real: pa.Table, tmp_path: Path) -> None:
    samples = made()
    place = samples.schema.get_field_index("score_overlap")
    samples = samples.set_column(place, "score_overlap", pa.array([0.1] * 7 + [0.95], pa.float32()))
    for calibrated, kept in ((True, 5), (False, 1)):
        gate = GateSection(calibrated=calibrated)
        store = open_store(str(tmp_path / str(calibrated)))
        found = theta_sweep(store, real, samples, gate, [0.7], SECTION, progress=lambda line: None)
        assert found["rows"][0]["accepted"]["successes"] == kept and found["calibrated"] == calibrated
