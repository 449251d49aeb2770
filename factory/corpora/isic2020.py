"""ISIC 2020 challenge (SIIM-ISIC), as published: the training images, their labels and the known duplicates.

    ROOT/ISIC_2020_Training_GroundTruth_v2.csv or ISIC_2020_Training_GroundTruth.csv
        image_name, patient_id, sex, age_approx, anatom_site_general_challenge, diagnosis, benign_malignant, target;
        v2 adds lesion_id
    ROOT/ISIC_2020_Training_Duplicates.csv      image_name_1, image_name_2, where it was downloaded
    ROOT/train/ISIC_0015719.jpg, or ISIC_2020_Training_JPEG/train/...

33,126 dermoscopic images of 2,056 patients; 425 are copies of another, and name it in `same_as`. Only melanomas are
known to be confirmed by histology. `unknown` is benign, and no more is said. The test images have no published labels
and are left out, so there is no split hint. Licence CC BY-NC 4.0. Source: Rotemberg et al. 2021,
doi:10.1038/s41597-021-00815-z.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from factory.corpora import isic_archive, published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="ISIC 2020",
    layout="ISIC_2020_Training_GroundTruth_v2.csv or ISIC_2020_Training_GroundTruth.csv, "
    "ISIC_2020_Training_Duplicates.csv, and the images in train/ or ISIC_2020_Training_JPEG/train/",
    licence="CC-BY-NC-4.0",
    verified=True,
)
COLUMNS = (
    "image_name", "patient_id", "sex", "age_approx", "anatom_site_general_challenge", "diagnosis", "benign_malignant",
)  # fmt: skip
_TABLES = ("ISIC_2020_Training_GroundTruth_v2.csv", "ISIC_2020_Training_GroundTruth.csv")


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every training image or label row, by id; nothing is decoded."""
    root = published.folder(path, "isic2020", *_TABLES)
    file = published.first(root, *_TABLES)
    rows = published.by_key(published.table(file, COLUMNS), "image_name", file)
    images = published.images_in(section, "isic2020", root / "train", root / "ISIC_2020_Training_JPEG" / "train")
    same_as = _copies(root / "ISIC_2020_Training_Duplicates.csv")
    for name, image, _, row, problem in published.paired(images, {}, rows):
        known = row or {}
        label = known.get("diagnosis")
        yield Entry(
            source="isic2020", source_id=name, licence=ABOUT.licence, modality="dermoscopic", image=image, label=label,
            problem=problem, stated_malignant=published.stated_malignant(known.get("benign_malignant")),
            confirmation="histology" if label == "melanoma" else None,
            site=published.translated(
                known.get("anatom_site_general_challenge"), isic_archive.SITES, "anatom_site_general_challenge", file
            ),
            age=published.number(known.get("age_approx")), sex=published.known(known.get("sex")),
            patient_id=published.known(known.get("patient_id")), lesion_id=published.known(known.get("lesion_id")),
            same_as=same_as.get(name),
        )  # fmt: skip


def _copies(file: Path) -> dict[str, str]:
    """For the later id of each published pair the earlier one."""
    if not file.exists():
        return {}
    columns = ("image_name_1", "image_name_2")
    pairs = [tuple(row[column] for column in columns) for row in published.table(file, columns)]
    return {max(pair): min(pair) for pair in pairs}
