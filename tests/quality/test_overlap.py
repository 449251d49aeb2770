"""Overlap of masks whose areas can be counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from factory.quality.overlap import agreement, boundary_f1, dice, hausdorff95, iou


def square(left: int, size: int = 10, side: int = 40) -> np.ndarray:
    mask = np.zeros((side, side), bool)
    mask[10 : 10 + size, left : left + size] = True
    return mask


def test_squares_that_share_half_have_a_third_in_common() -> None:
    a, b = square(5), square(10)
    assert iou(a, b) == pytest.approx(50 / 150) and dice(a, b) == pytest.approx(100 / 200)
    assert isinstance(iou(a, b), float)


def test_a_batch_gives_each_pair_its_own_score() -> None:
    a, b = np.stack([square(5)] * 3), np.stack([square(5), square(10), square(20)])
    assert iou(a, b) == pytest.approx([1, 1 / 3, 0]) and dice(a, b) == pytest.approx([1, 0.5, 0])


def test_empty_masks_agree_with_each_other_only() -> None:
    empty, some = np.zeros((40, 40), bool), square(5)
    assert (iou(empty, empty), dice(empty, empty), hausdorff95(empty, empty), boundary_f1(empty, empty)) == (1, 1, 0, 1)
    assert (iou(empty, some), dice(some, empty), boundary_f1(empty, some)) == (0, 0, 0)
    assert hausdorff95(empty, some) == pytest.approx(40 * 2**0.5)


def test_a_shift_of_three_pixels_is_a_distance_of_three() -> None:
    assert hausdorff95(square(5), square(8)) == pytest.approx(3, abs=0.01)
    assert hausdorff95(square(5), square(5)) == 0


def test_the_boundary_score_forgives_what_is_within_its_tolerance() -> None:
    assert boundary_f1(square(5), square(6)) == 1.0
    assert boundary_f1(square(5), square(25)) == 0.0
    assert 0 < boundary_f1(square(5), square(9)) < 1


def test_shapes_and_types_must_match() -> None:
    with pytest.raises(ValueError, match="same shape"):
        iou(square(5), square(5, side=41))
    with pytest.raises(ValueError, match="must be bool"):
        dice(square(5).astype(np.uint8), square(5).astype(np.uint8))


def test_agreement_with_a_sure_finding_is_plain_iou_and_the_two_shares() -> None:
    found, shown = square(5), square(8)
    rows = agreement(np.stack([found, found]).astype(np.float32), np.stack([shown, found]))
    assert rows[1] == pytest.approx([1, 1, 1, 1, 1]) and rows.shape == (2, 5)
    share = float((found & shown).sum() / found.sum())
    assert rows[0] == pytest.approx([iou(found, shown), iou(found, shown), 1, share, share])


def test_an_unsure_finding_has_the_same_iou_and_says_that_it_is_unsure() -> None:
    found = square(5)
    (row,) = agreement(np.where(found, 0.6, 0.1).astype(np.float32)[None], found[None])
    inside, outside = 0.6 * found.sum(), 0.1 * (~found).sum()
    soft = inside / (found.sum() + outside)
    assert row == pytest.approx([1, soft, soft, 1, 1])
    (nothing,) = agreement(np.zeros((1, 40, 40), np.float32), found[None])
    assert nothing == pytest.approx([0, 0, 0, 0, 0])
