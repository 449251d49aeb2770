"""What can be said against a caption: findings with fixed names (taxonomy.CAPTION_FINDINGS), by pure functions.

The ABC words were made for melanocytic lesions: here they describe and decide nothing. A finding is stored; only those
that the recipe lists in `caption.reject` reject.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from factory import taxonomy, wording
from factory.prompts import Attributes, unsupported_measurements

# What names a diagnosis or its nature beside the vocabulary's own words.
_NATURE = (
    "benign", "malignant", "malignancy", "cancer", "cancerous", "carcinoma", "melanoma", "nevus", "nevi", "naevus",
    "keratosis", "precancerous", "non-cancerous", "tumor", "tumour", "dermatofibroma", "hemangioma", "angioma",
)  # fmt: skip
_OPPOSITE = {"benign": ("malignant", "malignancy", "cancerous", "melanoma", "carcinoma"), "malignant": ("benign",)}
_NEGATED = r"(?:\b(?:no|not|without|non|rather than|nor|than)\b[\s-]+(?:\w+\s+){0,3})"


def findings(
    description: str,
    asymmetry: str | None,
    border_irregularity: str | None,
    colors: Iterable[str],
    measured: Attributes | None,
    label: str | None,
    label_in_prompt: bool,
    scale_known: bool = False,
) -> list[str]:
    """What is wrong with a model's description, in the vocabulary's order; [] for nothing.

    description: the model's own words, without our prefix; asymmetry, border_irregularity, colors: as it stated them;
    measured: what was measured, None where nothing could be; label: `benign`, `malignant` or None;
    scale_known: whether the model was told a scale, so that a size it states can be right.
    """
    stated = {"asymmetry": asymmetry, "border_irregularity": border_irregularity}
    named = tuple(colors)
    found = {
        "unsupported_measurement": not scale_known and bool(unsupported_measurements(description)),
        "diagnosis_in_blind_caption": not label_in_prompt and bool(diagnoses_in(description)),
        "contradicts_itself": _contradicts_itself(description, stated, named),
        "contradicts_measured": measured is not None and _contradicts_measured(stated, named, measured),
        "contradicts_label": label_in_prompt and label is not None and _says_opposite(description, label),
        "attribute_missing": None in stated.values() or not named,
    }
    return [name for name in taxonomy.CAPTION_FINDINGS if found[name]]


def diagnoses_in(text: str) -> list[str]:
    """The words in a text that name a diagnosis or say benign or malignant, as written."""
    return [match.group(0) for match in _diagnosis_words().finditer(text)]


@cache
def _diagnosis_words() -> re.Pattern[str]:
    names = {taxonomy.diagnosis_name(name) for name in taxonomy.DIAGNOSES} - {"other", "unknown"}
    words = sorted({*names, *_NATURE}, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})s?\b", re.IGNORECASE)


def _contradicts_itself(description: str, stated: dict[str, str | None], colors: tuple[str, ...]) -> bool:
    """Levels at both ends for one attribute, or one colour named as the only one beside others."""
    for attribute, level in stated.items():
        said = {*wording.stated_levels(description, attribute), *([level] if level else [])}
        if {"low", "high"} <= said:
            return True
    single = re.search(r"\b(?:uniform(?:ly)?|single|one|homogeneous(?:ly)?)\b[\s\w-]{0,20}\bcolou?r", description, re.I)
    return single is not None and len(colors) > 2


def _contradicts_measured(stated: dict[str, str | None], colors: tuple[str, ...], measured: Attributes) -> bool:
    """A level at the other end than the measured one, or no colour in common."""
    ends = {"low": "high", "high": "low"}
    pairs = ((stated["asymmetry"], measured.asymmetry_level), (stated["border_irregularity"], measured.border_level))
    if any(said is not None and ends.get(said) == seen for said, seen in pairs):
        return True
    return bool(colors) and not set(colors) & set(measured.colors)


def _says_opposite(description: str, label: str) -> bool:
    words = "|".join(_OPPOSITE.get(label, ()))
    if not words:
        return False
    said = re.sub(_NEGATED + rf"(?:{words})\b", " ", description, flags=re.IGNORECASE)
    return re.search(rf"\b(?:{words})\b", said, re.IGNORECASE) is not None
