"""Texts of models to attributes."""

from __future__ import annotations

import json

import pytest

from factory import taxonomy
from factory.models.captioners.answer import MAX_CHARS, Description, parse, schema

SAID = {"asymmetry": "high", "border_irregularity": "low", "colors": ["red", "black"], "description": "A mole."}


@pytest.mark.parametrize(
    "around", ["{}", "```json\n{}\n```", "Here it is: {} Anything else?", '{{"note": 1}} {}', "{{ not this: {}"]
)
def test_a_json_object_is_found_wherever_it_stands(around: str) -> None:
    found = parse(around.format(json.dumps(SAID)))
    assert found is not None
    assert (found.asymmetry, found.border_irregularity, found.parsed_as) == ("high", "low", "json")
    assert found.colors == ("black", "red")  # in the vocabulary's order


def test_usual_other_words_are_understood() -> None:
    found = parse(json.dumps(SAID | {"asymmetry": "Moderate", "border_irregularity": "SEVERE", "colors": ["brown"]}))
    assert found is not None
    assert (found.asymmetry, found.border_irregularity, found.colors) == ("medium", "high", ("dark-brown",))


@pytest.mark.parametrize(
    "text",
    [
        "", "   ", "qwertz", "{" * 100_000, '{"asymmetry": "high"}', json.dumps(SAID | {"colors": ["purple"]}),
        json.dumps(SAID | {"description": " "}), json.dumps(SAID)[:-9], "[1, 2]", "\x00\ufffd",
        "I'm sorry, but I can't describe the asymmetry of this irregular lesion.", "As an AI I see a red lesion.",
    ],
)  # fmt: skip
def test_what_is_no_description_is_none(text: str) -> None:
    assert parse(text) is None


def test_prose_is_read_for_its_words_and_kept_as_the_description() -> None:
    found = parse("The mole is **slightly asymmetrical**, with jagged borders.\n\nIts color is tan and dark brown.")
    assert found is not None
    assert (found.asymmetry, found.border_irregularity, found.parsed_as) == ("low", "high", "prose")
    assert found.colors == ("light-brown", "dark-brown") and "\n" not in found.description


def test_a_very_long_text_is_cut_at_a_word() -> None:
    found = parse("The mole is symmetrical. " + "word " * 2000)
    assert found is not None
    assert len(found.description) <= MAX_CHARS and found.description.endswith("word")


def test_the_schema_has_the_vocabularies_and_nothing_else() -> None:
    found = schema()["properties"]
    assert tuple(found["asymmetry"]["enum"]) == tuple(found["border_irregularity"]["enum"]) == taxonomy.LEVELS
    assert tuple(found["colors"]["items"]["enum"]) == taxonomy.COLORS
    assert set(found) == set(Description.model_fields)
