"""The published layout of ISIC 2017, in miniature and in full."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from factory import corpora
from factory.corpora.base import Entry
from factory.images import ImageProblem, decode_mask, decode_rgb
from factory.recipe import CorpusSection

LABELS = "image_id,melanoma,seborrheic_keratosis\n"


def layout(root: Path, labels: str, images: str, masks: str, phase: str = "Training", metadata: str = "") -> Path:
    data, truth = root / f"ISIC-2017_{phase}_Data", root / f"ISIC-2017_{phase}_Part1_GroundTruth"
    for folder in (data, truth):
        folder.mkdir(parents=True)
    for number in images:
        (data / f"ISIC_{number}.jpg").write_bytes(b"x")
        (data / f"ISIC_{number}_superpixels.png").write_bytes(b"x")
    for number in masks:
        (truth / f"ISIC_{number}_segmentation.png").write_bytes(b"x")
    (root / f"ISIC-2017_{phase}_Part3_GroundTruth.csv").write_text(LABELS + labels)
    if metadata:
        (data / f"ISIC-2017_{phase}_Data_metadata.csv").write_text("image_id,age_approximate,sex\n" + metadata)
    return root


def read(root: Path) -> dict[str, Entry]:
    section = CorpusSection(sources={"isic2017": str(root)})
    return {entry.source_id[5:]: entry for entry in corpora.list_entries(section)}


def test_labels_masks_age_and_sex_find_their_image(tmp_path: Path) -> None:
    rows = "ISIC_1,1.0,0.0\nISIC_2,0.0,1.0\nISIC_3,0.0,0.0\n"
    found = read(layout(tmp_path, rows, "123", "12", metadata="ISIC_1,55,female\nISIC_2,unknown,unknown\n"))
    assert [e.diagnosis for e in found.values()] == ["melanoma", "seborrheic_keratosis", "nevus"]
    assert [(e.age, e.sex) for e in found.values()] == [(55.0, "female"), (None, None), (None, None)]
    assert [e.mask is None for e in found.values()] == [False, False, True]
    assert {e.problem for e in found.values()} == {None}
    assert {(e.licence, e.modality, e.split_hint) for e in found.values()} == {("CC0-1.0", "dermoscopic", "train")}


def test_what_has_no_partner_is_a_named_row(tmp_path: Path) -> None:
    found = read(layout(tmp_path, "ISIC_1,0,0\nISIC_2,1,1\n", "24", "13"))
    assert {number: e.problem for number, e in found.items()} == {
        "1": "missing_image", "2": "contradictory_labels", "3": "mask_without_image", "4": "missing_label",
    }  # fmt: skip
    for entry in found.values():
        with pytest.raises(ImageProblem, match=entry.source_id) as caught:
            corpora.load(entry)
        assert caught.value.reason == entry.problem


def test_validation_and_test_images_are_held_out(tmp_path: Path) -> None:
    for phase, number in (("Training", "1"), ("Validation", "2"), ("Test_v2", "3")):
        layout(tmp_path, f"ISIC_{number},0,0\n", number, number, phase)
    assert [e.split_hint for e in read(tmp_path).values()] == ["train", "test", "test"]


def test_another_layout_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds ISIC-2017_Training_Data or"):
            read(path)


def test_a_layout_without_its_label_table_is_refused(tmp_path: Path) -> None:
    layout(tmp_path, "", "1", "1")
    (tmp_path / "ISIC-2017_Training_Part3_GroundTruth.csv").unlink()
    with pytest.raises(ValueError, match=r"ISIC-2017_Training_Part3_GroundTruth.csv must be readable"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("ISIC_1,yes,0\n", "melanoma of ISIC_1 in ISIC-2017_Training_Part3_GroundTruth.csv must be 0 or 1, got 'yes'"),
        ("ISIC_1,0,0\nISIC_1,1,0\n", "two different rows for ISIC_1"),
        ("ISIC_1,1\n", "seborrheic_keratosis of ISIC_1 in .* must be 0 or 1, got ''"),
    ],
)
def test_a_label_table_that_cannot_be_trusted_is_refused(tmp_path: Path, labels: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(layout(tmp_path, labels, "1", "1"))


def test_a_label_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    layout(tmp_path, "", "1", "1")
    (tmp_path / "ISIC-2017_Training_Part3_GroundTruth.csv").write_text("image,mel\n")
    with pytest.raises(ValueError, match="without image_id, melanoma, seborrheic_keratosis"):
        read(tmp_path)


def test_the_published_set_is_read_whole(isic2017: Path) -> None:
    found = list(read(isic2017).values())
    assert Counter(e.split_hint for e in found) == {"train": 2000, "test": 150}
    assert Counter(e.diagnosis for e in found) == {"nevus": 1450, "melanoma": 404, "seborrheic_keratosis": 296}
    assert sum(e.mask is not None for e in found) == 2150 and not any(e.problem for e in found)
    loaded = corpora.load(found[0])
    assert isinstance(loaded.image, bytes) and isinstance(loaded.mask, bytes)
    assert decode_rgb(loaded.image, "i").shape[:2] == decode_mask(loaded.mask, "m").shape
