"""DERM12345, as published on Harvard Dataverse: a table for each split, and images by part and label.

    ROOT/derm12345_metadata_train.csv, ROOT/derm12345_metadata_test.csv, or metadata_train.csv and metadata_test.csv
        image_id, patient_id, image_type, copyright-license, split, super_class, malignancy, ..., label
    ROOT/derm12345_train_part_1/acb/DERM_125494.jpg, at any depth

12,345 dermoscopic images of 1,627 patients in 40 subclasses; `label` is the subclass's code. `malignancy` is benign,
malignant or, for actinic keratosis, indeterminate. Licence CC BY 4.0. Source: Yilmaz et al. 2024,
doi:10.1038/s41597-024-04104-3; the codes' meanings are in the publishers' github.com/abdurrahimyilmaz/derm12345.
"""

from __future__ import annotations

from collections.abc import Iterator

from factory.corpora import isic_archive, published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="DERM12345",
    layout="derm12345_metadata_train.csv and derm12345_metadata_test.csv, and the images at any depth",
    licence="CC-BY-4.0",
    verified=True,
)
COLUMNS = ("image_id", "patient_id", "image_type", "copyright-license", "split", "malignancy", "label")
_TABLES = tuple(f"{prefix}metadata_{split}.csv" for split in ("train", "test") for prefix in ("derm12345_", ""))
_SPLITS = {"train": "train", "test": "test"}


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image or label row of both splits, by id; nothing is decoded."""
    root = published.folder(path, "derm12345", *_TABLES)
    files = [root / name for name in _TABLES if (root / name).exists()]
    rows = published.by_key((row for f in files for row in published.table(f, COLUMNS)), "image_id", files[0])
    images = published.images_in(section, "derm12345", root, deep=True)
    for name, image, _, row, problem in published.paired(images, {}, rows):
        known = row or {}
        yield Entry(
            source="derm12345", source_id=name, image=image, label=known.get("label"), problem=problem,
            licence=isic_archive.licence(known.get("copyright-license"), ABOUT.licence, files[0]),
            modality=published.translated(known.get("image_type"), isic_archive.MODALITIES, "image_type", files[0]),
            stated_malignant=published.stated_malignant(known.get("malignancy")),
            patient_id=published.known(known.get("patient_id")),
            split_hint=published.translated(known.get("split"), _SPLITS, "split", files[0]),
        )  # fmt: skip
