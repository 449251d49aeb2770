"""Where masks come from when a record has none."""

from __future__ import annotations

import numpy as np
import pytest

from factory import phantom
from factory.quality.overlap import iou
from factory.stages.masks import SegmenterMasks, expected_overlap, mask_source, measured_mask


@pytest.fixture(scope="module")
def segmenter() -> SegmenterMasks:
    return SegmenterMasks()


def test_the_starters_segmenter_finds_phantoms_that_it_never_saw_better_than_colour_does(
    segmenter: SegmenterMasks,
) -> None:
    drawn = [phantom.draw(80, index, 128) for index in range(16)]
    found = [segmenter(p.image) for p in drawn]
    by_network = [float(iou(p.mask, f.mask)) for p, f in zip(drawn, found, strict=True)]
    by_colour = [float(iou(p.mask, measured_mask(p.image).mask)) for p in drawn]
    assert np.median(by_network) > 0.85
    assert np.mean(by_network) > np.mean(by_colour)
    assert {f.source for f in found} == {"segmenter"}
    assert all(f.confidence is not None and 0 <= f.confidence <= 1 for f in found)


@pytest.mark.parametrize("shape", [(96, 130, 3), (200, 150, 3)])
def test_a_mask_has_its_images_size_whatever_that_is(segmenter: SegmenterMasks, shape: tuple[int, int, int]) -> None:
    assert segmenter(np.full(shape, 170, np.uint8)).mask.shape == shape[:2]


def test_expected_overlap_is_the_iou_with_what_is_certain_and_nought_for_nothing() -> None:
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    lesion = np.zeros((4, 4), np.float32)
    lesion[1:3] = 1.0
    assert expected_overlap(lesion, mask) == pytest.approx(iou(mask, lesion > 0.5)) == pytest.approx(1 / 3)
    assert expected_overlap(np.full((4, 4), 0.8, np.float32), np.ones((4, 4), bool)) == pytest.approx(0.8)
    assert expected_overlap(lesion, np.zeros((4, 4), bool)) == 0.0


def test_the_recipes_word_names_the_source() -> None:
    assert mask_source("measured") is measured_mask
    assert isinstance(mask_source("segmenter"), SegmenterMasks)
