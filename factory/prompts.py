"""The one sentence: what a caption says of an image is what a prompt asks of a generator, in the same words.

The prefix is the one DermaFlux's released demo was trained with; the ABC words follow its instruction ("asymmetry,
border irregularity, and color"). No size in millimetres is stated: without a scale in the image it would be invented;
the extended bank says what share of the view a lesion takes.

    This photo depicts a malignant lesion. Here's a description of the mole: melanoma on tan skin, high asymmetry,
    medium border irregularity, colors light-brown, dark-brown and black.

The blind arm (`label_in_prompt=False`) names neither malignancy nor diagnosis. How much is said is a bank's matter
(`banks.py`): this sentence is the standard one's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from factory import taxonomy
from factory.banks import bank as bank_of
from factory.phantom import ASYMMETRY_LEVELS, BORDER_LEVELS, level

# Words for the share of the view that a lesion's largest diameter takes, by the cuts of SIZE_LEVELS: of an image
# without a scale no more can be said.
SIZE_WORDS = taxonomy.LESION_SIZES
SIZE_LEVELS = (0.40, 0.66)  # the terciles of the phantoms
DARK_SHARE = 0.02  # of the view; more of it is seen as dark corners
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


@dataclass(frozen=True)
class Surroundings:
    """What only the extended bank says of an image; what is None is not said."""

    site: str | None = None
    size: str | None = None
    modality: str | None = None
    artefacts: tuple[str, ...] = ()

    @classmethod
    def of(cls, row: Mapping[str, Any], relative_diameter: float | None = None) -> Surroundings:
        """Of a corpus row, and of the share of the view's shorter side that its lesion takes."""
        size = None if relative_diameter is None else size_word(relative_diameter)
        dark = max(row.get("vignette") or 0.0, row.get("black_border") or 0.0) >= DARK_SHARE
        return cls(row.get("site"), size, row.get("modality"), ("dark corners",) if dark else ())


def size_word(relative_diameter: float) -> str:
    """`small`, `medium-sized` or `large`: the largest diameter against the view's shorter side, no size in mm."""
    return SIZE_WORDS[sum(relative_diameter >= cut for cut in SIZE_LEVELS)]


def prompt_for(
    diagnosis: str | None,
    skin_type: str | None = None,
    asymmetry_level: str | None = None,
    border_level: str | None = None,
    colors: Iterable[str] | None = None,
    label_in_prompt: bool = True,
    bank: str = "standard",
    surroundings: Surroundings | None = None,
) -> str:
    """The prompt for a diagnosis and what is known or wanted of its looks; what is None is not mentioned.

    Words outside the vocabularies are refused with the nearest right one. At most 40 words in the standard bank, 60 in
    the extended one.
    """
    known: dict[str, str] = {}
    if label_in_prompt and diagnosis is not None:
        known["label"] = "malignant" if taxonomy.is_malignant(diagnosis) else "benign"
        known["diagnosis"] = taxonomy.diagnosis_name(diagnosis)
    if skin_type is not None:
        known["skin"] = taxonomy.SKIN_WORDS[taxonomy.check(skin_type, taxonomy.SKIN_TYPES, "skin_type")]
    for value, word, field in (
        (asymmetry_level, "asymmetry", "asymmetry"),
        (border_level, "border", "border_irregularity"),
    ):
        if value is not None:
            known[word] = taxonomy.check(value, taxonomy.LEVELS, field)
    if colors:
        known["colors"] = _colors(colors)
    return bank_of(bank).worded(known | _surroundings(surroundings or Surroundings()))


def caption_for(
    attributes: Attributes,
    diagnosis: str | None,
    skin_type: str | None = None,
    label_in_prompt: bool = True,
    bank: str = "standard",
    surroundings: Surroundings | None = None,
) -> str:
    """The sentence for measured attributes."""
    levels = (attributes.asymmetry_level, attributes.border_level)
    return prompt_for(diagnosis, skin_type, *levels, attributes.colors, label_in_prompt, bank, surroundings)


def unsupported_measurements(text: str) -> list[str]:
    """Sizes that a caption states and an image without a scale cannot support, as written: `2-3 millimetres`."""
    return [match.group(0) for match in _MEASUREMENT.finditer(text)]


def _surroundings(found: Surroundings) -> dict[str, str]:
    words = {"size": found.size, "artefacts": " and ".join(found.artefacts)}
    if found.site is not None:
        site = taxonomy.check(found.site, taxonomy.SITES, "site")
        words["site"] = taxonomy.SITE_WORDS.get(site, site.replace("_", " "))
    if found.modality is not None:
        words["modality"] = taxonomy.check(found.modality, taxonomy.MODALITIES, "modality").replace("_", " ")
    return {name: word for name, word in words.items() if word}


def _colors(colors: Iterable[str]) -> str:
    named = {taxonomy.check(color, taxonomy.COLORS, "colors") for color in colors}
    ordered = [color for color in taxonomy.COLORS if color in named]
    if len(ordered) == 1:
        return f"color {ordered[0]}"
    return f"colors {', '.join(ordered[:-1])} and {ordered[-1]}"
