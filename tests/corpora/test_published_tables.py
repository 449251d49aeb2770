"""Published tables read whole, against the counts that their publishers state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from factory import corpora
from factory.corpora import isic2024
from factory.corpora.base import Entry
from factory.images import decode_rgb
from factory.recipe import CorpusSection

Folder = Callable[[str], Path]


def listed(name: str, folder: Path) -> list[Entry]:
    return list(corpora.list_entries(CorpusSection(sources={name: str(folder)}, allow_missing_images=True)))


# The labels as published, and how many rows are malignant by our policy.
COUNTS: dict[str, tuple[dict[str, int], int]] = {
    "isic2019": (
        {"MEL": 4522, "NV": 12875, "BCC": 3323, "AK": 867, "BKL": 2624, "DF": 239, "VASC": 253, "SCC": 628},
        4522 + 3323 + 628,
    ),
    "isic2020": (
        {
            "unknown": 27124, "nevus": 5193, "melanoma": 584, "seborrheic keratosis": 135, "lentigo NOS": 44,
            "lichenoid keratosis": 37, "solar lentigo": 7, "cafe-au-lait macule": 1,
            "atypical melanocytic proliferation": 1,
        },
        584,
    ),
    "ham10000": (
        {"nv": 6705, "mel": 1113, "bkl": 1099, "bcc": 514, "akiec": 327, "vasc": 142, "df": 115},
        1113 + 514 + 327,
    ),
    "pad-ufes-20": ({"BCC": 845, "ACK": 730, "NEV": 244, "SEK": 235, "SCC": 192, "MEL": 52}, 845 + 192 + 52),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_every_row_is_read_with_its_published_label(published_table: Folder, name: str) -> None:
    labels, malignant = COUNTS[name]
    found = listed(name, published_table(name))
    assert Counter(e.label for e in found) == labels
    assert sum(e.malignant is True for e in found) == malignant
    assert {e.problem for e in found} == {"missing_image"}


def test_milk10k_tells_bowens_disease_from_actinic_keratosis_by_its_supplement(published_table: Folder) -> None:
    found = listed("milk10k", published_table("milk10k"))
    assert len(found) == 10_480 and len({e.lesion_id for e in found}) == 5_240
    assert Counter(e.diagnosis for e in found) == {
        "basal_cell_carcinoma": 5044, "nevus": 1492, "squamous_cell_carcinoma": 324 + 622, "melanoma": 900,
        "seborrheic_keratosis": 680, "benign_keratosis": 400, "bowen_disease": 360, "actinic_keratosis": 246,
        "other_benign": 178, "dermatofibroma": 104, "vascular": 98, "unspecified_malignant": 18,
        "unspecified_benign": 14,
    }  # fmt: skip
    assert Counter(e.modality for e in found) == {"clinical": 5240, "dermoscopic": 5240}
    assert Counter(e.confirmation for e in found) == {"histology": 10_032, "clinical": 448}
    assert Counter(e.skin_type for e in found) == {"0": 12, "1": 210, "2": 1012, "3": 6348, "4": 2132, "5": 766}


def test_our_policy_and_ddis_own_column_agree_on_every_row(published_table: Folder) -> None:
    found = listed("ddi", published_table("ddi"))
    assert len(found) == 653
    assert all(e.malignant is e.stated_malignant for e in found)
    assert Counter(e.stated_malignant for e in found) == {False: 483, True: 170}
    assert Counter(e.skin_type for e in found) == {"12": 208, "34": 241, "56": 204}
    assert Counter(e.diagnosis for e in found)["bowen_disease"] == 28


def test_isic_2020_names_its_patients_and_its_copies(published_table: Folder) -> None:
    found = {e.source_id: e for e in listed("isic2020", published_table("isic2020"))}
    assert len({e.patient_id for e in found.values()}) == 2_056
    copies = [e for e in found.values() if e.same_as]
    assert len(copies) == 425
    assert all(str(e.same_as) < e.source_id and found[str(e.same_as)].same_as is None for e in copies)


def test_isic_2019_divides_ham10000s_mixed_class_and_agrees_on_the_rest(published_table: Folder) -> None:
    labels = {e.source_id: e.label for e in listed("isic2019", published_table("isic2019"))}
    ham = listed("ham10000", published_table("ham10000"))
    pairs = Counter((e.label, labels[e.source_id]) for e in ham)
    assert pairs == {
        ("nv", "NV"): 6705, ("mel", "MEL"): 1113, ("bkl", "BKL"): 1099, ("bcc", "BCC"): 514, ("vasc", "VASC"): 142,
        ("df", "DF"): 115, ("akiec", "SCC"): 197, ("akiec", "AK"): 130,
    }  # fmt: skip


def test_the_tiles_of_slice_3d_come_out_of_their_hdf5_file(published_table: Folder) -> None:
    pytest.importorskip("h5py")
    found = listed("isic2024", published_table("isic2024"))
    assert [(e.source_id, e.problem, e.diameter_mm) for e in found] == [
        ("ISIC_0015657", "missing_label", 2.7), ("ISIC_0015729", "missing_label", 2.52),
        ("ISIC_0015740", "missing_label", 3.16),
    ]  # fmt: skip
    assert {(e.modality, e.licence, e.split_hint) for e in found} == {("tbp_tile", "CC-BY-4.0", "test")}
    for entry in found:
        loaded = isic2024.load(replace(entry, problem=None))
        assert isinstance(loaded.image, bytes)
        height, width, _ = decode_rgb(loaded.image, entry.source_id).shape
        assert 40 < min(height, width) <= max(height, width) < 260


def test_the_published_header_of_derm12345_is_the_one_that_is_read(published_table: Folder, tmp_path: Path) -> None:
    excerpt = published_table("derm12345_excerpt") / "metadata_test.excerpt.csv"
    (tmp_path / "metadata_test.csv").write_bytes(excerpt.read_bytes())
    found = listed("derm12345", tmp_path)
    assert Counter(e.label for e in found) == {"acb": 3, "acd": 2, "ajb": 3}
    assert {(e.diagnosis, e.stated_malignant, e.split_hint) for e in found} == {("nevus", False, "test")}
    assert len({e.patient_id for e in found}) == 7
