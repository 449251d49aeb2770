"""Truth from phantoms: captions are held to the phantoms' own numbers."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from factory import phantom, records
from factory.lab.caption_truth import captioner_accuracy


def _corpus(values: list[tuple[float, float, list[str]]]) -> pa.Table:
    return records.rows_to_table("corpus", [
        {
            "record_id": f"c{i}", "true_asymmetry": a, "true_border_irregularity": b, "true_color_count": len(colors),
            "true_colors": colors, "outcome": "accepted",
        }
        for i, (a, b, colors) in enumerate(values)
    ])  # fmt: skip


def _captions(values: list[tuple[float, float, list[str]]]) -> pa.Table:
    return records.rows_to_table("captions", [
        {
            "record_id": f"c{i}", "asymmetry": a, "border_irregularity": b, "color_count": len(colors),
            "colors": colors, "outcome": "accepted",
        }
        for i, (a, b, colors) in enumerate(values)
    ])  # fmt: skip


def test_captions_are_held_to_the_phantoms_own_numbers() -> None:
    (a_low, a_high), (b_low, b_high) = phantom.ASYMMETRY_LEVELS, phantom.BORDER_LEVELS
    a_mid, b_mid = (a_low + a_high) / 2, (b_low + b_high) / 2
    true = [(0.0, 0.0, ["black"]), (a_mid, b_mid, ["black", "red"]), (0.5, 0.9, ["black", "red", "white"])]
    # Asymmetry is 0.01 too high once; the second border is called high and was medium; one colour is missed.
    said = [(0.01, 0.0, ["black"]), (a_mid, b_high + 0.1, ["black"]), (0.5, 0.9, ["black", "red", "white"])]
    found = captioner_accuracy(_corpus(true), _captions(said))
    assert found["asymmetry"]["spearman"] == pytest.approx(1.0)
    assert found["asymmetry"]["mean_absolute_error"] == pytest.approx(0.01 / 3, abs=1e-6)
    assert found["asymmetry"]["bias"] == pytest.approx(0.01 / 3, abs=1e-6)
    assert found["asymmetry"]["level_agreement"]["value"] == 1.0
    assert found["border_irregularity"]["bias"] == pytest.approx((b_high + 0.1 - b_mid) / 3, abs=1e-6)
    assert found["border_irregularity"]["level_agreement"]["successes"] == 2
    assert found["color_count"]["exact"]["successes"] == 2
    assert found["color_count"]["spearman"] == pytest.approx(0.8660, abs=1e-4)
    assert found["colors"]["mean_jaccard"] == pytest.approx((1 + 0.5 + 1) / 3)


def test_records_without_truth_and_lost_captions_are_not_counted() -> None:
    captions = _captions([(0.03, 0.1, ["black"]), (0.5, 0.5, ["red"])])
    found = captioner_accuracy(_corpus([(0.02, 0.1, ["black"])]), captions)
    assert found["num_records"] == 1
    assert found["asymmetry"]["spearman"] is None  # one value does not vary


def test_a_corpus_of_real_images_has_no_truth_to_hold_captions_to() -> None:
    corpus = records.rows_to_table("corpus", [{"record_id": "c0", "outcome": "accepted"}])
    with pytest.raises(ValueError, match="captions must have true attributes to be held to, got none"):
        captioner_accuracy(corpus, _captions([(0.1, 0.1, ["red"])]))


def test_captions_without_numbers_are_counted_as_such() -> None:
    rows: list[dict[str, Any]] = [{"record_id": "c0", "colors": ["red"], "outcome": "accepted"}]
    found = captioner_accuracy(_corpus([(0.1, 0.1, ["red"])]), records.rows_to_table("captions", rows))
    assert found["asymmetry"]["num_records"] == 0
    assert found["asymmetry"]["level_agreement"]["value"] is None
