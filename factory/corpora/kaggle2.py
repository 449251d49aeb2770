"""Kaggle 2 of DermaFlux (bhaveshmittal/melanoma-cancer-dataset), as published: folders.

    ROOT/train/Benign/1.jpg, ROOT/train/Malignant/..., ROOT/test/Benign/..., ROOT/test/Malignant/...

About 11,880 training and 2,000 test images, 224 px wide. There is no table: nothing is said but benign or malignant,
and there are no ids of patients or lesions. Its pictures seem to come from the ISIC archive, so copies of other sources
are to be expected. The layout is unverified: it follows public code that reads it. The licence is not stated. Source:
kaggle.com/datasets/bhaveshmittal/melanoma-cancer-dataset.
"""

from __future__ import annotations

from collections.abc import Iterator

from factory.corpora import published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="Kaggle 2: Melanoma Cancer Image Dataset",
    layout="train/ and test/, each with Benign/ and Malignant/",
    licence="LicenseRef-unstated",
)


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image, by folder and name; nothing is decoded."""
    root = published.folder(path, "kaggle2", "train", "test")
    yield from published.benign_malignant(section, "kaggle2", root, ABOUT)
