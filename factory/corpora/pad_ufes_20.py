"""PAD-UFES-20, as published: smartphone photographs and one table.

    ROOT/metadata.csv        patient_id, lesion_id, fitspatrick (as spelt), region, diameter_1, ..., img_id, biopsed
    ROOT/images/imgs_part_1/PAT_1516_1765_530.png, imgs_part_2, imgs_part_3, at any depth

2,298 images of 1,641 lesions of 1,373 patients. The clinical columns are empty where the lesion was not biopsied. Its
publishers count Bowen's disease among the squamous cell carcinomas and do not say which it is. Licence CC BY 4.0.
Source: Pacheco et al. 2020, doi:10.1016/j.dib.2020.106221.
"""

from __future__ import annotations

from collections.abc import Iterator

from factory import taxonomy
from factory.corpora import published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="PAD-UFES-20",
    layout="metadata.csv, and the images in images/imgs_part_1/ to imgs_part_3/, at any depth",
    licence="CC-BY-4.0",
    verified=True,
)
COLUMNS = (
    "patient_id", "lesion_id", "age", "gender", "fitspatrick", "region", "diameter_1", "diameter_2", "diagnostic",
    "img_id", "biopsed",
)  # fmt: skip
SITES = {
    "arm": "upper_extremity", "forearm": "upper_extremity", "hand": "hand", "thigh": "lower_extremity", "foot": "foot",
    "face": "head_neck", "nose": "head_neck", "ear": "head_neck", "lip": "head_neck", "scalp": "head_neck",
    "neck": "head_neck", "chest": "anterior_torso", "abdomen": "anterior_torso", "back": "posterior_torso",
}  # fmt: skip
_SKIN_TYPES = {f"{number}.0": word for number, word in enumerate(taxonomy.SKIN_TYPES, start=1)}
_CONFIRMATIONS = {"true": "histology", "false": "clinical"}


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image or label row, by id; nothing is decoded."""
    file = published.folder(path, "pad-ufes-20", "metadata.csv") / "metadata.csv"
    table = published.by_key(published.table(file, COLUMNS, optional=()), "img_id", file)
    rows = {name.removesuffix(".png"): row for name, row in table.items()}
    images = published.images_in(section, "pad-ufes-20", file.parent, deep=True)
    for name, image, _, row, problem in published.paired(images, {}, rows):
        known = row or {}
        skin_type = published.translated(known.get("fitspatrick"), _SKIN_TYPES, "fitspatrick", file)
        yield Entry(
            source="pad-ufes-20", source_id=name, licence=ABOUT.licence, modality="clinical", image=image,
            label=known.get("diagnostic"), problem=problem,
            confirmation=published.translated(known.get("biopsed"), _CONFIRMATIONS, "biopsed", file),
            skin_type=skin_type, skin_type_scale=skin_type and "fst", skin_type_source=skin_type and "expert",
            site=published.translated(known.get("region"), SITES, "region", file),
            age=published.number(known.get("age")), sex=(known.get("gender") or "").lower() or None,
            diameter_mm=_diameter(known), patient_id=published.known(known.get("patient_id")),
            lesion_id=published.known(known.get("lesion_id")),
        )  # fmt: skip


def _diameter(row: published.Row) -> float | None:
    """The larger of the two; a published 0 is a measurement that was not made."""
    return max(published.number(row.get(name)) or 0.0 for name in ("diameter_1", "diameter_2")) or None
