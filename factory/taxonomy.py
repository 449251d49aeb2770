"""Closed vocabularies: what a diagnosis, a site, a skin type and a modality may be called.

Everything that enters a table uses these words or is refused by name, so that no later step has to guess. The
benign/malignant policy sits beside the diagnoses it judges. Actinic keratosis is malignant here only as the
mixed class that HAM10000 publishes (`ak_iec_mixed`, which contains intraepithelial carcinoma).
"""

from __future__ import annotations

import difflib

MALIGNANT: dict[str, bool] = {
    "nevus": False,
    "melanoma": True,
    "seborrheic_keratosis": False,
    "basal_cell_carcinoma": True,
    "squamous_cell_carcinoma": True,
    "bowen_disease": True,
    "actinic_keratosis": False,
    "ak_iec_mixed": True,
    "dermatofibroma": False,
    "vascular": False,
    "other_benign": False,
    "other_malignant": True,
}
DIAGNOSES: tuple[str, ...] = tuple(MALIGNANT)

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
SKIN_TYPE_SCALES: tuple[str, ...] = ("fst", "ddi", "milk10k", "ita")

MODALITIES: tuple[str, ...] = ("dermoscopic", "clinical", "tbp_tile")
SPLITS: tuple[str, ...] = ("train", "val", "test")
SITES: tuple[str, ...] = (
    "head_neck", "anterior_torso", "posterior_torso", "lateral_torso", "upper_extremity", "lower_extremity",
    "palms_soles", "oral_genital",
)  # fmt: skip

# The six colours of dermoscopy (the ABCD rule's), in the order captions name them.
COLORS: tuple[str, ...] = ("light-brown", "dark-brown", "black", "blue-gray", "red", "white")
# What a person may type for them on the command line.
COLOR_ALIASES: dict[str, str] = {"brown": "dark-brown", "tan": "light-brown", "blue": "blue-gray", "gray": "blue-gray"}
LEVELS: tuple[str, ...] = ("low", "medium", "high")


def is_malignant(diagnosis: str) -> bool:
    """Whether the policy counts this diagnosis as malignant."""
    return MALIGNANT[check(diagnosis, DIAGNOSES, "diagnosis")]


def diagnosis_name(diagnosis: str) -> str:
    """The diagnosis in words: `seborrheic_keratosis` -> `seborrheic keratosis`."""
    return DIAGNOSIS_NAMES.get(diagnosis, diagnosis.replace("_", " "))


def skin_type_of_ita(ita: float) -> str:
    """Fitzpatrick band (I to VI) of an individual typology angle in degrees."""
    for name, bound in zip(SKIN_TYPES, ITA_BOUNDS, strict=False):
        if ita > bound:
            return name
    return SKIN_TYPES[-1]


def check(value: str, vocabulary: tuple[str, ...], field: str) -> str:
    """The value, if the vocabulary has it; else a ValueError that names the nearest right word."""
    if value in vocabulary:
        return value
    near = difflib.get_close_matches(value, vocabulary, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(vocabulary)}."
    raise ValueError(f"{field} must be a known word, got {value!r}; {hint}")


def colors_from_words(words: str) -> tuple[str, ...]:
    """`brown,black,blue-gray` -> the dermoscopic colours, in canonical order."""
    named = {COLOR_ALIASES.get(word.strip(), word.strip()) for word in words.split(",") if word.strip()}
    return tuple(color for color in COLORS if color in {check(name, COLORS, "colors") for name in named})
