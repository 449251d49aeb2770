"""What a reader says about one source image before anything is decoded.

Entry(source="ham10000", source_id="ISIC_0027419", image=Path(".../ISIC_0027419.jpg"), label="bkl", ...)

A reader states the publisher's own label; what it means is judged afterwards, by the label policy, in one place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from factory import taxonomy
from factory.images import ImageProblem
from factory.labels import Policy

# Defects that a listing can see without opening an image; each is a failed row with this reason.
MISSING_IMAGE, ORPHAN_MASK = "missing_image", "mask_without_image"
MISSING_LABEL, CONTRADICTORY_LABELS = "missing_label", "contradictory_labels"
# Not a defect: the label policy leaves such rows out. A rejected row with this reason.
EXCLUDED_LABEL = "excluded_label"

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
    """One source image, its mask and its labels, by reference: plain values, so that a listing can hold it.

    `label` is the publisher's own word; `diagnosis`, `domain`, `malignant`, `ham7` and `excluded` are what the policy
    makes of it (see `judged`). `stated_malignant` is what the publisher says itself. `member` is what the reader's
    `load` needs beside the paths, such as a key in an HDF5 file. `split_hint` is the published split, `same_as` the
    source_id of an image that the publisher says is this one again, `problem` one of the defects above.
    """

    source: str
    source_id: str
    licence: str
    modality: str | None = None
    image: Path | None = None
    mask: Path | None = None
    member: str | None = None
    label: str | None = None
    problem: str | None = None
    domain: str | None = None
    diagnosis: str | None = None
    malignant: bool | None = None
    ham7: str | None = None
    excluded: str | None = None
    stated_malignant: bool | None = None
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
    same_as: str | None = None
    expert_asymmetry: float | None = None
    expert_colors: tuple[str, ...] | None = None
    split_hint: str | None = None

    def __post_init__(self) -> None:
        for name, vocabulary in (
            ("modality", taxonomy.MODALITIES),
            ("confirmation", taxonomy.CONFIRMATIONS),
            ("skin_type_scale", taxonomy.SKIN_TYPE_SCALES),
            ("skin_type", taxonomy.SKIN_TYPE_WORDS.get(self.skin_type_scale or "", ())),
            ("site", taxonomy.SITES),
            ("split_hint", taxonomy.SPLITS),
        ):
            value = getattr(self, name)
            if value is not None:
                taxonomy.check(value, vocabulary, f"{name} of {self.source}/{self.source_id}")

    def judged(self, policy: Policy) -> Entry:
        """The entry with what the policy makes of its label. Raises ValueError for a label that it does not know."""
        if self.label is None:
            return self
        means = policy.judge(self.source, self.label)
        return replace(
            self, diagnosis=means.diagnosis, domain=means.domain, malignant=means.malignant, ham7=means.ham7,
            excluded=means.excluded,
        )  # fmt: skip

    def require_image(self) -> Path:
        """The image's path. Raises ImageProblem for a listed defect."""
        if self.problem is not None or self.image is None:
            reason = self.problem or MISSING_IMAGE
            raise ImageProblem(reason, _SENTENCES[reason].format(name=f"{self.source}/{self.source_id}"))
        return self.image

    def to_row(self) -> dict[str, Any]:
        """The entry as a row of the listing, but for its unit."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        row["image"], row["mask"] = _from_path(self.image), _from_path(self.mask)
        return row | {"expert_colors": None if self.expert_colors is None else [*self.expert_colors]}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Entry:
        """The entry that a row of the listing holds."""
        values = {field.name: row[field.name] for field in fields(cls)}
        colors = values["expert_colors"]
        return cls(**values | {
            "image": _to_path(values["image"]), "mask": _to_path(values["mask"]),
            "expert_colors": None if colors is None else tuple(colors),
        })  # fmt: skip

    def labels(self) -> dict[str, Any]:
        """The corpus columns that the listing knows."""
        return {name: getattr(self, name) for name in LABELS}


_NOT_LABELS = ("image", "mask", "member", "problem", "excluded", "same_as", "split_hint")
LABELS: tuple[str, ...] = tuple(field.name for field in fields(Entry) if field.name not in _NOT_LABELS)


def _from_path(path: Path | None) -> bytes | None:
    return None if path is None else os.fsencode(path)  # bytes, because a file's name need not be UTF-8


def _to_path(name: bytes | None) -> Path | None:
    return None if name is None else Path(os.fsdecode(name))


def load_files(entry: Entry) -> Loaded:
    """The encoded image and mask of an entry whose pixels are files. Raises ImageProblem."""
    image = entry.require_image()
    return Loaded(read_bytes(image), None if entry.mask is None else read_bytes(entry.mask))


def read_bytes(path: Path) -> bytes:
    """A file's bytes. Raises ImageProblem where it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ImageProblem(MISSING_IMAGE, f"{path.name} must be there, but is gone; download it again.") from error
    except OSError as error:
        raise ImageProblem(
            "unreadable_file",
            f"{path.name} must be readable, but {error.strerror}; check its permissions.",
        ) from error
