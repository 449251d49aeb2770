"""Kvasir-SEG, as published: colonoscopy images with polyp masks of the same name.

    ROOT/images/cju0qkwl35piu0993l0dewei2.jpg, ROOT/masks/cju0qkwl35piu0993l0dewei2.jpg, or both in ROOT/Kvasir-SEG/

1,000 images, each with at least one polyp. Masks are JPEG too, so they are cut at half of their brightness. There are
no ids of patients or lesions, and no split. The layout is unverified: it follows the publisher's description. For
research and education only. Source: Jha et al. 2020, doi:10.1007/978-3-030-37734-2_37.
"""

from __future__ import annotations

from collections.abc import Iterator

from factory.corpora import published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="Kvasir-SEG",
    layout="images/ and masks/, by themselves or in Kvasir-SEG/",
    licence="LicenseRef-Kvasir-SEG-research-use",
    domain="colonoscopy",
)


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every image or mask, by name; nothing is decoded."""
    root = published.folder(path, "kvasir-seg", "images", "Kvasir-SEG")
    folder = published.first(root, "images", "Kvasir-SEG/images")
    images, masks = published.images_in(section, "kvasir-seg", folder), published.masks_in(folder.parent / "masks")
    for name, image, mask, _, problem in published.paired(images, masks, {name: {} for name in images}):
        yield Entry(
            source="kvasir-seg", source_id=name, licence=ABOUT.licence, modality="colonoscopy", image=image, mask=mask,
            label="polyp", problem=problem,
        )  # fmt: skip
