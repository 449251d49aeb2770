"""DDI (Diverse Dermatology Images, Stanford), as published: clinical photographs and one table.

    ROOT/ddi_metadata.csv      DDI_ID, DDI_file, skin_tone, malignant, disease
    ROOT/000001.png, or ROOT/images/000001.png

656 images, every diagnosis confirmed by biopsy. Skin tone is Fitzpatrick's types in pairs (12, 34, 56), judged by
dermatologists. There are no ids of patients or lesions, and no split. To be used under the research agreement of the
Stanford AIMI center. Source: Daneshjou et al. 2022, doi:10.1126/sciadv.abq6147.
"""

from __future__ import annotations

from collections.abc import Iterator

from factory.corpora import published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="DDI",
    layout="ddi_metadata.csv, and the images beside it or in images/",
    licence="LicenseRef-Stanford-DDI-research-use",
    verified=True,
)
COLUMNS = ("DDI_ID", "DDI_file", "skin_tone", "malignant", "disease")


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image or label row, by id; nothing is decoded."""
    file = published.folder(path, "ddi", "ddi_metadata.csv") / "ddi_metadata.csv"
    table = published.by_key(published.table(file, COLUMNS, optional=()), "DDI_file", file)
    rows = {name.removesuffix(".png"): row for name, row in table.items()}
    images = published.images_in(section, "ddi", file.parent, file.parent / "images")
    for name, image, _, row, problem in published.paired(images, {}, rows):
        known = row or {}
        tone = published.known(known.get("skin_tone"))
        yield Entry(
            source="ddi", source_id=name, licence=ABOUT.licence, modality="clinical", image=image,
            label=known.get("disease"), problem=problem, confirmation="histology",
            stated_malignant=published.stated_malignant(known.get("malignant")),
            skin_type=tone, skin_type_scale=tone and "ddi", skin_type_source=tone and "expert",
        )  # fmt: skip
