"""HIBA skin lesions (Hospital Italiano de Buenos Aires), as the ISIC archive exports its collection 251.

    ROOT/metadata.csv, or any one ROOT/*metadata*.csv      isic_id, patient_id, lesion_id, age_approx, sex, ...
    ROOT/ISIC_0123456.jpg, at any depth

1,616 dermoscopic and clinical images of 1,270 lesions of 623 patients, with Fitzpatrick's skin type. The archive has
changed how it writes a diagnosis: older exports have `diagnosis` and `benign_malignant`, newer ones `diagnosis_1` to
`diagnosis_5`, from the general to the particular. The label is `diagnosis`, else the most particular of the first
three, else `benign_malignant`. The licence is stated row by row (CC BY). The layout is unverified: it follows the
archive's schema. Source: Ricci Lara et al. 2023, doi:10.1038/s41597-023-02630-0.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from factory.corpora import isic_archive, published
from factory.corpora.base import MISSING_LABEL, Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="HIBA skin lesions",
    layout="metadata.csv as the ISIC archive exports it, and the images at any depth",
    licence="CC-BY-4.0",
)
_LABELS = ("diagnosis", "diagnosis_3", "diagnosis_2", "diagnosis_1", "benign_malignant")


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image or metadata row, by id; nothing is decoded."""
    file = _table(path)
    rows = published.by_key(published.table(file, ("isic_id",)), "isic_id", file)
    images = published.images_in(section, "hiba", file.parent, deep=True)
    for name, image, _, row, problem in published.paired(images, {}, rows):
        known = row or {}
        label = isic_archive.deepest(known, _LABELS)
        skin_type = published.known(known.get("fitzpatrick_skin_type"))
        yield Entry(
            source="hiba", source_id=name, image=image, label=label,
            problem=problem or (MISSING_LABEL if label is None else None),
            licence=isic_archive.licence(known.get("copyright_license"), ABOUT.licence, file),
            modality=published.translated(known.get("image_type"), isic_archive.MODALITIES, "image_type", file),
            stated_malignant=published.stated_malignant(known.get("benign_malignant") or known.get("diagnosis_1")),
            confirmation=published.translated(
                known.get("diagnosis_confirm_type"), isic_archive.CONFIRMATIONS, "diagnosis_confirm_type", file
            ),
            skin_type=skin_type, skin_type_scale=skin_type and "fst", skin_type_source=skin_type and "expert",
            site=published.translated(
                known.get("anatom_site_general"), isic_archive.SITES, "anatom_site_general", file
            ),
            age=published.number(known.get("age_approx")), sex=published.known(known.get("sex")),
            diameter_mm=published.number(known.get("clin_size_long_diam_mm")),
            patient_id=published.known(known.get("patient_id")), lesion_id=published.known(known.get("lesion_id")),
        )  # fmt: skip


def _table(path: str) -> Path:
    """The one table of the export, which is named after the collection and the day of the export."""
    found = sorted(Path(path).glob("*metadata*.csv"))
    if len(found) > 1:
        raise ValueError(
            f"corpus.sources.hiba must hold one metadata table, got {' and '.join(f.name for f in found)}; "
            "keep the one that belongs to the images."
        )
    name = found[0].name if found else "metadata.csv"
    return published.folder(path, "hiba", name) / name
