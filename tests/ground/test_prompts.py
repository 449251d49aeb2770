"""One grammar for captions and prompts."""

from __future__ import annotations

import itertools

import pytest

from factory import prompts, taxonomy
from factory.prompts import Attributes, caption_for, prompt_for, unsupported_measurements

SPOTTED = Attributes(asymmetry=0.3, border_irregularity=0.0, colors=("light-brown", "black"))


def test_the_sentence_has_the_papers_prefix_and_the_three_attributes() -> None:
    assert caption_for(SPOTTED, "melanoma", "IV") == (
        "This photo depicts a malignant lesion. Here's a description of the mole: melanoma on tan skin, "
        "high asymmetry, low border irregularity, colors light-brown and black."
    )


def test_a_caption_is_the_prompt_of_the_same_looks() -> None:
    wanted = prompt_for("nevus", "I", "high", "low", ["black", "light-brown"])
    assert wanted == caption_for(SPOTTED, "nevus", "I")


@pytest.mark.parametrize("diagnosis", taxonomy.DIAGNOSES)
def test_the_blind_arm_never_names_the_label(diagnosis: str) -> None:
    blind = caption_for(SPOTTED, diagnosis, "VI", label_in_prompt=False)
    assert blind == caption_for(SPOTTED, None, "VI")
    assert not any(word in blind for word in ("malignant", "benign", taxonomy.diagnosis_name(diagnosis)))


def test_what_is_not_known_is_not_said() -> None:
    assert prompt_for(None) == "This photo depicts a lesion."
    assert prompt_for("nevus").endswith("mole: melanocytic nevus.")
    assert prompt_for("nevus", colors=["red"]).endswith("melanocytic nevus, color red.")
    assert prompt_for("nevus", colors=[]) == prompt_for("nevus")


def test_no_sentence_is_longer_than_forty_words_or_states_a_size() -> None:
    for diagnosis, skin, level in itertools.product(taxonomy.DIAGNOSES, taxonomy.SKIN_TYPES, taxonomy.LEVELS):
        sentence = prompt_for(diagnosis, skin, level, level, taxonomy.COLORS)
        assert len(sentence.split()) <= 40
        assert unsupported_measurements(sentence) == []


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("skin_type", "VII"), ("asymmetry_level", "hgih"), ("border_level", "big"), ("colors", ["brwn"])],
)
def test_words_outside_the_vocabulary_are_refused(field: str, wrong: object) -> None:
    with pytest.raises(ValueError, match="must be a known word"):
        prompt_for("nevus", **{field: wrong})


def test_invented_sizes_are_found() -> None:
    text = "It is 2-3 millimetres wide, about 5mm long, two cm deep; it has 4 colors and 3 dots."
    assert unsupported_measurements(text) == ["2-3 millimetres", "5mm", "two cm"]


def test_levels_grow_with_the_numbers() -> None:
    rising = ["low", "medium", "high"]
    assert [Attributes(x, 0, ("red",)).asymmetry_level for x in (0.0, *prompts.ASYMMETRY_LEVELS)] == rising
    assert [Attributes(0, x, ("red",)).border_level for x in (0.0, *prompts.BORDER_LEVELS)] == rising
    assert SPOTTED.color_count == 2
