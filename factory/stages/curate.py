"""Curate: source entries in, one row of `records.INTAKE` each out. See `stages/settle.py` for what needs all rows.

An image is stored at the largest rung of `scales` not above its short side, so that its short side is that rung and
nothing is ever enlarged; smaller rungs are had by reducing it. `record_id` is the hash of the stored pixels, which
are all that is kept of the file: no EXIF, GPS, XMP or text. `split` holds the published split, as a hint.

    failed     the listing's own problems (missing_image, mask_without_image, ...), what `images` refuses, a mask that
               cannot be read (`mask_` and why), a mask of another aspect than its image (mask_size)
    rejected   too_small (short side below `min_side`), excluded_label (the label policy leaves it out)

A mask that is missing or empty does not lose its image: `mask` is null, and `mask_source` is null or `empty`. The
typology angle of the skin is measured for all (`ita`); where no skin type is published its band stands in (scale
`ita`, source `measured`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from factory import corpora, records, taxonomy
from factory.corpora.base import EXCLUDED_LABEL, Entry, Loaded
from factory.images import (
    RGB,
    ImageProblem,
    Mask,
    decode_mask,
    decode_rgb,
    encode_grey,
    encode_mask,
    encode_png,
    reduced,
    resized,
)  # fmt: skip
from factory.quality.attributes import estimate_mask
from factory.quality.copies import describe, packed, view
from factory.quality.normal_skin import bright_window
from factory.quality.skin_tone import ita, vignette_mask
from factory.recipe import CorpusSection

Row = dict[str, Any]

_SAME_ASPECT = 0.02  # relative
MEASURED_SIDE = 128  # px of the short side; copies, skin and borders are looked for at this size


class CurateImages:
    """`CurateImages(section)(entries)`: one intake row per entry, in the same order."""

    def __init__(self, section: CorpusSection) -> None:
        self.section = section

    def __call__(self, entries: list[Entry]) -> list[Row]:
        return [self._curate(entry) for entry in entries]

    def _curate(self, entry: Entry) -> Row:
        row: Row = entry.labels() | {
            "row_id": records.row_id(entry.source, entry.source_id), "split": entry.split_hint, "same_as": entry.same_as
        }  # fmt: skip
        if entry.excluded is not None:
            return row | {"outcome": records.REJECTED, "reason": EXCLUDED_LABEL}
        try:
            loaded = corpora.load(entry)
            rgb, mask = self._decoded(entry.source_id, loaded)
        except ImageProblem as problem:
            return row | {"outcome": records.FAILED, "reason": problem.reason}
        height, width = rgb.shape[:2]
        row |= {**loaded.labels, "source_width": width, "source_height": height}
        if min(height, width) < self.section.min_side:
            return row | {"width": width, "height": height, "outcome": records.REJECTED, "reason": "too_small"}
        rgb, mask = _framed(rgb, mask, self.section.frame)
        short = min(rgb.shape[:2])
        scale = max(rung for rung in self.section.scales if rung <= short)
        row |= _stored(rgb, mask, scale, row.get("mask_source") or "published")
        return _with_skin_type(row) | {"outcome": records.ACCEPTED, "reason": None}

    def _decoded(self, name: str, loaded: Loaded) -> tuple[RGB, Mask | None]:
        """Image and mask of one size, as published."""
        caps = {"max_pixels": self.section.max_pixels, "max_bytes": self.section.max_bytes}
        rgb = decode_rgb(loaded.image, name, **caps) if isinstance(loaded.image, bytes) else loaded.image
        if not isinstance(loaded.mask, bytes):
            return rgb, loaded.mask
        try:
            mask = decode_mask(loaded.mask, f"the mask of {name}", **caps)
        except ImageProblem as problem:
            raise ImageProblem(f"mask_{problem.reason}", str(problem)) from problem
        return rgb, _fitted(name, mask, rgb.shape[0], rgb.shape[1])


def _fitted(name: str, mask: Mask, height: int, width: int) -> Mask:
    """The mask at its image's size; another aspect means that they do not belong together."""
    high, wide = mask.shape
    if abs(wide * height - high * width) > _SAME_ASPECT * high * width:
        raise ImageProblem(
            "mask_size",
            f"the mask of {name} must have its image's shape {width} x {height}, got {wide} x {high}; pair them again.",
        )
    return np.asarray(resized(mask, width, height))


def _framed(rgb: RGB, mask: Mask | None, frame: str) -> tuple[RGB, Mask | None]:
    """The picture as it is (`keep`), its central square (`crop`), or with black added to a square (`pad`)."""
    height, width = rgb.shape[:2]
    if frame == "keep" or height == width:
        return rgb, mask
    side = min(height, width) if frame == "crop" else max(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    if frame == "crop":
        window = np.s_[top : top + side, left : left + side]
        return np.ascontiguousarray(rgb[window]), None if mask is None else mask[window]
    sides = (-top, side - height + top), (-left, side - width + left)
    return np.pad(rgb, (*sides, (0, 0))), None if mask is None else np.pad(mask, sides)


def _stored(rgb: RGB, mask: Mask | None, scale: int, mask_source: str) -> Row:
    """The columns that hold or come from pixels, at the rung `scale`."""
    short = min(rgb.shape[:2])
    height, width = (round(side * scale / short) for side in rgb.shape[:2])
    rgb = np.ascontiguousarray(resized(rgb, width, height))
    identifier = records.record_id(rgb)
    small = measured(rgb)
    vignette = vignette_mask(small)
    stored: Row = {
        "record_id": identifier, "image": records.image_struct(encode_png(rgb), f"{identifier}.png"),
        "mask": None, "mask_source": None, "width": width, "height": height, "scale": scale,
        "copy_keys": packed(describe(small)), "copy_view": records.image_struct(encode_grey(view(small)), "view.png"),
        "black_border": black_border(small),
        "vignette": float(vignette.mean()),
    }  # fmt: skip
    lesion = None
    if mask is not None:
        mask = np.asarray(resized(mask, width, height))
        # A speck can vanish on the way down; it is then as empty as a mask that was published empty.
        stored["mask_source"] = mask_source if mask.any() else "empty"
        if mask.any():
            stored["mask"] = records.image_struct(encode_mask(mask), f"{identifier}-mask.png")
            lesion = np.asarray(resized(mask, small.shape[1], small.shape[0]))
    angle = ita(small, estimate_mask(small) if lesion is None else lesion, vignette)
    return stored | {"ita": None if np.isnan(angle) else angle}


def _with_skin_type(row: Row) -> Row:
    """The row with a skin type by measurement where none is published; the two scales are never mixed in one value."""
    if row.get("skin_type") is None and row["ita"] is not None:
        row |= {"skin_type": taxonomy.skin_type_of_ita(row["ita"]), "skin_type_scale": "ita"}
        row["skin_type_source"] = "measured"
    return row


def measured(rgb: RGB) -> RGB:
    """A stored image as it is measured and compared: as it is, or reduced to `MEASURED_SIDE` on its short side."""
    return np.asarray(reduced(rgb, MEASURED_SIDE))


def black_border(rgb: RGB) -> float:
    """The share of the picture that is black rows and columns at its edges, 0 to 1."""
    window = bright_window(rgb)
    return 1.0 - float(window.sum()) / window.size
