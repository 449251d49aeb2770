"""Caption: accepted corpus rows in, one row of `records.CAPTIONS` each out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from factory import records
from factory.images import RGB, read_mask, read_png
from factory.models.captioner import MeasuredCaptioner, NoLesion
from factory.prompts import Attributes
from factory.quality.attributes import Measurements, estimate_mask, measure
from factory.recipe import CaptionSection
from factory.stages.masks import FoundMask, MaskSource, mask_source

# The corpus columns a row must have.
READS = ("record_id", "image", "mask", "mask_source", "diagnosis", "skin_type", "diameter_mm", "outcome")


class CaptionImages:
    """`CaptionImages(section)(rows)`: accepted rows of the corpus to rows of the captions, in the same order.

    Rows that are not accepted are passed over: they have no image. A lesion too small to measure is a failed caption
    with reason `no_lesion`. masks: finds the lesion of an image without a mask; by default what `section.masks` names.
    """

    def __init__(self, section: CaptionSection, masks: MaskSource | None = None) -> None:
        self.section = section
        self._masks = masks
        self.captioner = MeasuredCaptioner(measure, estimate_mask)

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._caption(row) for row in rows if row["outcome"] == records.ACCEPTED]

    def _caption(self, row: Mapping[str, Any]) -> dict[str, Any]:
        known = {
            "record_id": row["record_id"],
            "captioner": self.captioner.name,
            "label_in_prompt": self.section.label_in_prompt,
        }
        rgb = read_png(row["image"]["bytes"])
        found = self._mask(row, rgb)
        try:
            attributes, sentence, _ = self.captioner.caption(
                rgb, found.mask, row["diagnosis"], self.section.label_in_prompt, row["skin_type"]
            )
        except NoLesion:
            return known | {"outcome": records.FAILED, "reason": "no_lesion"}
        return known | {
            "caption": sentence,
            "asymmetry": attributes.asymmetry,
            "border_irregularity": attributes.border_irregularity,
            "color_count": attributes.color_count,
            "colors": list(attributes.colors),
            "mask_source": found.source,
            "mask_confidence": found.confidence,
            **measured_columns(attributes, row.get("diameter_mm")),
            "outcome": records.ACCEPTED,
            "reason": None,
        }

    def _mask(self, row: Mapping[str, Any], rgb: RGB) -> FoundMask:
        """The record's own mask, or one that is found."""
        if row["mask"] is not None:
            return FoundMask(read_mask(row["mask"]["bytes"]), row["mask_source"], None)
        if self._masks is None:  # a corpus that has its masks loads no network
            self._masks = mask_source(self.section.masks)
        return self._masks(rgb)


def measured_columns(attributes: Attributes, stated_mm: float | None = None) -> dict[str, Any]:
    """What was measured beside the ABC, by its columns; none for attributes that were not measured.

    stated_mm: the diameter that the record's publisher states, which stands where the image has no scale.
    """
    if not isinstance(attributes, Measurements):
        return {}
    major, minor = attributes.asymmetry_axes
    return {
        "asymmetry_major": major,
        "asymmetry_minor": minor,
        "color_asymmetry": attributes.color_asymmetry,
        "radial_variance": attributes.radial_variance,
        "fractal_dimension": attributes.fractal_dimension,
        "abrupt_octants": attributes.abrupt_octants,
        "color_shares": list(attributes.color_shares),
        "relative_diameter": attributes.relative_diameter,
        "diameter_mm": stated_mm if attributes.diameter_mm is None else attributes.diameter_mm,
    }
