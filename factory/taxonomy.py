"""Closed vocabularies: what a diagnosis, a site, a skin type and a modality may be called.

Everything that enters a table uses these words or is refused by name, so that no later step has to guess. What a
diagnosis counts as is the label policy's to say (`labels.yaml`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from factory import labels

DIAGNOSES: tuple[str, ...] = labels.default().diagnoses("dermatology")
# Every word that `corpus.diagnosis` may hold; only dermatology's are generated.
ALL_DIAGNOSES: tuple[str, ...] = tuple(name for domain in labels.DOMAINS for name in labels.default().diagnoses(domain))

# What a reader of a caption or a report sees.
DIAGNOSIS_NAMES: dict[str, str] = {
    "nevus": "melanocytic nevus",
    "ak_iec_mixed": "actinic keratosis or intraepithelial carcinoma",
    "bowen_disease": "Bowen's disease",
    "vascular": "vascular lesion",
}

SKIN_TYPES: tuple[str, ...] = ("I", "II", "III", "IV", "V", "VI")
# Lower bounds of the individual typology angle, in degrees, for types I to V; below the last is VI.
ITA_BOUNDS: tuple[float, ...] = (55.0, 41.0, 28.0, 10.0, -30.0)
SKIN_WORDS: dict[str, str] = {
    "I": "very light", "II": "light", "III": "intermediate", "IV": "tan", "V": "brown", "VI": "dark",
}  # fmt: skip
# What a skin type is stated in; each scale has its own words and none is turned into another.
SKIN_TYPE_WORDS: dict[str, tuple[str, ...]] = {
    "fst": SKIN_TYPES, "ddi": ("12", "34", "56"), "milk10k": ("0", "1", "2", "3", "4", "5"), "ita": SKIN_TYPES,
}  # fmt: skip
SKIN_TYPE_SCALES: tuple[str, ...] = tuple(SKIN_TYPE_WORDS)
FITZPATRICK_SCALES: tuple[str, ...] = ("fst", "ita")  # those whose words are I to VI

MODALITIES: tuple[str, ...] = ("dermoscopic", "clinical", "tbp_tile", "colonoscopy", "fundus")
# How a diagnosis was confirmed.
CONFIRMATIONS: tuple[str, ...] = ("histology", "confocal", "follow_up", "consensus", "clinical", "none")
SPLITS: tuple[str, ...] = ("train", "val", "test")
SITES: tuple[str, ...] = (
    "head_neck", "anterior_torso", "posterior_torso", "lateral_torso", "upper_extremity", "lower_extremity",
    "torso", "palms_soles", "hand", "foot", "oral_genital",
)  # fmt: skip

# Those that are not their own name in words.
SITE_WORDS: dict[str, str] = {
    "head_neck": "head or neck", "palms_soles": "palms or soles", "oral_genital": "mouth or genitals",
}  # fmt: skip

# The six colours of dermoscopy (the ABCD rule's), in the order captions name them.
COLORS: tuple[str, ...] = ("light-brown", "dark-brown", "black", "blue-gray", "red", "white")
# What a person may type for them on the command line.
COLOR_ALIASES: dict[str, str] = {"brown": "dark-brown", "tan": "light-brown", "blue": "blue-gray", "gray": "blue-gray"}
LEVELS: tuple[str, ...] = ("low", "medium", "high")
# The share of the view that a lesion takes (see prompts.SIZE_LEVELS): of an image without a scale no more can be said.
LESION_SIZES: tuple[str, ...] = ("small", "medium-sized", "large")
# What can be said against a caption (quality/captions.py).
CAPTION_FINDINGS: tuple[str, ...] = (
    "unsupported_measurement", "diagnosis_in_blind_caption", "contradicts_itself", "contradicts_measured",
    "contradicts_label", "attribute_missing",
)  # fmt: skip


def is_malignant(diagnosis: str) -> bool | None:
    """Whether our policy counts this diagnosis as malignant; None where the question does not arise."""
    return labels.default().malignant(check(diagnosis, ALL_DIAGNOSES, "diagnosis"))


def diagnosis_name(diagnosis: str) -> str:
    """The diagnosis in words: `seborrheic_keratosis` -> `seborrheic keratosis`."""
    return DIAGNOSIS_NAMES.get(diagnosis, diagnosis.replace("_", " "))


def skin_type_of_ita(ita: float) -> str:
    """Fitzpatrick band (I to VI) of an individual typology angle in degrees."""
    for name, bound in zip(SKIN_TYPES, ITA_BOUNDS, strict=False):
        if ita > bound:
            return name
    return SKIN_TYPES[-1]


def fitzpatrick(skin_type: str | None, scale: str | None, ita: float | None) -> str | None:
    """I to VI of a corpus row: what is published where that is on this scale, else the band of the measured angle; None
    where neither is known. No other scale is turned into this one."""
    if skin_type is not None and scale in FITZPATRICK_SCALES:
        return skin_type
    return None if ita is None else skin_type_of_ita(ita)


def nearest(word: str, vocabulary: Iterable[str]) -> str | None:
    """The word that was probably meant: one that begins with what was typed, else the one spelled most alike."""
    known = list(vocabulary)
    begun = [name for name in known if word and name.startswith(word)]
    return next(iter(begun or difflib.get_close_matches(word, known, n=1)), None)


def check(value: str, vocabulary: tuple[str, ...], field: str) -> str:
    """The value, if the vocabulary has it; else a ValueError that names the nearest right word."""
    if value in vocabulary:
        return value
    near = nearest(value, vocabulary)
    hint = f"did you mean {near!r}?" if near else f"choose one of {', '.join(vocabulary)}."
    raise ValueError(f"{field} must be a known word, got {value!r}; {hint}")


def colors_from_words(words: str) -> tuple[str, ...]:
    """`brown,black,blue-gray` -> the dermoscopic colours, in canonical order."""
    named = {COLOR_ALIASES.get(word.strip(), word.strip()) for word in words.split(",") if word.strip()}
    return tuple(color for color in COLORS if color in {check(name, COLORS, "colors") for name in named})
