"""Truth from phantoms: planted faults are what they are said to be, and gates are scored by hand-counted rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from factory import phantom, records
from factory.lab.truth import GOOD_IOU, MIX, Verdict, captioner_accuracy, faults_of, gate_accuracy, plant
from factory.quality.overlap import iou

SIZE, SEED = 64, 11


def _planted(count: int = 40) -> list[Any]:
    return [plant(SEED, index, fault, SIZE, 0.05) for index, fault in enumerate(faults_of(MIX, SEED, count))]


def _truth_tellers() -> dict[bytes, NDArray[np.bool_]]:
    """The true mask of every image the gate will be shown."""
    drawn = (phantom.draw(SEED, index, SIZE, settings=phantom.HELD_OUT) for index in range(60))
    return {one.image.tobytes(): one.mask for one in drawn}


@pytest.fixture(scope="module")
def masks() -> dict[bytes, NDArray[np.bool_]]:
    return _truth_tellers()


def test_planted_faults_keep_the_stated_margin_of_true_iou() -> None:
    for pair in _planted():
        assert abs(pair.true_iou - GOOD_IOU) >= 0.05
        assert pair.good == (pair.true_iou > 0.7)


def test_the_true_iou_of_a_planted_pair_is_that_of_its_masks() -> None:
    for index, pair in enumerate(_planted()):
        true = phantom.draw(SEED, index, SIZE, settings=phantom.HELD_OUT)
        assert np.array_equal(pair.image, true.image)
        assert pair.true_iou == pytest.approx(float(iou(pair.mask, true.mask)))
        assert (pair.true_iou == 1.0) or pair.fault != "none"


def test_every_fault_comes_good_and_bad_so_that_none_gives_itself_away() -> None:
    for fault in ("shifted", "scaled", "torn"):
        sides = {plant(SEED, index, fault, SIZE, 0.05).good for index in range(30)}
        assert sides == {True, False}


def test_a_torn_mask_is_a_part_of_the_true_one() -> None:
    for index in range(5):
        true = phantom.draw(SEED, index, SIZE, settings=phantom.HELD_OUT).mask
        torn = plant(SEED, index, "torn", SIZE, 0.05).mask
        assert not (torn & ~true).any() and torn.sum() < true.sum()


def test_the_mix_is_kept_to_the_pair() -> None:
    faults = faults_of(MIX, 0, 100)
    assert {name: faults.count(name) for name in MIX} == {
        "none": 40, "shifted": 15, "scaled": 15, "swapped": 15, "torn": 15,
    }  # fmt: skip
    assert len(faults_of(MIX, 0, 7)) == 7


def test_a_gate_that_knows_the_truth_scores_one(masks: dict[bytes, NDArray[np.bool_]]) -> None:
    def oracle(images: NDArray[np.uint8], shown: NDArray[np.bool_]) -> list[Verdict]:
        found = [float(iou(mask, masks[image.tobytes()])) for image, mask in zip(images, shown, strict=True)]
        return [("accepted", None, value) if value > 0.7 else ("rejected", "iou", value) for value in found]

    report = gate_accuracy(oracle, SEED, 60, size=SIZE)
    for name in ("precision", "recall", "specificity", "balanced_accuracy"):
        assert report[name]["value"] == 1.0
        assert 0.8 < report[name]["low"] < 1.0
    assert report["gate_iou"]["mean_absolute_error"] == pytest.approx(0.0)
    assert report["reasons"] == {"iou": report["table"]["bad_refused"]}
    assert report["by_fault"]["none"]["good_accepted"]["trials"] == 24  # 40 % of 60
    assert report["setting"]["mix"] == MIX and report["setting"]["margin"] == 0.05


def test_a_gate_that_accepts_everything_has_the_mix_as_its_precision() -> None:
    def open_gate(images: NDArray[np.uint8], shown: NDArray[np.bool_]) -> list[Verdict]:
        return [("accepted", None, None)] * len(images)

    report = gate_accuracy(open_gate, SEED, 40, size=SIZE)
    good = sum(pair.good for pair in _planted())
    assert report["precision"]["value"] == good / 40 == report["accept_everything"]["precision"]
    assert report["recall"]["value"] == 1.0
    assert report["specificity"]["value"] == 0.0
    assert report["balanced_accuracy"]["value"] == 0.5
    assert report["table"] == {"good_accepted": good, "good_refused": 0, "bad_accepted": 40 - good, "bad_refused": 0}
    assert report["gate_iou"]["num_records"] == 0


def test_sizes_are_thirds_of_the_true_area() -> None:
    report = gate_accuracy(lambda images, shown: [("accepted", None, 1.0)] * len(images), SEED, 31, size=SIZE)
    trials = [sum(report["by_size"][name]["table"].values()) for name in ("small", "medium", "large")]
    assert trials == [11, 10, 10]
    areas = [report["by_size"][name]["largest_area"] for name in ("small", "medium", "large")]
    assert areas == sorted(areas)


def test_a_gate_that_loses_a_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match="one verdict per pair, got 0 for 5"):
        gate_accuracy(lambda images, shown: [], SEED, 5, size=SIZE)


def test_a_margin_that_leaves_no_good_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"margin from 0 to 0\.25, got 5 and 0\.3"):
        gate_accuracy(lambda images, shown: [], SEED, 5, margin=0.3)


def test_an_unknown_fault_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="mix must give shares to some of none, shifted, scaled, swapped, torn, got"):
        faults_of({"upside_down": 1.0}, 0, 5)


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
