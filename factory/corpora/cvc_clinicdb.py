"""CVC-ClinicDB, as published: frames of colonoscopy videos with polyp masks of the same name.

    ROOT/Original/1.tif, ROOT/Ground Truth/1.tif, or PNG/Original/1.png with PNG/Ground Truth/1.png (also TIF/...)
    ROOT/metadata.csv      frame_id, sequence_id, ..., where the copy has it

612 frames, each with a polyp, from 29 sequences of 23 patients. Frames of one sequence are near copies: `sequence_id`
becomes the lesion id, and without metadata.csv there is none. The layout is unverified: it follows the publisher's
description and public code that reads it. For research only. Source: Bernal et al. 2015,
doi:10.1016/j.compmedimag.2015.02.007.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from factory.corpora import published
from factory.corpora.base import Entry
from factory.recipe import CorpusSection

ABOUT = published.About(
    title="CVC-ClinicDB",
    layout="Original/ and 'Ground Truth/', by themselves or in PNG/ or TIF/",
    licence="LicenseRef-CVC-ClinicDB-research-use",
    domain="colonoscopy",
)
_PLACES = (".", "PNG", "TIF", "CVC-ClinicDB")


def entries(path: str, section: CorpusSection) -> Iterator[Entry]:
    """Every frame or mask, by name; nothing is decoded."""
    root = published.folder(path, "cvc-clinicdb", *(f"{place}/Original" for place in _PLACES))
    originals = published.first(root, *(f"{place}/Original" for place in _PLACES))
    images = published.images_in(section, "cvc-clinicdb", originals)
    masks = published.masks_in(originals.parent / "Ground Truth")
    sequences = _sequences(root / "metadata.csv")
    for name, image, mask, _, problem in published.paired(images, masks, {name: {} for name in images}):
        yield Entry(
            source="cvc-clinicdb", source_id=name, licence=ABOUT.licence, modality="colonoscopy", image=image,
            mask=mask, label="polyp", problem=problem, lesion_id=sequences.get(name),
        )  # fmt: skip


def _sequences(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    rows = published.table(file, ("frame_id", "sequence_id"), optional=())
    return {name: row["sequence_id"] for name, row in published.by_key(rows, "frame_id", file).items()}
