"""The measured captioner with instruments of known readings."""

from __future__ import annotations

import numpy as np
import pytest

from factory.models.captioner import MeasuredCaptioner, NoLesion
from factory.prompts import Attributes, caption_for

READING = Attributes(0.2, 0.5, ("red",))
RGB = np.zeros((8, 8, 3), np.uint8)


def measure(rgb: np.ndarray, mask: np.ndarray) -> Attributes:
    if not mask.any():
        raise ValueError("nothing here")
    return READING


def test_a_given_mask_is_used_and_the_sentence_is_the_grammars() -> None:
    captioner = MeasuredCaptioner(measure, lambda rgb: pytest.fail("the mask was given"))
    attributes, sentence, source = captioner.caption(RGB, np.ones((8, 8), bool), "melanoma", True, "II")
    assert (attributes, sentence, source) == (READING, caption_for(READING, "melanoma", "II"), "given")


def test_a_missing_mask_is_estimated_and_the_label_can_be_left_out() -> None:
    captioner = MeasuredCaptioner(measure, lambda rgb: np.ones(rgb.shape[:2], bool))
    _, sentence, source = captioner.caption(RGB, None, "melanoma", False)
    assert source == "estimated" and "melanoma" not in sentence


def test_no_lesion_is_an_error_of_its_own() -> None:
    captioner = MeasuredCaptioner(measure, lambda rgb: np.zeros(rgb.shape[:2], bool))
    with pytest.raises(NoLesion, match="the estimated mask must hold a lesion"):
        captioner.caption(RGB, None, "nevus", True)
