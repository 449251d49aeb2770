"""MED-NODE, as published: clinical photographs in two folders named after the diagnosis.

    ROOT/complete_mednode_dataset/melanoma/1056583.jpg      70 melanomas
    ROOT/complete_mednode_dataset/naevus/1012432.jpg        100 naevi

or ROOT/melanoma and ROOT/naevus. There is no table, no split, and no id of a patient or a lesion. The layout is
unverified: it follows the publisher's archive as others read it. The publisher states no licence. Source: Giotis et al.
2015, doi:10.1016/j.eswa.2015.04.034.
"""

from __future__ import annotations

from collections.abc import Iterator

from factory.corpora import published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="MED-NODE",
    layout="complete_mednode_dataset/melanoma/ and complete_mednode_dataset/naevus/, or the two folders themselves",
    licence="LicenseRef-unstated",
)
_LABELS = ("melanoma", "naevus")


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image, by folder and name; nothing is decoded."""
    root = published.folder(path, "mednode", "complete_mednode_dataset", *_LABELS)
    root = published.first(root, "complete_mednode_dataset", ".")
    for name, file in published.by_folder(section, "mednode", root, *(root / label for label in _LABELS)):
        yield Entry(
            source="mednode", source_id=name, licence=ABOUT.licence, modality="clinical", image=file,
            label=file.parent.name,
        )  # fmt: skip
