"""ISIC 2017 challenge, as published: images, Part 1 masks, Part 3 labels and the age/sex table of each phase.

    ROOT/ISIC-2017_Training_Data/ISIC_0000000.jpg, .../ISIC-2017_Training_Data_metadata.csv
    ROOT/ISIC-2017_Training_Part1_GroundTruth/ISIC_0000000_segmentation.png
    ROOT/ISIC-2017_Training_Part3_GroundTruth.csv     image_id, melanoma, seborrheic_keratosis; neither is a nevus

and the same for Validation and Test_v2, where present. Training images are hinted `train`; validation and test
images are hinted `test`, so nothing is ever fitted on them. The challenge publishes no lesion or patient ids.
Source: Codella et al. 2018, arXiv:1710.05006; licence CC0-1.0.
"""

from __future__ import annotations

import csv
from pathlib import Path

from factory.corpora.base import CONTRADICTORY_LABELS, MISSING_IMAGE, MISSING_LABEL, ORPHAN_MASK, Entry
from factory.recipe import CorpusSection

_HINTS = {"Training": "train", "Validation": "test", "Test_v2": "test"}
_LABELS = ("image_id", "melanoma", "seborrheic_keratosis")
_METADATA = ("image_id", "age_approximate", "sex")
_MASK_ENDING = "_segmentation"


def entries(path: str, section: CorpusSection) -> list[Entry]:
    """Every image, mask or label row of every phase under `path`, sorted by id; nothing is decoded."""
    root = Path(path)
    phases = [phase for phase in _HINTS if _images_dir(root, phase).is_dir()]
    if not phases:
        wanted = " or ".join(_images_dir(root, phase).name for phase in _HINTS)
        raise ValueError(
            f"corpus.sources.isic2017 must be a folder that holds {wanted}, got {path!r}; "
            "unpack the published archives side by side and give the folder they are in."
        )
    found = [entry for phase in phases for entry in _phase(root, phase)]
    return sorted(found, key=lambda entry: entry.source_id)


def _phase(root: Path, phase: str) -> list[Entry]:
    images = {file.stem: file for file in _images_dir(root, phase).glob("ISIC_*.jpg")}
    masks_dir = root / f"ISIC-2017_{phase}_Part1_GroundTruth"
    masks = {file.stem.removesuffix(_MASK_ENDING): file for file in masks_dir.glob(f"ISIC_*{_MASK_ENDING}.png")}
    labels = _table(root / f"ISIC-2017_{phase}_Part3_GroundTruth.csv", _LABELS)
    metadata_file = _images_dir(root, phase) / f"ISIC-2017_{phase}_Data_metadata.csv"
    metadata = _table(metadata_file, _METADATA) if metadata_file.exists() else {}
    return [
        _entry(name, images.get(name), masks.get(name), labels.get(name), metadata.get(name, {}), _HINTS[phase])
        for name in sorted({*images, *masks, *labels})
    ]


def _entry(
    name: str, image: Path | None, mask: Path | None, label: dict[str, str] | None, about: dict[str, str], hint: str
) -> Entry:
    diagnosis, problem = (None, MISSING_LABEL) if label is None else _diagnosis(label)
    if image is None:
        problem = ORPHAN_MASK if label is None else MISSING_IMAGE
    sex = about.get("sex", "unknown")
    return Entry(
        source="isic2017", source_id=name, licence="CC0-1.0", modality="dermoscopic", image=image, mask=mask,
        problem=problem, diagnosis=diagnosis, age=_age(about), sex=None if sex == "unknown" else sex, split_hint=hint,
    )  # fmt: skip


def _diagnosis(label: dict[str, str]) -> tuple[str | None, str | None]:
    """Diagnosis and problem of a Part 3 row."""
    flags = []
    for column in _LABELS[1:]:
        if label[column].strip() not in ("0", "0.0", "1", "1.0"):
            raise ValueError(
                f"{column} of {label['image_id']} must be 0 or 1, got {label[column]!r}; "
                "download the Part 3 table again."
            )
        flags.append(float(label[column]) == 1.0)
    if all(flags):
        return None, CONTRADICTORY_LABELS
    return ("melanoma" if flags[0] else "seborrheic_keratosis" if flags[1] else "nevus"), None


def _age(about: dict[str, str]) -> float | None:
    text = about.get("age_approximate", "unknown").strip()
    return float(text) if text.replace(".", "", 1).isdigit() else None


def _table(file: Path, columns: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Rows of a published CSV by image id."""
    if not file.is_file():
        raise ValueError(
            f"corpus.sources.isic2017 must hold {file.name}, got a folder without it ({file.parent}); "
            "download the table beside the images."
        )
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(
                f"{file.name} must have the columns {', '.join(columns)}, got a table without {', '.join(missing)}; "
                "download it again."
            )
        rows: dict[str, dict[str, str]] = {}
        for row in reader:
            complete = {column: row[column] or "" for column in columns}
            if rows.setdefault(complete["image_id"], complete) != complete:
                raise ValueError(
                    f"{file.name} must describe an image once, got two different rows for {complete['image_id']}; "
                    "remove the wrong one."
                )
    return rows


def _images_dir(root: Path, phase: str) -> Path:
    return root / f"ISIC-2017_{phase}_Data"
