"""Derm7pt (the seven-point checklist set), as published: two images of each case, and one table.

    ROOT/meta/meta.csv        case_num, diagnosis, location, sex, clinic, derm, ...; the last two are paths
    ROOT/meta/train_indexes.csv, valid_indexes.csv, test_indexes.csv      indexes: rows of meta.csv, from 0
    ROOT/images/NEL/Nel026.jpg

1,011 cases with a dermoscopic and a clinical image each; an id is the case number with `derm` or `clinic`, and the case
number is the lesion. There are no patient ids. The layout is unverified: it follows the publishers' own code
(github.com/jeremykawahara/derm7pt). For research only. Source: Kawahara et al. 2019, doi:10.1109/JBHI.2018.2824327.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from factory.corpora import published
from factory.corpora.base import MISSING_IMAGE, Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="Derm7pt",
    layout="meta/meta.csv, meta/train_indexes.csv, meta/valid_indexes.csv, meta/test_indexes.csv and images/",
    licence="LicenseRef-Derm7pt-research-use",
)
COLUMNS = ("case_num", "diagnosis", "location", "sex", "clinic", "derm")
SITES = {
    "abdomen": "anterior_torso", "chest": "anterior_torso", "back": "posterior_torso", "buttocks": "posterior_torso",
    "upper limbs": "upper_extremity", "lower limbs": "lower_extremity", "head neck": "head_neck",
    "acral": "palms_soles", "genital areas": "oral_genital",
}  # fmt: skip
_MODALITIES = {"clinic": "clinical", "derm": "dermoscopic"}
_SPLITS = {"train": "train", "valid": "val", "test": "test"}


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Both images of every case, by case number; nothing is decoded."""
    root = published.folder(path, "derm7pt", "meta")
    file = root / "meta" / "meta.csv"
    table = published.table(file, COLUMNS)
    splits = {table[row]["case_num"]: split for row, split in _indexes(root / "meta", len(table))}
    rows = published.by_key(table, "case_num", file)
    published.image_files(section, "derm7pt", root / "images", deep=True)
    for case, row in sorted(rows.items(), key=lambda item: item[0].zfill(4)):
        for column, modality in _MODALITIES.items():
            image = root / "images" / row[column]
            there = bool(row[column]) and image.is_file()
            yield Entry(
                source="derm7pt", source_id=f"{case.zfill(4)}-{column}", licence=ABOUT.licence, modality=modality,
                image=image if there else None, label=row["diagnosis"], problem=None if there else MISSING_IMAGE,
                site=published.translated(row["location"], SITES, "location", file), sex=published.known(row["sex"]),
                lesion_id=case, split_hint=splits.get(case),
            )  # fmt: skip


def _indexes(folder: Path, count: int) -> Iterator[tuple[int, str]]:
    """(row of meta.csv, split) for each published split."""
    for name, split in _SPLITS.items():
        file = folder / f"{name}_indexes.csv"
        for row in published.table(file, ("indexes",)) if file.exists() else []:
            if not row["indexes"].isdecimal() or int(row["indexes"]) >= count:
                raise ValueError(
                    f"indexes in {file.name} must be rows of meta.csv from 0 to {count - 1}, got {row['indexes']!r}; "
                    "download both again."
                )
            yield int(row["indexes"]), split
