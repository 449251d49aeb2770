"""Fitzpatrick17k, as published: one table, and the images that it names by their MD5, which each user downloads.

    ROOT/fitzpatrick17k.csv      md5hash, fitzpatrick_scale, fitzpatrick_centaur, label, nine_partition_label,
                                 three_partition_label, qc, url, url_alphanum
    ROOT/images/<md5hash>.jpg, or data/finalfitz17k/<md5hash>.jpg

16,577 clinical images of 114 conditions. The label is the condition where it is one that the label policy knows, else
the three-part one (benign, malignant, non-neoplastic); a row that the publishers' own check found wrong has that
finding for a label. Skin type was judged by annotators; -1 is not known. There are no ids of patients or lesions, and
no split. Licence of the labels CC BY-NC-SA 3.0; the images belong to two online atlases. Source: Groh et al. 2021,
arXiv:2104.09957; the layout is unverified beyond the table's header.
"""

from __future__ import annotations

from collections.abc import Iterator

from factory import taxonomy
from factory.corpora import published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="Fitzpatrick17k",
    layout="fitzpatrick17k.csv, and the images as <md5hash>.jpg in images/ or data/finalfitz17k/",
    licence="CC-BY-NC-SA-3.0",
)
COLUMNS = ("md5hash", "fitzpatrick_scale", "label", "three_partition_label", "qc")
CONDITIONS = frozenset({
    "actinic keratosis", "basal cell carcinoma", "basal cell carcinoma morpheiform", "congenital nevus",
    "dermatofibroma", "granuloma pyogenic", "halo nevus", "kaposi sarcoma", "lentigo maligna", "lymphangioma",
    "malignant melanoma", "melanoma", "mycosis fungoides", "nevocytic nevus", "port wine stain", "pyogenic granuloma",
    "seborrheic keratosis", "solid cystic basal cell carcinoma", "squamous cell carcinoma",
    "superficial spreading melanoma ssm",
})  # fmt: skip
_WRONG = "3 Wrongly labelled"
_SKIN_TYPES = {str(number): word for number, word in enumerate(taxonomy.SKIN_TYPES, start=1)} | {"-1": None}


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image or label row, by id; nothing is decoded."""
    file = published.folder(path, "fitzpatrick17k", "fitzpatrick17k.csv") / "fitzpatrick17k.csv"
    rows = published.by_key(published.table(file, COLUMNS, optional=()), "md5hash", file)
    images = published.images_in(
        section, "fitzpatrick17k", file.parent / "images", file.parent / "data" / "finalfitz17k"
    )
    for name, image, _, row, problem in published.paired(images, {}, rows):
        known = row or {}
        skin_type = published.translated(known.get("fitzpatrick_scale"), _SKIN_TYPES, "fitzpatrick_scale", file)
        yield Entry(
            source="fitzpatrick17k", source_id=name, licence=ABOUT.licence, modality="clinical", image=image,
            label=None if row is None else _label(row), problem=problem,
            stated_malignant=published.stated_malignant(known.get("three_partition_label")),
            skin_type=skin_type, skin_type_scale=skin_type and "fst", skin_type_source=skin_type and "annotators",
        )  # fmt: skip


def _label(row: published.Row) -> str:
    if row["qc"] == _WRONG:
        return _WRONG
    return row["label"] if row["label"] in CONDITIONS else row["three_partition_label"]
