"""Measurements by diagnosis, counted by hand on six images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import roc_auc_score

from factory import records
from factory.lab.attributes import by_diagnosis
from factory.quality.statistics import auc


def row(record_id: str, asymmetry: float | None, colors: list[str], **more: Any) -> dict[str, Any]:
    return {
        "record_id": record_id, "caption": "words", "asymmetry": asymmetry, "color_count": len(colors),
        "colors": colors, "outcome": "accepted",
    } | more  # fmt: skip


CAPTIONS = records.rows_to_table("captions", [
    row("m1", 0.4, ["black", "red"]), row("m2", 0.2, ["black"]), row("n1", 0.1, ["red"]), row("n2", 0.2, ["red"]),
    row("x", 0.9, ["red"]), row("f", None, [], outcome="failed", reason="no_lesion"), row("w", None, []),
])  # fmt: skip
CORPUS = pa.table({
    "record_id": ["m1", "m2", "n1", "n2", "x", "f", "w"],
    "diagnosis": ["melanoma", "melanoma", "nevus", "nevus", None, "nevus", "nevus"],
})  # fmt: skip


def test_quartiles_shares_and_what_was_left_out() -> None:
    found = by_diagnosis(CAPTIONS, CORPUS)
    assert found["num_images"] == 4 and found["diagnoses"] == {"melanoma": 2, "nevus": 2}
    assert found["left_out"] == {"failed": 1, "without a diagnosis": 1, "not measured": 1}
    values = found["attributes"]["asymmetry"]["by_diagnosis"]
    assert values["melanoma"]["median"] == pytest.approx(0.3) and values["nevus"]["num"] == 2
    assert found["attributes"]["asymmetry"]["melanoma_over_nevus"]["value"] == pytest.approx(3.5 / 4)
    assert found["colors"]["black"]["melanoma"]["value"] == 1.0 and found["colors"]["black"]["nevus"]["value"] == 0.0
    assert "diameter_mm" not in found["attributes"]


def test_without_one_of_the_two_nothing_is_compared() -> None:
    nevi = CORPUS.set_column(1, "diagnosis", pa.array(["nevus"] * 7))
    assert by_diagnosis(CAPTIONS, nevi)["attributes"]["asymmetry"]["melanoma_over_nevus"] is None


def test_the_area_is_scikit_learns_and_its_interval_holds_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        above, below = rng.normal(1, 1, 40).round(1), rng.normal(0, 1, 60).round(1)
        found = auc(above, below)
        expected = roc_auc_score([1] * 40 + [0] * 60, np.concatenate([above, below]))
        assert found.value == pytest.approx(expected)
        held += found.low <= 0.7602 <= found.high  # Phi(1 / sqrt 2)
    assert 180 <= held <= 199
    assert auc([1.0, 2.0], [0.0]).value == 1.0 and np.isnan(auc([1.0, 2.0], [0.0]).low)
    with pytest.raises(ValueError, match="both groups must hold at least one value, got 0 and 1"):
        auc([], [1.0])
