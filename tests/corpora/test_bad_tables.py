"""Tables that are not quite as published: what is harmless is read, the rest is refused in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from miniatures import LAYOUTS, lay, listed

from factory.corpora.base import Entry


@dataclass(frozen=True)
class Table:
    """A reader's table: its file, its key, and a cell with a label that no policy knows."""

    file: str
    key: str
    label: tuple[str, str]


TABLES: dict[str, Table] = {
    "hiba": Table(
        "hiba_metadata_2024-01-01.csv", "isic_id", ("Squamous cell carcinoma in situ", "Basal cell carcinom")
    ),
    "derm12345": Table("derm12345_metadata_test.csv", "image_id", ("srjd", "srj")),
    "isic2020": Table("ISIC_2020_Training_GroundTruth_v2.csv", "image_name", ("melanoma", "melanomas")),
    "isic2024": Table("train-metadata.csv", "isic_id", ("Melanoma, NOS", "Melanoma, NO")),
    "milk10k": Table("MILK10k_Training_Supplement.csv", "isic_id", ("Bowens disease", "Bowen disease")),
    "pad-ufes-20": Table("metadata.csv", "img_id", ("SCC", "SCCX")),
    "ddi": Table("ddi_metadata.csv", "DDI_file", ("mycosis-fungoides", "mycosis-fungoide")),
    "ham10000": Table("HAM10000_metadata.csv", "image_id", (",akiec,consensus", ",akie,consensus")),
    "derm7pt": Table("meta/meta.csv", "case_num", ("clark nevus", "clarke nevus")),
    "fitzpatrick17k": Table("fitzpatrick17k.csv", "md5hash", (",benign,1 Diagnostic", ",benin,1 Diagnostic")),
}
ONE_HOT: dict[str, Table] = {
    "isic2017": Table("ISIC-2017_Training_Part3_GroundTruth.csv", "image_id", ("ISIC_1,1.0", "ISIC_1,1.0")),
    "isic2018": Table("ISIC2018_Task3_Validation_GroundTruth.csv", "image", ("ISIC_4,0", "ISIC_4,1")),
    "isic2019": Table("ISIC_2019_Training_GroundTruth.csv", "image", ("ISIC_3,0", "ISIC_3,1")),
    "milk10k": Table("MILK10k_Training_GroundTruth.csv", "lesion_id", ("IL_1,1,0", "IL_1,1,1")),
}
KEYED = [(name, table) for tables in (TABLES, ONE_HOT) for name, table in tables.items()]
keyed = pytest.mark.parametrize(("name", "table"), KEYED, ids=lambda value: value if isinstance(value, str) else "")


def read(root: Path, name: str, table: Table, content: str | bytes) -> dict[str, Entry]:
    """A reader's miniature with another content of one table."""
    lay(root, LAYOUTS[name].files)
    (root / table.file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return listed(name, root)


def content_of(name: str, table: Table) -> str:
    return LAYOUTS[name].files[table.file]


@keyed
def test_a_byte_order_mark_spaces_and_windows_line_ends_change_nothing(tmp_path: Path, name: str, table: Table) -> None:
    plain = read(tmp_path, name, table, content_of(name, table))
    header, _, rows = content_of(name, table).partition("\n")
    windows = "\ufeff" + header.replace(",", " ,") + "\r\n" + rows.replace("\n", "\r\n")
    assert read(tmp_path, name, table, windows) == plain


@keyed
def test_a_row_that_is_there_twice_counts_once(tmp_path: Path, name: str, table: Table) -> None:
    plain = read(tmp_path, name, table, content_of(name, table))
    twice = content_of(name, table) + content_of(name, table).splitlines()[-1] + "\n"
    assert read(tmp_path, name, table, twice) == plain


@keyed
def test_two_different_rows_of_one_id_are_refused(tmp_path: Path, name: str, table: Table) -> None:
    header, *_, last = content_of(name, table).splitlines()
    cells = last.split(",")
    cells[-2 if name == "fitzpatrick17k" else -1] = "9"  # its last column is the address, which is not read
    key = cells[header.split(",").index(table.key)]
    with pytest.raises(ValueError, match=f"describe {table.key} once, got two different rows for {key}; remove"):
        read(tmp_path, name, table, content_of(name, table) + ",".join(cells) + "\n")


@keyed
def test_a_missing_column_is_named(tmp_path: Path, name: str, table: Table) -> None:
    content = content_of(name, table).replace(table.key, "id", 1)
    file = Path(table.file).name
    with pytest.raises(
        ValueError, match=f"{file} must have the columns .*{table.key}.*, got a table without {table.key}"
    ):
        read(tmp_path, name, table, content)


@pytest.mark.parametrize(("name", "table"), TABLES.items(), ids=TABLES)
def test_a_label_that_the_policy_does_not_know_stops_the_listing_and_is_named(
    tmp_path: Path, name: str, table: Table
) -> None:
    right, wrong = table.label
    assert right in content_of(name, table)
    said = wrong.strip(",").split(",")[0] if wrong.startswith(",") else wrong
    with pytest.raises(ValueError, match=f"the label '.*{said}.*' of {name} must be in the label policy.*near"):
        read(tmp_path, name, table, content_of(name, table).replace(right, wrong))


def test_a_row_with_two_ones_contradicts_itself(tmp_path: Path) -> None:
    for name, table in ONE_HOT.items():
        right, wrong = table.label
        content = content_of(name, table).replace(right, wrong)
        if name == "isic2017":
            content = content.replace("1.0,0.0", "1.0,1.0")
        found = read(tmp_path / name, name, table, content)
        (doubtful,) = (e for e in found.values() if e.problem == "contradictory_labels" and e.source_id != "ISIC_2")
        assert (doubtful.label, doubtful.diagnosis) == (None, None)


@pytest.mark.parametrize("cell", ["2", "yes", "", "nan"])
def test_a_row_with_something_else_than_ones_and_zeros_is_refused(tmp_path: Path, cell: str) -> None:
    table = ONE_HOT["isic2018"]
    content = content_of("isic2018", table).replace("ISIC_4,0,1", f"ISIC_4,0,{cell}")
    with pytest.raises(ValueError, match=f"NV of ISIC_4 in ISIC2018_.* must be 0 or 1, got '{cell}'; download"):
        read(tmp_path, "isic2018", table, content)


def test_a_row_without_a_one_has_no_label(tmp_path: Path) -> None:
    table = ONE_HOT["isic2019"]
    content = content_of("isic2019", table).replace("0,0,1\n", "0,0,0\n")
    entry = read(tmp_path, "isic2019", table, content)["ISIC_3"]
    assert (entry.label, entry.problem) == (None, "missing_label")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image,\xff\xfe\n", "must be UTF-8 text, got other bytes"),
        (b"image," + b"x" * 200_000 + b"\n", "must be a CSV table, got something else"),
        (b"", "must have the columns image, MEL"),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    table = ONE_HOT["isic2019"]
    with pytest.raises(ValueError, match=f"{table.file} {message}"):
        read(tmp_path, "isic2019", table, content)


@pytest.mark.parametrize("name", ["isic2017", "isic2019", "milk10k", "derm7pt"])
def test_images_without_their_table_are_refused(tmp_path: Path, name: str) -> None:
    table = ONE_HOT.get(name) or TABLES[name]
    lay(tmp_path, LAYOUTS[name].files)
    (tmp_path / table.file).unlink()
    with pytest.raises(ValueError, match=f"{Path(table.file).name} must be readable, got .*; download it beside"):
        listed(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "right", "wrong", "message"),
    [
        ("ham10000", "HAM10000_metadata.csv", "scalp", "knee", "localization in HAM10000_metadata.csv must be one of"),
        ("pad-ufes-20", "metadata.csv", "3.0", "7.0", "fitspatrick in metadata.csv must be one of 1.0, 2.0"),
        ("derm12345", "derm12345_metadata_test.csv", "CC-BY", "MIT", "the licence in .* must be one of cc-by"),
        ("ddi", "ddi_metadata.csv", "56", "57", "skin_type of ddi/000001 must be a known word, got '57'"),
        ("hiba", "hiba_metadata_2024-01-01.csv", ",II,", ",VII,", "skin_type of hiba/ISIC_1 must be a known word"),
    ],
)
def test_a_word_of_another_release_is_refused_with_the_words_that_are_known(
    tmp_path: Path, name: str, file: str, right: str, wrong: str, message: str
) -> None:
    files = LAYOUTS[name].files
    assert right in files[file]
    with pytest.raises(ValueError, match=message):
        listed(name, lay(tmp_path, files | {file: files[file].replace(right, wrong)}))


def test_a_label_is_mapped_or_excluded_by_a_recipes_own_file(tmp_path: Path) -> None:
    policy = tmp_path / "labels.yaml"
    policy.write_text("datasets:\n  ham10000:\n    akiec: {excluded: mixed}\n    bkl: other_benign\n")
    found = listed("ham10000", lay(tmp_path, LAYOUTS["ham10000"].files), labels=str(policy))
    assert {(e.diagnosis, e.excluded) for e in found.values()} == {(None, "mixed")}


def test_an_id_that_two_phases_have_is_refused(tmp_path: Path) -> None:
    files = LAYOUTS["isic2019"].files | {"ISIC_2019_Test_Input/ISIC_1.jpg": "jpg"}
    with pytest.raises(ValueError, match="must name each image once, got 'ISIC_1' again"):
        listed("isic2019", lay(tmp_path, files))
