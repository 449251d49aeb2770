"""The one sentence: what a caption says of an image is what a prompt asks of a generator, in the same words.

The prefix is the one DermaFlux's released demo was trained with; the ABC words follow its instruction ("asymmetry,
border irregularity, and color"). Sizes are never stated: without a scale in the image they would be invented.

    This photo depicts a malignant lesion. Here's a description of the mole: melanoma on tan skin, high asymmetry,
    medium border irregularity, colors light-brown, dark-brown and black.

The blind arm (`label_in_prompt=False`) names neither malignancy nor diagnosis.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from factory import taxonomy
from factory.phantom import ASYMMETRY_LEVELS, BORDER_LEVELS, level

_PREFIX = "This photo depicts a {label}lesion."
_DESCRIPTION = " Here's a description of the mole: {clauses}."
_MEASUREMENT = re.compile(
    r"\b(?:\d+(?:[.,]\d+)?(?:\s*(?:-|–|to)\s*\d+(?:[.,]\d+)?)?|one|two|three|four|five|six|seven|eight|nine|ten)"
    r"[\s-]*(?:mm|cm|millimet(?:er|re)s?|centimet(?:er|re)s?|inch(?:es)?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Attributes:
    """The ABC of a lesion: numbers that grow with what they name, and colours in the vocabulary's order.

    `asymmetry` is 0 (mirror symmetric) to 1, `border_irregularity` is perimeter^2 / (4 pi area) - 1 (0 for a disk).
    """

    asymmetry: float
    border_irregularity: float
    colors: tuple[str, ...]

    @property
    def color_count(self) -> int:
        return len(self.colors)

    @property
    def asymmetry_level(self) -> str:
        """`low`, `medium` or `high`: the terciles of the phantoms."""
        return level(self.asymmetry, ASYMMETRY_LEVELS)

    @property
    def border_level(self) -> str:
        """`low`, `medium` or `high`: the terciles of the phantoms."""
        return level(self.border_irregularity, BORDER_LEVELS)


def prompt_for(
    diagnosis: str | None,
    skin_type: str | None = None,
    asymmetry_level: str | None = None,
    border_level: str | None = None,
    colors: Iterable[str] | None = None,
    label_in_prompt: bool = True,
) -> str:
    """The sentence for a diagnosis and what is known or wanted of its looks; what is None is not mentioned.

    Words outside the vocabularies are refused with the nearest right one. At most 40 words.
    """
    label, subject = "", "lesion"
    if label_in_prompt and diagnosis is not None:
        label = "malignant " if taxonomy.is_malignant(diagnosis) else "benign "
        subject = taxonomy.diagnosis_name(diagnosis)
    clauses = [_on_skin(subject, skin_type)]
    for value, noun in ((asymmetry_level, "asymmetry"), (border_level, "border irregularity")):
        if value is not None:
            clauses.append(f"{taxonomy.check(value, taxonomy.LEVELS, noun.replace(' ', '_'))} {noun}")
    if colors:
        clauses.append(_colors(colors))
    said = "" if clauses == ["lesion"] else _DESCRIPTION.format(clauses=", ".join(clauses))
    return _PREFIX.format(label=label) + said


def caption_for(
    attributes: Attributes, diagnosis: str | None, skin_type: str | None = None, label_in_prompt: bool = True
) -> str:
    """The sentence for measured attributes."""
    return prompt_for(
        diagnosis, skin_type, attributes.asymmetry_level, attributes.border_level, attributes.colors, label_in_prompt
    )


def unsupported_measurements(text: str) -> list[str]:
    """Sizes that a caption states and an image without a scale cannot support, as written: `2-3 millimetres`."""
    return [match.group(0) for match in _MEASUREMENT.finditer(text)]


def _on_skin(subject: str, skin_type: str | None) -> str:
    if skin_type is None:
        return subject
    return f"{subject} on {taxonomy.SKIN_WORDS[taxonomy.check(skin_type, taxonomy.SKIN_TYPES, 'skin_type')]} skin"


def _colors(colors: Iterable[str]) -> str:
    named = {taxonomy.check(color, taxonomy.COLORS, "colors") for color in colors}
    ordered = [color for color in taxonomy.COLORS if color in named]
    if len(ordered) == 1:
        return f"color {ordered[0]}"
    return f"colors {', '.join(ordered[:-1])} and {ordered[-1]}"
