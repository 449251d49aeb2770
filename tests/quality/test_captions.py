"""Findings against captions, one by one."""

from __future__ import annotations

from typing import Any

import pytest

from factory import taxonomy
from factory.prompts import Attributes
from factory.quality.captions import diagnoses_in, findings

ROUND = Attributes(0.0, 0.0, ("dark-brown",))  # low and low
FINE = "The mole is slightly asymmetrical with smooth borders and a dark brown color."


def found(description: str = FINE, **changed: Any) -> list[str]:
    known: dict[str, Any] = {
        "asymmetry": "low", "border_irregularity": "low", "colors": ("dark-brown",), "measured": ROUND,
        "label": "benign", "label_in_prompt": True,
    } | changed  # fmt: skip
    return findings(description, **known)


def test_a_caption_that_says_what_was_measured_has_none() -> None:
    assert found() == found(measured=None) == []


def test_a_size_without_a_scale_is_unsupported() -> None:
    assert found("A mole of about 2-3 millimetres.") == ["unsupported_measurement"]
    assert found("A mole of about 2-3 millimetres.", scale_known=True) == []


@pytest.mark.parametrize("word", ["benign", "melanoma", "Malignancy", "seborrheic keratosis", "nevi", "nevus"])
def test_a_blind_caption_that_names_a_diagnosis_was_not_blind(word: str) -> None:
    text = f"A {word} with smooth borders."
    assert found(text, label=None, label_in_prompt=False) == ["diagnosis_in_blind_caption"]
    assert "diagnosis_in_blind_caption" not in found(text)


def test_describing_is_not_diagnosing() -> None:
    assert diagnoses_in("A dark brown mole, a pigmented lesion with regular borders on tan skin.") == []


@pytest.mark.parametrize(
    "text",
    ["It is highly asymmetrical.", "The borders are ragged.", "It is symmetrical. Yet it shows marked asymmetry."],
)
def test_ends_of_one_scale_contradict_each_other(text: str) -> None:
    assert found(text) == ["contradicts_itself"]


def test_one_color_beside_three_contradicts_itself() -> None:
    colors = ("dark-brown", "black", "red")
    assert found("It has a uniform color.", colors=colors) == ["contradicts_itself"]


@pytest.mark.parametrize(
    "stated", [{"asymmetry": "high"}, {"border_irregularity": "high"}, {"colors": ("white", "red")}]
)
def test_the_other_end_than_measured_contradicts_the_measurement(stated: dict[str, Any]) -> None:
    assert found("A mole.", **stated) == ["contradicts_measured"]
    assert found("A mole.", asymmetry="medium") == []  # one level beside is not the other end


def test_the_opposite_of_the_label_contradicts_it() -> None:
    assert found("This suggests malignancy.") == ["contradicts_label"]
    assert found("There is no sign of malignancy.") == []
    assert found("It appears benign.", label="malignant") == ["contradicts_label"]


def test_what_is_left_open_is_missing() -> None:
    assert found("A mole.", asymmetry=None) == found("A mole.", colors=()) == ["attribute_missing"]


def test_findings_are_the_vocabularys() -> None:
    everything = found(
        "A melanoma of 3 mm, highly asymmetrical.", asymmetry="low", border_irregularity=None,
        label_in_prompt=False, colors=("red",),
    )  # fmt: skip
    assert everything == [name for name in taxonomy.CAPTION_FINDINGS if name in everything]
    assert len(everything) == 5
