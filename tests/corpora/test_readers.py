"""Every reader on a miniature of its published layout."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from miniatures import ISIC_ARCHIVE, JPEG, LAYOUTS, ONE_HOT_2019, PH2, lay, listed, picture
from PIL import Image

from factory import corpora, labels
from factory.corpora import published
from factory.images import ImageProblem


def test_every_reader_has_a_miniature_or_is_the_phantoms() -> None:
    assert {*LAYOUTS, "phantom"} == set(corpora.READERS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_miniature_of_the_layout_gives_every_row_its_columns_in_order(tmp_path: Path, name: str) -> None:
    layout = LAYOUTS[name]
    found = listed(name, lay(tmp_path, layout.files))
    assert list(found) == sorted(layout.expected)
    for source_id, wanted in layout.expected.items():
        entry = found[source_id]
        assert {key: getattr(entry, key) for key in wanted} == wanted, source_id
        assert (entry.source, entry.mask) == (name, tmp_path / m if (m := layout.masks.get(source_id)) else None)
        assert "problem" in wanted or entry.problem is None


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_not_wrong_can_be_loaded_and_what_is_says_so(tmp_path: Path, name: str) -> None:
    for entry in listed(name, lay(tmp_path, LAYOUTS[name].files)).values():
        if entry.problem is None:
            assert corpora.load(entry).image == picture()
        else:
            with pytest.raises(ImageProblem, match=entry.source_id) as caught:
                corpora.load(entry)
            assert caught.value.reason == entry.problem


@pytest.mark.parametrize("name", corpora.READERS)
def test_a_reader_says_what_it_reads_and_whether_that_was_seen(name: str) -> None:
    module = corpora.reader(name)
    about, said = module.ABOUT, " ".join(str(module.__doc__).split())
    assert isinstance(about, published.About) and about.title and about.layout
    assert about.domain in (*labels.DOMAINS, "any")
    assert about.licence[:3] in ("CC-", "CC0", "Lic", "Apa")
    assert ("unverified" in said) is not about.verified
    assert name in ("folder", "phantom") or "Source" in said


def test_the_policy_has_every_reader_and_maps_to_its_own_words_or_says_why_not() -> None:
    policy = labels.default()
    words = {word for domain in labels.DOMAINS for word in policy.diagnoses(domain)}
    datasets = policy.content["datasets"]
    assert set(datasets) == set(corpora.READERS)
    for meaning in (meaning for known in datasets.values() for meaning in known.values()):
        assert meaning in words if isinstance(meaning, str) else list(meaning) == ["excluded"] and meaning["excluded"]
    assert {word for word in words if datasets["folder"][word] == word} == words
    assert len(datasets["derm12345"]) == 40


# ------------------------------------------------------------------------------------------- a folder that is not one

UNPACKED = [name for name in LAYOUTS if name != "folder"]


@pytest.mark.parametrize("name", UNPACKED)
def test_an_archive_or_another_folder_is_refused_with_what_is_looked_for(tmp_path: Path, name: str) -> None:
    archive = lay(tmp_path, {"data.zip": "PK"}) / "data.zip"
    for path, remedy in ((archive, "the archive data.zip"), (tmp_path, "unpack data.zip there"), ("no", "unpacked to")):
        with pytest.raises(ValueError, match=rf"corpus.sources.{name} must be a folder.*{remedy}"):
            listed(name, path)


def without_images(name: str) -> dict[str, str]:
    """A layout with its folders, but with a note instead of each image."""
    files = LAYOUTS[name].files
    return {f"{path}.txt" if content == JPEG else path: content for path, content in files.items()}


@pytest.mark.parametrize("name", UNPACKED)
def test_a_set_without_images_is_refused_unless_the_recipe_allows_it(tmp_path: Path, name: str) -> None:
    lay(tmp_path, without_images(name))
    with pytest.raises(ValueError, match=rf"corpus.sources.{name} must hold images under .*, got none; download them"):
        listed(name, tmp_path)
    found = listed(name, tmp_path, allow_missing_images=True)
    assert {e.problem for e in found.values()} <= {"missing_image"}


# ------------------------------------------------------------------------------------------------- particular readers


def test_the_disc_of_refuge2_is_the_mask_with_its_cup(tmp_path: Path) -> None:
    grey = np.full((8, 8), 255, np.uint8)
    grey[2:6, 2:6], grey[3:5, 3:5] = 128, 0
    lay(tmp_path, {"train/images/g1.jpg": JPEG, "train/mask/g1.bmp": ""})
    Image.fromarray(grey).save(tmp_path / "train/mask/g1.bmp")
    (entry,) = listed("refuge2", tmp_path).values()
    loaded = corpora.load(entry)
    assert np.array_equal(loaded.mask, grey < 255) and loaded.mask.sum() == 16
    (tmp_path / "train/mask/g1.bmp").write_bytes(b"")
    with pytest.raises(ImageProblem, match="the mask of train/g1") as caught:
        corpora.load(entry)
    assert caught.value.reason == "mask_empty_file"


@pytest.mark.parametrize("index", ["[]", "{", '{"0": {"ImgName": "g1.jpg", "Label": -1}}', '{"0": {"Label": 1}}'])
def test_an_index_of_refuge2_that_cannot_be_trusted_is_refused(tmp_path: Path, index: str) -> None:
    lay(tmp_path, {"train/images/g1.jpg": JPEG, "train/index.json": index})
    with pytest.raises(ValueError, match="index.json of train must map numbers to images with a Label of 0 or 1"):
        listed("refuge2", tmp_path)


def test_the_text_table_of_ph2_is_asked_for_where_only_the_spreadsheet_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold PH2_dataset.txt, got .*\(the .xlsx is not read\); take the text"):
        listed("ph2", lay(tmp_path, {"PH2_dataset.xlsx": "PK"}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "must hold rows such as"),
        ("|| IMD002 || || 3 || 1 | T || 3 ||\n", "the row of IMD002 in PH2_dataset.txt must be as published"),
        ("|| IMD002 || || 1 || 1 | T || 9 ||\n", "the row of IMD002 in PH2_dataset.txt must be as published"),
        ("|| IMD002 || 1 ||\n", "the row of IMD002 in PH2_dataset.txt must be as published"),
        ("|| IMD002 || || 1 || 1 || 3 ||\n|| IMD002 || || 0 || 1 || 3 ||\n", "two different rows for IMD002"),
    ],
)
def test_a_table_of_ph2_that_cannot_be_trusted_is_refused(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listed("ph2", lay(tmp_path, {"PH2_dataset.txt": PH2 + rows}))


@pytest.mark.parametrize("index", ["2", "-1", "x"])
def test_an_index_of_derm7pt_beyond_its_table_is_refused(tmp_path: Path, index: str) -> None:
    files = LAYOUTS["derm7pt"].files | {"meta/test_indexes.csv": f"indexes\n{index}\n"}
    with pytest.raises(ValueError, match=f"test_indexes.csv must be rows of meta.csv from 0 to 1, got '{index}'"):
        listed("derm7pt", lay(tmp_path, files))


def test_two_tables_of_hiba_are_refused(tmp_path: Path) -> None:
    files = LAYOUTS["hiba"].files | {"metadata.csv": ISIC_ARCHIVE}
    with pytest.raises(ValueError, match="one metadata table, got hiba_metadata_2024-01-01.csv and metadata.csv"):
        listed("hiba", lay(tmp_path, files))


def test_an_older_export_of_hiba_is_read_by_its_own_columns(tmp_path: Path) -> None:
    rows = "ISIC_1,lentigo NOS,benign\nISIC_2,,malignant\n"
    files = {"metadata.csv": "isic_id,diagnosis,benign_malignant\n" + rows, "ISIC_1.jpg": JPEG, "ISIC_2.jpg": JPEG}
    found = listed("hiba", lay(tmp_path, files)).values()
    assert [(e.diagnosis, e.stated_malignant, e.licence) for e in found] == [
        ("benign_keratosis", False, "CC-BY-4.0"), ("unspecified_malignant", True, "CC-BY-4.0"),
    ]  # fmt: skip


def test_labels_of_the_isic_2019_test_set_are_read_where_they_are_there(tmp_path: Path) -> None:
    header = ONE_HOT_2019.replace("\n", ",score_weight,validation_weight\n")
    files = LAYOUTS["isic2019"].files | {
        "ISIC_2019_Test_GroundTruth.csv": header + "ISIC_2,1.0,0,0,0,0,0,0,0,0,1,0\n",
    }
    found = listed("isic2019", lay(tmp_path, files))
    assert (found["ISIC_2"].diagnosis, found["ISIC_2"].problem) == ("melanoma", None)


def test_an_image_of_two_tasks_of_isic_2018_is_one_row_and_is_held_out_if_either_is(tmp_path: Path) -> None:
    files = LAYOUTS["isic2018"].files | {
        "ISIC2018_Task1-2_Training_Input/ISIC_4.jpg": JPEG,
        "ISIC2018_Task1_Training_GroundTruth/ISIC_4_segmentation.png": JPEG,
    }
    entry = listed("isic2018", lay(tmp_path, files))["ISIC_4"]
    assert (entry.diagnosis, entry.split_hint, entry.mask is None) == ("nevus", "test", False)


# -------------------------------------------------------------------------------------------------- ISIC 2024's HDF5


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    h5py = pytest.importorskip("h5py")
    lay(tmp_path, {"train-metadata.csv": LAYOUTS["isic2024"].files["train-metadata.csv"]})
    with h5py.File(tmp_path / "train-image.hdf5", "w") as file:
        file["ISIC_1"] = np.bytes_(picture())
        file["ISIC_2"] = np.void(picture("PNG"))
        file["ISIC_7"] = np.frombuffer(picture(), np.uint8)
    return tmp_path


def test_tiles_are_members_of_their_file(tiles: Path) -> None:
    found = listed("isic2024", tiles)
    assert [(e.source_id, e.member, e.problem) for e in found.values()] == [
        ("ISIC_1", "ISIC_1", None), ("ISIC_2", "ISIC_2", None), ("ISIC_4", None, "missing_image"),
        ("ISIC_7", "ISIC_7", "missing_label"),
    ]  # fmt: skip
    assert corpora.load(found["ISIC_1"]).image == picture()
    assert corpora.load(found["ISIC_2"]).image == picture("PNG")


def test_a_tile_or_a_file_that_has_gone_since_is_a_problem_of_its_own(tiles: Path) -> None:
    h5py = pytest.importorskip("h5py")
    entry = listed("isic2024", tiles)["ISIC_1"]
    with h5py.File(tiles / "train-image.hdf5", "a") as file:
        del file["ISIC_1"]
    for reason, break_it in (("missing_image", lambda: None), ("unreadable_file", lambda: ruin(tiles))):
        break_it()
        with pytest.raises(ImageProblem, match="train-image.hdf5 must") as caught:
            corpora.load(entry)
        assert caught.value.reason == reason


def ruin(tiles: Path) -> None:
    (tiles / "train-image.hdf5").write_bytes(b"x" * 2000)


def test_a_file_of_tiles_that_is_none_is_refused(tiles: Path) -> None:
    ruin(tiles)
    with pytest.raises(ValueError, match="train-image.hdf5 must be an HDF5 file, got something else"):
        listed("isic2024", tiles)


def test_without_h5py_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, {"train-metadata.csv": LAYOUTS["isic2024"].files["train-metadata.csv"], "train-image.hdf5": "x"})
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(
        ValueError, match="must be read with h5py, got an environment without it; run `pip install h5py`"
    ):
        listed("isic2024", tmp_path)
