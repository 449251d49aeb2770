"""HAM10000, as published: two folders of images, one table, and the lesion masks that were added in 2020.

    ROOT/HAM10000_metadata.csv                   lesion_id, image_id, dx, dx_type, age, sex, localization
    ROOT/HAM10000_images_part_1/ISIC_0027419.jpg, ROOT/HAM10000_images_part_2/..., or ROOT/images/...
    ROOT/HAM10000_segmentations_lesion_tschandl/ISIC_0027419_segmentation.png, where it was downloaded

`akiec` holds actinic keratoses and intraepithelial carcinoma and does not say which. Several images show one lesion;
there are no patient ids, and no published split. Source: Tschandl et al. 2018, doi:10.1038/sdata.2018.161.
"""

from __future__ import annotations

from collections.abc import Iterator

from factory.corpora import published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="HAM10000",
    layout="HAM10000_metadata.csv, HAM10000_images_part_1/, HAM10000_images_part_2/ or images/, and the masks in "
    "HAM10000_segmentations_lesion_tschandl/",
    licence="CC-BY-NC-4.0",
    verified=True,
)
COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
CONFIRMATIONS = {"histo": "histology", "follow_up": "follow_up", "consensus": "consensus", "confocal": "confocal"}
SITES = {
    "back": "posterior_torso", "lower extremity": "lower_extremity", "trunk": "torso",
    "upper extremity": "upper_extremity", "abdomen": "anterior_torso", "face": "head_neck", "chest": "anterior_torso",
    "foot": "foot", "neck": "head_neck", "scalp": "head_neck", "hand": "hand", "ear": "head_neck",
    "genital": "oral_genital", "acral": "palms_soles",
}  # fmt: skip


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image, mask or label row, by id; nothing is decoded."""
    file = published.folder(path, "ham10000", "HAM10000_metadata.csv") / "HAM10000_metadata.csv"
    rows = published.by_key(published.table(file, COLUMNS), "image_id", file)
    images = published.images_in(
        section, "ham10000", *(file.parent / d for d in ("HAM10000_images_part_1", "HAM10000_images_part_2", "images"))
    )
    masks = published.masks_in(file.parent / "HAM10000_segmentations_lesion_tschandl", ending="_segmentation")
    for name, image, mask, row, problem in published.paired(images, masks, rows):
        known = row or {}
        yield Entry(
            source="ham10000", source_id=name, licence=ABOUT.licence, modality="dermoscopic", image=image, mask=mask,
            problem=problem, label=known.get("dx"),
            confirmation=published.translated(known.get("dx_type"), CONFIRMATIONS, "dx_type", file),
            age=published.number(known.get("age")), sex=published.known(known.get("sex")),
            site=published.translated(known.get("localization"), SITES, "localization", file),
            lesion_id=known.get("lesion_id"),
        )  # fmt: skip
