"""Planted faults are what they are said to be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from factory import phantom
from factory.quality.faults import GOOD_IOU, MIX, Share, cases_of, plant
from factory.quality.overlap import iou

SIZE, SEED = 64, 11


def _planted(count: int = 40) -> list[Any]:
    return [plant(SEED, index, *case, SIZE, 0.05) for index, case in enumerate(cases_of(MIX, SEED, count))]


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


def test_every_fault_comes_good_and_bad_as_asked_so_that_none_gives_itself_away() -> None:
    for fault in ("shifted", "scaled", "torn"):
        for good in (True, False):
            assert all(plant(SEED, index, fault, good, SIZE, 0.05).good == good for index in range(10))


def test_a_torn_mask_is_a_part_of_the_true_one() -> None:
    for index in range(5):
        true = phantom.draw(SEED, index, SIZE, settings=phantom.HELD_OUT).mask
        torn = plant(SEED, index, "torn", bool(index % 2), SIZE, 0.05).mask
        assert not (torn & ~true).any() and torn.sum() < true.sum()


def test_the_mix_is_kept_to_the_pair() -> None:
    cases = cases_of(MIX, 0, 100)
    assert Counter(cases) == {
        ("none", True): 35, ("shifted", True): 10, ("scaled", True): 10, ("torn", True): 10, ("shifted", False): 8,
        ("scaled", False): 8, ("torn", False): 8, ("swapped", False): 11,
    }  # fmt: skip
    assert sum(good for _, good in cases) == 65
    assert len(cases_of(MIX, 0, 7)) == 7
    with pytest.raises(ValueError, match="mix must have no bad pairs without a fault, got 0.5"):
        cases_of({"none": Share(0.5, 0.5)}, 0, 4)


def test_an_unknown_fault_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="mix must give shares to some of none, shifted, scaled, swapped, torn, got"):
        cases_of({"upside_down": Share(1.0, 0.0)}, 0, 5)
