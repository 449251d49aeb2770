"""ISIC 2017 challenge, as published: images, Part 1 masks, Part 3 labels and the age/sex table of each phase.

    ROOT/ISIC-2017_Training_Data/ISIC_0000000.jpg, .../ISIC-2017_Training_Data_metadata.csv
    ROOT/ISIC-2017_Training_Part1_GroundTruth/ISIC_0000000_segmentation.png
    ROOT/ISIC-2017_Training_Part3_GroundTruth.csv     image_id, melanoma, seborrheic_keratosis; neither is a nevus

and the same for Validation and Test_v2, where present. Training images are hinted `train`; validation and test
images are hinted `test`, so nothing is ever fitted on them. The challenge publishes no lesion or patient ids.
Source: Codella et al. 2018, arXiv:1710.05006; licence CC0-1.0.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path

from factory.corpora import published
from factory.corpora.base import MISSING_LABEL, Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="ISIC 2017",
    layout="ISIC-2017_Training_Data/, ISIC-2017_Training_Part1_GroundTruth/, ISIC-2017_Training_Part3_GroundTruth.csv, "
    "and the same for Validation and Test_v2",
    licence="CC0-1.0",
    verified=True,
)
_HINTS = {"Training": "train", "Validation": "test", "Test_v2": "test"}
_FLAGS = ("melanoma", "seborrheic_keratosis")
_METADATA = ("image_id", "age_approximate", "sex")


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image, mask or label row of every phase, by id; nothing is decoded."""
    root = published.folder(path, "isic2017", *(f"ISIC-2017_{phase}_Data" for phase in _HINTS))
    there = [phase for phase in _HINTS if (root / f"ISIC-2017_{phase}_Data").is_dir()]
    yield from heapq.merge(*(_phase(root, phase, section) for phase in there), key=lambda entry: entry.source_id)


def _phase(root: Path, phase: str, section: CorpusSection) -> Iterator[Entry]:
    directory, file = root / f"ISIC-2017_{phase}_Data", root / f"ISIC-2017_{phase}_Part3_GroundTruth.csv"
    rows = published.by_key(published.table(file, ("image_id", *_FLAGS)), "image_id", file)
    metadata = _metadata(directory / f"{directory.name}_metadata.csv")
    images = published.images_in(section, "isic2017", directory, endings=(".jpg",))
    masks = published.masks_in(root / f"ISIC-2017_{phase}_Part1_GroundTruth", ending="_segmentation")
    for name, image, mask, row, problem in published.paired(images, masks, rows):
        label, doubt = (None, None) if row is None else _label(row, file)
        known = metadata.get(name, {})
        yield Entry(
            source="isic2017", source_id=name, licence=ABOUT.licence, modality="dermoscopic", image=image, mask=mask,
            label=label, problem=problem or doubt, age=published.number(known.get("age_approximate")),
            sex=published.known(known.get("sex")), split_hint=_HINTS[phase],
        )  # fmt: skip


def _label(row: published.Row, file: Path) -> tuple[str | None, str | None]:
    """The label and the problem of a Part 3 row, where neither flag means a nevus."""
    label, problem = published.one_hot(row, _FLAGS, file, "image_id")
    return ("nevus", None) if problem == MISSING_LABEL else (label, problem)


def _metadata(file: Path) -> dict[str, published.Row]:
    return published.by_key(published.table(file, _METADATA), "image_id", file) if file.exists() else {}
