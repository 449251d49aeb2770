"""A plain labelled folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from factory import corpora
from factory.corpora.base import Entry
from factory.images import ImageProblem
from factory.recipe import CorpusSection


def listed(root: Path) -> list[Entry]:
    return list(corpora.list_entries(CorpusSection(sources={"folder": str(root)})))


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def test_images_masks_and_orphans_are_listed_in_order_and_notes_are_not(tmp_path: Path) -> None:
    touch(
        tmp_path, "nevus/b.jpg", "nevus/b_mask.png", "melanoma/a.png", "melanoma/a_segmentation.png",
        "melanoma/lone_mask.png", "melanoma/more/c.webp", "melanoma/notes.txt", "melanoma/.hidden.jpg", "nevus/odd.xyz",
    )  # fmt: skip
    found = listed(tmp_path)
    assert [entry.source_id for entry in found] == [
        "melanoma/a.png", "melanoma/lone_mask.png", "melanoma/more/c.webp", "nevus/b.jpg", "nevus/odd.xyz",
    ]  # fmt: skip
    by_id = {entry.source_id: entry for entry in found}
    assert by_id["nevus/b.jpg"].mask == tmp_path / "nevus/b_mask.png"
    assert by_id["melanoma/a.png"].mask == tmp_path / "melanoma/a_segmentation.png"
    assert (by_id["melanoma/more/c.webp"].mask, by_id["melanoma/more/c.webp"].diagnosis) == (None, "melanoma")
    with pytest.raises(ImageProblem, match="no image") as caught:
        corpora.load(by_id["melanoma/lone_mask.png"])
    assert caught.value.reason == "mask_without_image"


def test_a_missing_or_empty_root_is_refused_with_what_it_should_look_like(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="folder of folders named after diagnoses"):
            listed(path)


def test_a_folder_that_is_no_diagnosis_is_refused_with_the_nearest(tmp_path: Path) -> None:
    touch(tmp_path, "melanom/a.png")
    with pytest.raises(ValueError, match="the label 'melanom' of folder must be in the label policy.*near 'melanoma'"):
        listed(tmp_path)


def test_an_unknown_reader_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'isic2017'"):
        corpora.reader("isic-2017")


def test_a_file_that_vanished_is_a_problem_of_its_own(tmp_path: Path) -> None:
    touch(tmp_path, "nevus/b.jpg")
    (entry,) = listed(tmp_path)
    (tmp_path / "nevus/b.jpg").unlink()
    with pytest.raises(ImageProblem, match="b.jpg must be there, but is gone") as caught:
        corpora.load(entry)
    assert caught.value.reason == "missing_image"


def test_a_file_that_may_not_be_read_is_a_problem_of_its_own(tmp_path: Path) -> None:
    touch(tmp_path, "nevus/b.jpg")
    (entry,) = listed(tmp_path)
    (tmp_path / "nevus/b.jpg").unlink()
    (tmp_path / "nevus/b.jpg").mkdir()
    with pytest.raises(ImageProblem, match="b.jpg must be readable, but Is a directory") as caught:
        corpora.load(entry)
    assert caught.value.reason == "unreadable_file"


def test_a_name_that_is_not_utf_8_gets_an_id_that_is(tmp_path: Path) -> None:
    (tmp_path / "nevus").mkdir()
    (tmp_path / os.fsdecode(b"nevus/\xff.jpg")).write_bytes(b"x")
    assert [entry.source_id for entry in listed(tmp_path)] == ["nevus/\ufffd.jpg"]
