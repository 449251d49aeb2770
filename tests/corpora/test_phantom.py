"""Phantoms as a corpus, and the listing of a recipe."""

from __future__ import annotations

import pickle
import tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from factory import corpora, phantom
from factory.corpora.base import Entry
from factory.recipe import CorpusSection, PhantomSection

SECTION = CorpusSection(phantoms=PhantomSection(count=12, size=64, seed=3))


def test_a_recipe_without_sources_lists_its_phantoms_in_order() -> None:
    found = list(corpora.list_entries(SECTION))
    assert [e.source_id for e in found] == [f"phantom-3-{i:06d}" for i in range(12)]
    assert len({e.lesion_id for e in found}) == 12


def test_an_entry_loads_the_phantom_it_names_with_its_truth_in_any_process() -> None:
    entry = pickle.loads(pickle.dumps(list(corpora.list_entries(SECTION))[5]))
    loaded, drawn = corpora.load(entry), phantom.draw(3, 5, 64)
    assert np.array_equal(loaded.image, drawn.image) and np.array_equal(loaded.mask, drawn.mask)
    assert loaded.labels["true_asymmetry"] == drawn.asymmetry
    assert loaded.labels["diagnosis"] == loaded.labels["label"] == drawn.diagnosis
    assert loaded.labels["malignant"] is (drawn.diagnosis == "melanoma")
    assert loaded.labels["ham7"] == {"nevus": "nv", "melanoma": "mel", "seborrheic_keratosis": "bkl"}[drawn.diagnosis]
    assert loaded.labels["domain"] == "dermatology"
    assert sorted(loaded.labels["true_colors"]) == sorted(drawn.colors)


def test_a_number_for_a_path_is_their_count() -> None:
    found = list(corpora.list_entries(SECTION.model_copy(update={"sources": {"phantom": "3"}})))
    assert [e.source_id for e in found] == ["phantom-3-000000", "phantom-3-000001", "phantom-3-000002"]


@pytest.mark.parametrize("path", ["somewhere", "-1", "1000001"])
def test_any_other_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=f"must be empty or a whole number up to 1000000, got '{path}'; seed and size"):
        list(corpora.list_entries(SECTION.model_copy(update={"sources": {"phantom": path}})))


def test_half_a_million_phantoms_are_listed_one_at_a_time() -> None:
    section = SECTION.model_copy(update={"sources": {"phantom": "500000"}})
    tracemalloc.start()
    last = ""
    for entry in islice(corpora.list_entries(section), 20_000):
        assert entry.source_id > last
        last = entry.source_id
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert last == "phantom-3-019999"
    assert peak < 2_000_000  # bytes; a list of so many entries takes more than ten times that


def test_sources_are_listed_together(tmp_path: Path) -> None:
    (tmp_path / "nevus").mkdir()
    (tmp_path / "nevus/a.png").write_bytes(b"x")
    section = SECTION.model_copy(update={"sources": {"phantom": "", "folder": str(tmp_path)}})
    assert [e.source for e in corpora.list_entries(section)] == ["folder"] + ["phantom"] * 12


@pytest.mark.parametrize(
    ("column", "word", "near"),
    [
        ("modality", "dermoscopy", "dermoscopic"),
        ("site", "head_nek", "head_neck"),
        ("confirmation", "histolog", "histology"),
        ("split_hint", "tran", "train"),
        ("skin_type_scale", "fts", "fst"),
    ],
)
def test_an_entry_with_an_unknown_word_is_refused(column: str, word: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"{column} of s/1 must be a known word, got '{word}'; did you mean '{near}'"):
        Entry("s", "1", "CC0-1.0", **{column: word})
