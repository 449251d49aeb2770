"""Prompt banks: how much a prompt says."""

from __future__ import annotations

import itertools

import pytest

from factory import taxonomy
from factory.banks import BANKS, bank
from factory.prompts import Surroundings, prompt_for, size_word, unsupported_measurements

AROUND = Surroundings("head_neck", "large", "dermoscopic", ("dark corners",))
LOOKS = ("melanoma", "IV", "high", "low", ["black"])


def test_each_bank_says_more_than_the_one_before() -> None:
    said = {name: prompt_for(*LOOKS, bank=name, surroundings=AROUND) for name in BANKS}
    assert said["minimal"] == "melanoma skin lesion"
    assert said["standard"] == (
        "This photo depicts a malignant lesion. Here's a description of the mole: melanoma on tan skin, "
        "high asymmetry, low border irregularity, color black."
    )
    assert said["extended"] == said["standard"][:-1] + (
        ", on the head or neck, large in view, dermoscopic image, with dark corners."
    )


def test_what_is_not_known_is_not_said_in_any_bank() -> None:
    assert prompt_for(None, bank="minimal") == "skin lesion"
    assert prompt_for(None, bank="extended") == prompt_for(None) == "This photo depicts a lesion."
    assert prompt_for("nevus", bank="extended") == prompt_for("nevus")
    assert prompt_for("melanoma", bank="minimal", label_in_prompt=False) == "skin lesion"
    assert prompt_for(None, bank="extended", surroundings=AROUND).endswith("mole: lesion, on the head or neck, large "
        "in view, dermoscopic image, with dark corners.")  # fmt: skip


def test_no_extended_prompt_is_longer_than_sixty_words_or_states_a_size_in_mm() -> None:
    for site, modality, level in itertools.product(taxonomy.SITES, taxonomy.MODALITIES, taxonomy.LEVELS):
        around = Surroundings(site, "medium-sized", modality, ("dark corners",))
        text = prompt_for(
            "seborrheic_keratosis", "I", level, level, taxonomy.COLORS, bank="extended", surroundings=around
        )
        assert len(text.split()) <= 60 and "_" not in text
        assert unsupported_measurements(text) == []


def test_surroundings_are_those_of_the_corpus_row() -> None:
    row = {"site": "torso", "modality": "clinical", "vignette": 0.0, "black_border": 0.3}
    assert Surroundings.of(row, 0.2) == Surroundings("torso", "small", "clinical", ("dark corners",))
    assert Surroundings.of({}) == Surroundings()
    assert [size_word(share) for share in (0.1, 0.5, 0.9)] == ["small", "medium-sized", "large"]


def test_a_bank_is_known_by_its_file_and_an_unknown_one_is_refused_by_name() -> None:
    assert len({bank(name).digest for name in BANKS}) == 3 and {bank(name).id for name in BANKS} == set(BANKS)
    with pytest.raises(ValueError, match="bank must be one of minimal, standard, extended, got 'short'"):
        bank("short")
    with pytest.raises(ValueError, match="must be a known word"):
        prompt_for("nevus", bank="extended", surroundings=Surroundings(site="head_nekc"))
