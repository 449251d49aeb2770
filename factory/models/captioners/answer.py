"""From a model's text to typed attributes: a JSON object anywhere in it, else the ABC words of prose."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from factory import taxonomy, wording

Level = Literal["low", "medium", "high"]
Color = Literal["light-brown", "dark-brown", "black", "blue-gray", "red", "white"]
MAX_CHARS = 4000  # of a description that is kept as a caption; a longer one is cut at a word
_REFUSAL = re.compile(r"^\W*(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:cannot|can't|can not)|sorry|as an ai)", re.I)
_SYNONYMS = {"none": "low", "absent": "low", "mild": "low", "moderate": "medium", "severe": "high", "marked": "high"}


class Description(BaseModel):
    """The answer that is asked for; its JSON schema constrains decoding where a backend can."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"additionalProperties": False})

    asymmetry: Level
    border_irregularity: Level
    colors: list[Color]
    description: str

    @field_validator("asymmetry", "border_irregularity", mode="before")
    @classmethod
    def _level(cls, value: Any) -> Any:
        word = value.strip().lower() if isinstance(value, str) else value
        return _SYNONYMS.get(word, word) if isinstance(word, str) else word

    @field_validator("colors", mode="before")
    @classmethod
    def _colors(cls, value: Any) -> Any:
        words = [value] if isinstance(value, str) else value
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return value
        named = {taxonomy.COLOR_ALIASES.get(word.strip().lower(), word.strip().lower()) for word in words}
        known = [color for color in taxonomy.COLORS if color in named]
        return known if len(known) == len(named) else sorted(named)


def schema() -> dict[str, Any]:
    """The JSON schema of an answer: every key asked for, nothing else allowed."""
    found = Description.model_json_schema()
    return {name: found[name] for name in ("type", "properties", "required", "additionalProperties")}


@dataclass(frozen=True)
class Parsed:
    """What a text states. A level that prose leaves open is None; `parsed_as` is `json` or `prose`."""

    asymmetry: str | None
    border_irregularity: str | None
    colors: tuple[str, ...]
    description: str
    parsed_as: str


def parse(text: str) -> Parsed | None:
    """What a text states, or None where it is no description: a refusal, or without a single attribute."""
    for found in _objects(text):
        try:
            said = Description.model_validate(found)
        except ValidationError:
            continue
        if said.description.strip():
            description = _cut(said.description)
            return Parsed(said.asymmetry, said.border_irregularity, tuple(said.colors), description, "json")
    return _prose(text)


def _objects(text: str) -> Iterator[Any]:
    """The JSON objects in a text, outermost first."""
    decoder, at = json.JSONDecoder(), text.find("{")
    tried = 0
    while at >= 0 and tried < 64:  # garbage may be all braces
        tried += 1
        try:
            found, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at = text.find("{", at + 1)
            continue
        yield found
        at = text.find("{", end)


def _prose(text: str) -> Parsed | None:
    if _REFUSAL.match(text) or text.lstrip().startswith(("{", "```")):  # a JSON answer that is not valid is no prose
        return None
    asymmetry = wording.stated_levels(text, "asymmetry")
    border = wording.stated_levels(text, "border_irregularity")
    colors = wording.stated_colors(text)
    if not asymmetry and not border and not colors:
        return None
    return Parsed(next(iter(asymmetry), None), next(iter(border), None), colors, _cut(text), "prose")


def _cut(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= MAX_CHARS else one_line[:MAX_CHARS].rsplit(" ", 1)[0]
