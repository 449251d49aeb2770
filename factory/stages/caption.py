"""Caption: accepted corpus rows in, one row of `records.CAPTIONS` each out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from factory import records
from factory.images import read_mask, read_png
from factory.models.captioner import MeasuredCaptioner, NoLesion
from factory.quality.attributes import estimate_mask, measure
from factory.recipe import CaptionSection

# The corpus columns a row must have.
READS = ("record_id", "image", "mask", "mask_source", "diagnosis", "skin_type", "outcome")


class CaptionImages:
    """`CaptionImages(section)(rows)`: accepted rows of the corpus to rows of the captions, in the same order.

    Rows that are not accepted are passed over: they have no image. A lesion too small to measure is a failed caption
    with reason `no_lesion`.
    """

    def __init__(self, section: CaptionSection) -> None:
        self.section = section
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
        mask = None if row["mask"] is None else read_mask(row["mask"]["bytes"])
        try:
            attributes, sentence, source = self.captioner.caption(
                rgb, mask, row["diagnosis"], self.section.label_in_prompt, row["skin_type"]
            )
        except NoLesion:
            return known | {"outcome": records.FAILED, "reason": "no_lesion"}
        return known | {
            "caption": sentence,
            "asymmetry": attributes.asymmetry,
            "border_irregularity": attributes.border_irregularity,
            "color_count": attributes.color_count,
            "colors": list(attributes.colors),
            "mask_source": row["mask_source"] if source == "given" else source,
            "outcome": records.ACCEPTED,
            "reason": None,
        }
