"""Gates are scored on planted faults by hand-counted rates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from factory import phantom
from factory.lab.planted import Verdict, accuracy, calibration_error, fitted_theta, gate_accuracy
from factory.quality.faults import MIX, cases_of, plant, plant_real
from factory.quality.overlap import iou

SIZE, SEED = 64, 11


def _planted(count: int = 40) -> list[Any]:
    return [plant(SEED, index, *case, SIZE, 0.05) for index, case in enumerate(cases_of(MIX, SEED, count))]


def _truth_tellers() -> dict[bytes, NDArray[np.bool_]]:
    """The true mask of every image the gate will be shown."""
    drawn = (phantom.draw(SEED, index, SIZE, settings=phantom.HELD_OUT) for index in range(60))
    return {one.image.tobytes(): one.mask for one in drawn}


@pytest.fixture(scope="module")
def masks() -> dict[bytes, NDArray[np.bool_]]:
    return _truth_tellers()


def test_faults_in_real_masks_are_the_same_ones_and_images_of_one_size_come_together() -> None:
    sides = [(48, 64), (48, 64), (64, 64), (32, 32)] * 10
    ys, xs = np.mgrid[:64, :64]
    disk = (ys - 20) ** 2 + (xs - 30) ** 2 < 15**2
    pairs = [(np.full((*side, 3), k, np.uint8), disk[: side[0], : side[1]]) for k, side in enumerate(sides)]
    seen = []

    def validate(images: NDArray[np.uint8], shown: NDArray[np.bool_]) -> list[Verdict]:
        seen.append(images.shape[1:3])
        return [("accepted", None, 1.0)] * len(images)

    planted = list(plant_real(3, pairs))
    assert [(pair.fault, pair.good) for pair in planted if pair.fault != "swapped"] == [
        case for case in cases_of(MIX, 3, 40) if case[0] != "swapped"
    ]
    assert all(pair.image is image and pair.mask.shape == true.shape for pair, (image, true) in
               zip(planted, pairs, strict=True))  # fmt: skip
    report = accuracy(validate, planted)
    assert len(seen) == 30 and report["by_skin"] == {} and sum(report["table"].values()) == 40


def test_the_calibration_error_is_the_mean_distance_from_the_truth_over_bins() -> None:
    assert calibration_error(np.empty((0, 2))) is None
    assert calibration_error(np.array([[0.1, 0.2], [0.9, 0.7]])) == pytest.approx(0.15)
    said = np.linspace(0, 1, 1000)
    noisy = said + np.random.default_rng(0).normal(0, 0.2, 1000)
    assert calibration_error(np.stack([said, said], 1)) == 0.0
    assert calibration_error(np.stack([said, noisy], 1)) < 0.03
    assert calibration_error(np.stack([said, noisy + 0.1], 1)) == pytest.approx(0.1, abs=0.03)


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
    assert report["by_fault"]["none"]["good_accepted"]["trials"] == 21  # 35 % of 60
    assert report["setting"]["mix"] == {name: list(share) for name, share in MIX.items()}
    assert report["setting"]["margin"] == 0.05


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
    assert sum(sum(rates["table"].values()) for rates in report["by_skin"].values()) == 31
    assert list(report["by_skin"]) == ["I-II", "III-IV", "V-VI"]
    areas = [report["by_size"][name]["largest_area"] for name in ("small", "medium", "large")]
    assert areas == sorted(areas)


def test_a_gate_that_loses_a_verdict_is_refused() -> None:
    with pytest.raises(ValueError, match="one verdict per pair, got 0 for 5"):
        gate_accuracy(lambda images, shown: [], SEED, 5, size=SIZE)


def test_a_margin_that_leaves_no_good_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"margin from 0 to 0\.25, got 5 and 0\.3"):
        gate_accuracy(lambda images, shown: [], SEED, 5, margin=0.3)


def test_theta_is_fitted_on_phantoms_of_the_renderers_own_settings() -> None:
    true = {
        (drawn := phantom.draw(SEED, index, SIZE, settings=phantom.DEFAULT)).image.tobytes(): drawn.mask
        for index in range(60)
    }

    def half_as_sure(images: NDArray[np.uint8], shown: NDArray[np.bool_]) -> list[Verdict]:
        found = [float(iou(mask, true[image.tobytes()])) / 2 for image, mask in zip(images, shown, strict=True)]
        return [("accepted", None, value) for value in found]

    theta = fitted_theta(half_as_sure, SEED, 60, size=SIZE)
    assert len(theta) == 3 and all(0.32 <= value <= 0.38 for _, value in theta)
