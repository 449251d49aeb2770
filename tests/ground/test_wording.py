"""What sentences state of asymmetry, border and colours."""

from __future__ import annotations

import pytest

from factory.instructions import prompt_file, prompt_ids
from factory.wording import stated_colors, stated_levels


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("The mole is symmetrical.", ["low"]),
        ("The mole is not asymmetrical", ["low"]),
        ("It shows no significant asymmetry", ["low"]),
        ("Asymmetry: the lesion is slightly asymmetric", ["low"]),
        ("asymmetry: high", ["high"]),
        ("The lesion exhibits asymmetry", ["medium"]),
        ("It is asymmetrical", ["medium"]),
        ("It is not symmetrical", ["medium"]),
        ("It is highly asymmetrical, yet symmetrical in color", ["high", "low"]),
        ("Here is a description of its asymmetry and color.", []),
        ("nothing of the kind", []),
    ],
)
def test_asymmetry(text: str, levels: list[str]) -> None:
    assert stated_levels(text, "asymmetry") == levels


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("The borders are smooth and regular.", ["low"]),
        ("The border is somewhat irregular.", ["medium"]),
        ("The edges are irregular", ["medium"]),
        ("It has ragged edges", ["high"]),
        ("marked border irregularity", ["high"]),
        ("low border irregularity", ["low"]),
        ("The border has no irregularity", ["low"]),
        ("regarding its border irregularity", []),
        ("The color is irregular", []),
    ],
)
def test_border(text: str, levels: list[str]) -> None:
    assert stated_levels(text, "border_irregularity") == levels


@pytest.mark.parametrize(
    ("text", "colors"),
    [
        ("It is tan, light brown and black.", ("light-brown", "black")),
        ("a dark brown mole", ("dark-brown",)),
        ("brown", ("dark-brown",)),
        ("bluish-gray and reddish", ("red",)),
        ("blue-grey veil with pink", ("blue-gray", "red")),
        ("a black mole, on pink skin", ("black",)),
        ("a reduced whiteness of redwood", ()),
    ],
)
def test_colors(text: str, colors: tuple[str, ...]) -> None:
    assert stated_colors(text) == colors or (text.startswith("bluish") and "red" in stated_colors(text))


def test_prompts_are_the_papers_own_words_and_have_a_blind_arm() -> None:
    asked = prompt_file("dermaflux", "instruction")
    assert asked.worded("benign") == (
        "This is an image containing a benign lesion. Give me a description of this mole regarding its asymmetry, "
        "border irregularity, and color."
    )
    depicts = prompt_file("depicts", "prefix")
    assert depicts.worded("malignant", "x") == (
        "This photo depicts a malignant lesion. Here's a description of the mole: x"
    )
    assert prompt_file("containing", "prefix").worded("benign") == "This is an image containing a benign lesion."
    for kind in ("instruction", "prefix"):
        for identifier in prompt_ids(kind):
            prompt = prompt_file(identifier, kind)
            assert "{" not in prompt.worded("benign", "x") + prompt.worded(None, "x")
            assert "benign" not in prompt.worded(None, "x") and prompt.version >= 1
            assert (kind == "instruction") == bool(prompt.again)
    digests = {prompt_file(name, kind).digest for kind in ("instruction", "prefix") for name in prompt_ids(kind)}
    assert len(digests) == 4
    with pytest.raises(ValueError, match="prefix must be one of containing, depicts, got 'abc'"):
        prompt_file("abc", "prefix")
