"""Kaggle 1 of DermaFlux (hasnainjaved/melanoma-skin-cancer-dataset-of-10000-images), as published: folders.

    ROOT/melanoma_cancer_dataset/train/benign/melanoma_0.jpg, .../train/malignant/..., .../test/benign/..., or the same
    without the outer folder

9,605 training and 1,000 test images, 300 px wide. There is no table: nothing is said but benign or malignant, and there
are no ids of patients or lesions. Its pictures come from the ISIC archive, so copies of other sources are to be
expected. The layout is unverified: it follows public code that reads it. The licence of the pictures is not stated.
Source: kaggle.com/datasets/hasnainjaved/melanoma-skin-cancer-dataset-of-10000-images.
"""

from __future__ import annotations

from collections.abc import Iterator

from factory.corpora import published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="Kaggle 1: Melanoma Skin Cancer Dataset of 10000 Images",
    layout="melanoma_cancer_dataset/train/ and melanoma_cancer_dataset/test/, each with benign/ and malignant/",
    licence="LicenseRef-unstated",
)


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image, by folder and name; nothing is decoded."""
    root = published.folder(path, "kaggle1", "melanoma_cancer_dataset", "train", "test")
    root = published.first(root, "melanoma_cancer_dataset", ".")
    yield from published.benign_malignant(section, "kaggle1", root, ABOUT)
