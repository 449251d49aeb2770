"""Phantoms as a corpus, and the listing of a recipe."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from factory import corpora, phantom
from factory.corpora.base import Entry
from factory.recipe import CorpusSection, PhantomSection

SECTION = CorpusSection(phantoms=PhantomSection(count=12, size=64, seed=3))


def test_a_recipe_without_sources_lists_its_phantoms_in_order() -> None:
    found = corpora.list_entries(SECTION)
    assert [e.source_id for e in found] == [f"phantom-3-{i:06d}" for i in range(12)]
    assert len({e.lesion_id for e in found}) == 12


def test_an_entry_loads_the_phantom_it_names_with_its_truth_in_any_process() -> None:
    entry = pickle.loads(pickle.dumps(corpora.list_entries(SECTION)[5]))
    loaded, drawn = entry.load(), phantom.draw(3, 5, 64)
    assert np.array_equal(loaded.image, drawn.image) and np.array_equal(loaded.mask, drawn.mask)
    assert loaded.labels["true_asymmetry"] == drawn.asymmetry
    assert loaded.labels["diagnosis"] == drawn.diagnosis
    assert sorted(loaded.labels["true_colors"]) == sorted(drawn.colors)


def test_phantoms_have_no_path() -> None:
    with pytest.raises(ValueError, match="phantoms are set under"):
        corpora.reader("phantoms")("somewhere", SECTION)


def test_sources_are_listed_together(tmp_path: Path) -> None:
    (tmp_path / "nevus").mkdir()
    (tmp_path / "nevus/a.png").write_bytes(b"x")
    section = SECTION.model_copy(update={"sources": {"phantoms": "", "folder": str(tmp_path)}})
    assert [e.source for e in corpora.list_entries(section)] == ["folder"] + ["phantoms"] * 12


def test_an_entry_with_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'nevus'"):
        Entry("s", "1", "CC0-1.0", "dermoscopic", diagnosis="nevis")
