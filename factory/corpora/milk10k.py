"""MILK10k, as published in the ISIC archive: a clinical close-up and a dermoscopic image of each lesion.

    ROOT/MILK10k_Training_Metadata.csv       a row per image: lesion_id, image_type, isic_id, age_approx, sex, ...
    ROOT/MILK10k_Training_GroundTruth.csv    a row per lesion: lesion_id, AKIEC, BCC, BEN_OTH, ..., VASC
    ROOT/MILK10k_Training_Supplement.csv     a row per image: diagnosis_full, diagnosis_confirm_type, where downloaded
    ROOT/MILK10k_Training_Input/IL_0000652/ISIC_4671410.jpg

10,480 images of 5,240 lesions. The label is the supplement's full diagnosis, else the one-hot class, whose AKIEC does
not tell actinic keratosis from Bowen's disease. Skin tone is the publishers' own scale from 0 (dark) to 5 (light). The
test set (MILK10k_Test_Input, MILK10k_Test_Metadata.csv) has no labels and is hinted `test`; as its labels are not
published, the training images have no hint. There are no patient ids. The licence is stated row by row (CC BY-NC).
Source: MILK study team 2025, doi:10.34970/648456.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path

from factory.corpora import isic_archive, published
from factory.corpora.base import MISSING_LABEL, Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="MILK10k",
    layout="MILK10k_Training_Input/, MILK10k_Training_Metadata.csv, MILK10k_Training_GroundTruth.csv, "
    "MILK10k_Training_Supplement.csv, and the same for Test without labels",
    licence="CC-BY-NC-4.0",
    verified=True,
)
COLUMNS = ("lesion_id", "image_type", "isic_id", "copyright_license", "age_approx", "sex", "skin_tone_class", "site")
CLASSES = ("AKIEC", "BCC", "BEN_OTH", "BKL", "DF", "INF", "MAL_OTH", "MEL", "NV", "SCCKA", "VASC")
SITES = {
    "trunk": "torso", "head_neck_face": "head_neck", "upper_extremity": "upper_extremity",
    "lower_extremity": "lower_extremity", "hand": "hand", "foot": "foot", "genital": "oral_genital",
}  # fmt: skip
_TRAINING = "MILK10k_Training_Metadata.csv"


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image or metadata row, by id; nothing is decoded."""
    root = published.folder(path, "milk10k", _TRAINING, "MILK10k_Test_Input")
    there = [
        phase for phase, sign in (("Training", _TRAINING), ("Test", "MILK10k_Test_Input")) if (root / sign).exists()
    ]
    yield from heapq.merge(*(_phase(root, phase, section) for phase in there), key=lambda entry: entry.source_id)


def _phase(root: Path, phase: str, section: CorpusSection) -> Iterator[Entry]:
    file = root / f"MILK10k_{phase}_Metadata.csv"
    rows = published.by_key(published.table(file, COLUMNS, optional=()), "isic_id", file)
    labels = {} if phase == "Test" else _labels(root, rows)
    confirmations = _supplement(root, phase)
    images = published.images_in(section, "milk10k", root / f"MILK10k_{phase}_Input", deep=True)
    for name, image, _, row, problem in published.paired(images, {}, rows):
        known = row or {}
        label, doubt = labels.get(name, (None, MISSING_LABEL))
        tone = published.known(known.get("skin_tone_class"))
        yield Entry(
            source="milk10k", source_id=name, image=image, label=label, problem=problem or doubt,
            licence=isic_archive.licence(known.get("copyright_license"), ABOUT.licence, file),
            modality=published.translated(known.get("image_type"), isic_archive.MODALITIES, "image_type", file),
            confirmation=published.translated(
                confirmations.get(name, {}).get("diagnosis_confirm_type"), isic_archive.CONFIRMATIONS,
                "diagnosis_confirm_type", file,
            ),
            skin_type=tone, skin_type_scale=tone and "milk10k", skin_type_source=tone and "expert",
            site=published.translated(known.get("site"), SITES, "site", file),
            age=published.number(known.get("age_approx")), sex=published.known(known.get("sex")),
            lesion_id=published.known(known.get("lesion_id")), split_hint="test" if phase == "Test" else None,
        )  # fmt: skip


def _labels(root: Path, rows: dict[str, published.Row]) -> dict[str, tuple[str | None, str | None]]:
    """The label of each image, or its problem."""
    file = root / "MILK10k_Training_GroundTruth.csv"
    truth = published.by_key(published.table(file, ("lesion_id", *CLASSES)), "lesion_id", file)
    classes = {name: published.one_hot(row, CLASSES, file, "lesion_id") for name, row in truth.items()}
    full = {name: published.known(row["diagnosis_full"]) for name, row in _supplement(root, "Training").items()}
    labels = {}
    for name, row in rows.items():
        label, problem = classes.get(row["lesion_id"], (None, MISSING_LABEL))
        labels[name] = (label and (full.get(name) or label), problem)
    return labels


def _supplement(root: Path, phase: str) -> dict[str, published.Row]:
    file = root / f"MILK10k_{phase}_Supplement.csv"
    columns = ("isic_id", "diagnosis_full", "diagnosis_confirm_type")
    return published.by_key(published.table(file, columns), "isic_id", file) if file.exists() else {}
