"""What readers of published layouts share: the folder, its tables, and its images by name.

A reader decodes nothing and trusts nothing: a table that is not as published is refused with one sentence, and an
image or a mask without its partner becomes a row with a reason.
"""

from __future__ import annotations

import csv
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from factory.corpora.base import CONTRADICTORY_LABELS, MISSING_IMAGE, MISSING_LABEL, ORPHAN_MASK, Entry
from factory.recipe import CorpusSection

Row = dict[str, str]

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")
# What files say for "not known".
UNKNOWN = frozenset({"", "unknown", "nan", "na", "n/a", "none", "null"})


@dataclass(frozen=True)
class About:
    """What `factory ingest --list` says of a reader. `verified`: the layout was read from published files, in whole
    or in part, not only from their description."""

    title: str
    layout: str
    licence: str
    domain: str = "dermatology"
    verified: bool = False


def folder(path: str, name: str, *wanted: str) -> Path:
    """The root of a dataset, holding at least one of the `wanted` names. Raises ValueError otherwise."""
    root = Path(path)
    if root.is_file() and root.suffix.lower() in _ARCHIVES:
        raise ValueError(
            f"corpus.sources.{name} must be a folder, got the archive {root.name}; "
            f"unpack it and give the folder it was unpacked to."
        )
    if not root.is_dir() or not any((root / w).exists() for w in wanted):
        packed = sorted(f.name for f in root.iterdir() if f.suffix.lower() in _ARCHIVES) if root.is_dir() else []
        remedy = (
            f"unpack {packed[0]} there." if packed else "give the folder that the published files were unpacked to."
        )
        raise ValueError(
            f"corpus.sources.{name} must be a folder that holds {' or '.join(wanted)}, got {path!r}; {remedy}"
        )
    return root


def first(root: Path, *names: str) -> Path:
    """The first of some names that is there, or the first name: publishers rename their folders between releases."""
    return next((root / name for name in names if (root / name).exists()), root / names[0])


def table(file: Path, columns: Sequence[str], *, optional: Sequence[str] | None = None) -> list[Row]:
    """The rows of a published CSV, stripped, with at least these columns; BOM and CRLF are read as published.

    With `optional`, nothing but `columns` and those is kept: a long table of many columns fits in memory then. Raises
    ValueError naming the file where it is not there, is not UTF-8, is no CSV or lacks a column.
    """
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            return _rows(csv.DictReader(lines), file, columns, optional)
    except OSError as error:
        raise ValueError(
            f"{file.name} must be readable, got {file} ({error.strerror}); download it beside the images."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name} must be UTF-8 text, got other bytes ({error}); download it again.") from error
    except csv.Error as error:
        raise ValueError(
            f"{file.name} must be a CSV table, got something else ({error}); download it again."
        ) from error


def _rows(reader: csv.DictReader[str], file: Path, columns: Sequence[str], optional: Sequence[str] | None) -> list[Row]:
    names = [name.strip() for name in reader.fieldnames or []]
    missing = [column for column in columns if column not in names]
    if missing:
        raise ValueError(
            f"{file.name} must have the columns {', '.join(columns)}, got a table without {', '.join(missing)}; "
            "download it again."
        )
    kept = [name for name in names if optional is None or name in columns or name in optional]
    reader.fieldnames = names
    # Most values come again and again: one string for all of them.
    return [{name: sys.intern((row.get(name) or "").strip()) for name in kept} for row in reader]


def by_key(rows: Iterable[Row], key: str, file: Path) -> dict[str, Row]:
    """Rows by one column. A row that is there twice counts once; two different rows of one key are refused."""
    found: dict[str, Row] = {}
    for row in rows:
        if found.setdefault(row[key], row) != row:
            raise ValueError(
                f"{file.name} must describe {key} once, got two different rows for {row[key]}; remove the wrong one."
            )
    return found


def one_hot(row: Row, columns: Sequence[str], file: Path, key: str) -> tuple[str | None, str | None]:
    """The label and the problem of a one-hot row: the column that holds the 1, or a problem where none or several do.
    Raises ValueError for other values."""
    chosen = []
    for column in columns:
        value = number(row[column])
        if value not in (0.0, 1.0):
            raise ValueError(
                f"{column} of {row[key]} in {file.name} must be 0 or 1, got {row[column]!r}; download the table again."
            )
        chosen += [column] if value else []
    if len(chosen) == 1:
        return chosen[0], None
    return None, CONTRADICTORY_LABELS if chosen else MISSING_LABEL


def image_files(
    section: CorpusSection, name: str, *directories: Path, endings: Sequence[str] = IMAGE_ENDINGS, deep: bool = False
) -> list[Path]:
    """Image files of some folders, hidden ones left out. No image at all is refused, unless the recipe allows a table
    without them."""
    found = [
        file
        for directory in directories
        for file in sorted(directory.rglob("*") if deep else directory.glob("*"))
        if file.suffix.lower() in endings and not file.name.startswith(".")
    ]
    if not found and not section.allow_missing_images:
        raise ValueError(
            f"corpus.sources.{name} must hold images under {' or '.join(d.name for d in directories)}, got none; "
            "download them, or read the table alone with --allow-missing-images."
        )
    return found


def images_in(
    section: CorpusSection, name: str, *directories: Path, endings: Sequence[str] = IMAGE_ENDINGS, deep: bool = False
) -> dict[str, Path]:
    """`image_files` by stem; the first of several of one stem counts."""
    found: dict[str, Path] = {}
    for file in image_files(section, name, *directories, endings=endings, deep=deep):
        found.setdefault(file.stem, file)
    return found


def by_folder(section: CorpusSection, name: str, root: Path, *directories: Path) -> list[tuple[str, Path]]:
    """Image files of some folders under `root`, for sets whose labels are the names of folders: (id, file) in order."""
    return sorted((relative_name(file, root), file) for file in image_files(section, name, *directories))


def benign_malignant(section: CorpusSection, name: str, root: Path, about: About) -> Iterator[Entry]:
    """The entries of a set that is no more than `train` and `test`, each with `benign` and `malignant`."""
    directories = [d for split in ("train", "test") for d in sorted((root / split).glob("*")) if d.is_dir()]
    for source_id, file in by_folder(section, name, root, *directories):
        label = file.parent.name.lower()
        yield Entry(
            source=name, source_id=source_id, licence=about.licence, image=file, label=label,
            stated_malignant=stated_malignant(label), split_hint=file.parent.parent.name,
        )  # fmt: skip


def relative_name(file: Path, root: Path) -> str:
    """A file's path below `root`, as an id; a name that is not UTF-8 could not be written to a table."""
    return os.fsencode(file.relative_to(root).as_posix()).decode("utf-8", "replace")


def masks_in(directory: Path, ending: str = "", endings: Sequence[str] = IMAGE_ENDINGS) -> dict[str, Path]:
    """Mask files of a folder by their image's stem: `a_segmentation.png` with `_segmentation` is a's. An absent folder
    has none."""
    files = [f for f in sorted(directory.glob("*")) if f.suffix.lower() in endings and f.stem.endswith(ending)]
    return {f.stem.removesuffix(ending): f for f in files if not f.name.startswith(".")}


class Pairing(NamedTuple):
    """One id with its image, mask and table row, and the defect where one of them lacks its partner."""

    name: str
    image: Path | None
    mask: Path | None
    row: Row | None
    problem: str | None


def paired(images: Mapping[str, Path], masks: Mapping[str, Path], rows: Mapping[str, Row]) -> Iterator[Pairing]:
    """Every id that has an image, a mask or a row, in order."""
    for name in sorted({*images, *masks, *rows}):
        problem = None if name in rows else MISSING_LABEL
        if name not in images:
            problem = MISSING_IMAGE if name in rows else ORPHAN_MASK
        yield Pairing(name, images.get(name), masks.get(name), rows.get(name), problem)


def number(text: str | None) -> float | None:
    """A published number, or None where it is not known."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def known(text: str | None) -> str | None:
    """A published word, or None for the many ways of saying that it is not known."""
    return None if text is None or text.strip().lower() in UNKNOWN else text.strip()


def stated_malignant(text: str | None) -> bool | None:
    """What a publisher says of malignancy itself, in any of the usual words; None for `indeterminate` and the like."""
    return {"malignant": True, "true": True, "1": True, "benign": False, "false": False, "0": False}.get(
        (text or "").lower()
    )


def translated(text: str | None, words: Mapping[str, str | None], field: str, file: Path) -> str | None:
    """A published word in our vocabulary, by a reader's own table. Raises ValueError for a word it does not have."""
    word = known(text)
    if word is None:
        return None
    if word.lower() not in words:
        raise ValueError(
            f"{field} in {file.name} must be one of {', '.join(words)}, got {word!r}; is this another release of it?"
        )
    return words[word.lower()]
