"""What a reader says about one source image before anything is decoded.

Entry(source="isic2017", source_id="ISIC_0000000", image=Path(".../ISIC_0000000.jpg"), diagnosis="nevus", ...)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from factory import taxonomy
from factory.images import ImageProblem

# Defects that a listing can see without opening an image; each is a failed row with this reason.
MISSING_IMAGE, ORPHAN_MASK = "missing_image", "mask_without_image"
MISSING_LABEL, CONTRADICTORY_LABELS = "missing_label", "contradictory_labels"

_SENTENCES = {
    MISSING_IMAGE: "{name} is labelled but has no image; download it again or drop its label row.",
    ORPHAN_MASK: "{name} has a mask but no image; download the image or remove the mask.",
    MISSING_LABEL: "{name} has an image but no label row; add the row or remove the image.",
    CONTRADICTORY_LABELS: "{name} has more than one diagnosis; correct its label row.",
}


class Loaded(NamedTuple):
    """What an entry gives when it is read: encoded bytes, or pixels where it is drawn rather than stored.

    `image` is bytes or (H, W, 3) uint8, `mask` is bytes, (H, W) bool or None, `labels` are corpus columns that are
    known only now.
    """

    image: bytes | NDArray[np.uint8]
    mask: bytes | NDArray[np.bool_] | None
    labels: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Entry:
    """One source image, its mask and its labels, by reference. Picklable; the words are checked against the taxonomy.

    `split_hint` is the published split; `problem` is one of the defects above, or None.
    """

    source: str
    source_id: str
    licence: str
    modality: str | None
    image: Path | None = None
    mask: Path | None = None
    problem: str | None = None
    diagnosis: str | None = None
    confirmation: str | None = None
    skin_type: str | None = None
    skin_type_scale: str | None = None
    skin_type_source: str | None = None
    site: str | None = None
    age: float | None = None
    sex: str | None = None
    diameter_mm: float | None = None
    patient_id: str | None = None
    lesion_id: str | None = None
    split_hint: str | None = None

    def __post_init__(self) -> None:
        for name, vocabulary in (
            ("modality", taxonomy.MODALITIES),
            ("diagnosis", taxonomy.DIAGNOSES),
            ("skin_type_scale", taxonomy.SKIN_TYPE_SCALES),
            ("site", taxonomy.SITES),
            ("split_hint", taxonomy.SPLITS),
        ):
            value = getattr(self, name)
            if value is not None:
                taxonomy.check(value, vocabulary, name)

    def load(self) -> Loaded:
        """The encoded image and mask. Raises ImageProblem for a listed defect, or a file that cannot be read."""
        if self.problem is not None or self.image is None:
            reason = self.problem or MISSING_IMAGE
            raise ImageProblem(reason, _SENTENCES[reason].format(name=f"{self.source}/{self.source_id}"))
        return Loaded(_bytes(self.image), None if self.mask is None else _bytes(self.mask))

    def labels(self) -> dict[str, Any]:
        """The corpus columns that the listing knows."""
        return {
            name: getattr(self, name)
            for name in (
                "source", "source_id", "licence", "modality", "diagnosis", "confirmation", "skin_type",
                "skin_type_scale", "skin_type_source", "site", "age", "sex", "diameter_mm", "patient_id", "lesion_id",
            )
        }  # fmt: skip


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageProblem(
            "unreadable_file",
            f"{path.name} must be readable, but {error.strerror}; check its permissions.",
        ) from error
