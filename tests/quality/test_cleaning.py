"""Cleaned masks: one piece, small holes filled, everything else as it was sampled."""

from __future__ import annotations

import numpy as np

from factory.quality.cleaning import cleaned


def disk(radius: float, centre: tuple[int, int] = (32, 32), size: int = 64) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def soft(mask: np.ndarray) -> np.ndarray:
    return np.where(mask, 0.9, 0.1).astype(np.float32)


def test_what_is_whole_stays_as_it_is_and_half_is_not_enough() -> None:
    assert np.array_equal(cleaned(soft(disk(20))), disk(20))
    assert not cleaned(np.full((8, 8), 0.5, np.float32)).any()
    assert cleaned(np.full((8, 8), 0.51, np.float32)).all()
    assert not cleaned(np.zeros((8, 8), np.float32)).any()


def test_only_the_largest_piece_stays_and_corners_touch() -> None:
    assert np.array_equal(cleaned(soft(disk(15) | disk(4, (5, 5)) | disk(3, (60, 60)))), disk(15))
    stairs = np.eye(16, dtype=bool)
    assert np.array_equal(cleaned(soft(stairs)), stairs)


def test_a_hole_is_filled_up_to_a_hundredth_of_the_lesion() -> None:
    lesion = disk(20)
    room = int(0.01 * lesion.sum())  # 12 of 1,257 px, less where a hole is cut out
    for side, filled in ((3, True), (4, False)):
        holed = lesion.copy()
        holed[30 : 30 + side, 30 : 30 + side] = False
        assert (side * side <= room) == filled
        assert np.array_equal(cleaned(soft(holed)), lesion if filled else holed)
    assert np.array_equal(cleaned(soft(disk(20) & ~disk(6)), max_hole=1.0), disk(20))


def test_a_bay_that_is_open_to_the_border_is_no_hole() -> None:
    frame = np.ones((32, 32), bool)
    frame[0, 5] = frame[14, 14] = False
    wanted = np.ones((32, 32), bool)
    wanted[0, 5] = False
    assert np.array_equal(cleaned(soft(frame)), wanted)


def test_a_speck_inside_a_hole_is_part_of_the_hole_that_is_filled() -> None:
    ring = disk(20) & ~disk(2)
    ring[32, 32] = True
    assert np.array_equal(cleaned(soft(ring), max_hole=0.02), disk(20))
