"""Caption: accepted corpus rows in, one row of `records.CAPTIONS` each out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from factory import records, taxonomy
from factory.images import RGB, read_mask, read_png
from factory.instructions import prompt_file
from factory.models.captioner import MeasuredCaptioner, NoLesion
from factory.models.captioners.answer import Parsed, parse
from factory.models.captioners.protocol import Answer, Captioner, Request
from factory.prompts import Attributes
from factory.quality.attributes import Measurements, estimate_mask, measure
from factory.quality.captions import findings
from factory.recipe import CaptionSection
from factory.stages.masks import FoundMask, MaskSource, mask_source

# The corpus columns a row must have.
READS = (
    "record_id", "image", "mask", "mask_source", "diagnosis", "skin_type", "skin_type_scale", "ita", "diameter_mm",
    "site", "modality", "vignette", "black_border", "source_width", "source_height", "outcome",
)  # fmt: skip
# Those that a model's captions are written with. No size is told to it: a model that states one has made it up.
READS_BY_MODEL = (*READS, "malignant")


class CaptionImages:
    """`CaptionImages(section)(rows)`: accepted rows of the corpus to rows of the captions, in the same order.

    Rows that are not accepted are passed over: they have no image. A lesion too small to measure is a failed caption
    with reason `no_lesion`. masks: finds the lesion of an image without a mask; by default what `section.masks` names.
    """

    def __init__(self, section: CaptionSection, masks: MaskSource | None = None) -> None:
        self.section = section
        self._masks = masks
        self.captioner = MeasuredCaptioner(measure, estimate_mask, section.bank)
        # Of a picture that was squeezed to a square, shape is measured after that is undone.
        self._squeezed = MeasuredCaptioner(partial(measure, unstretch=section.aspect), estimate_mask, section.bank)

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self._caption(row) for row in rows if row["outcome"] == records.ACCEPTED]

    def _caption(self, row: Mapping[str, Any]) -> dict[str, Any]:
        known = {
            "record_id": row["record_id"],
            "captioner": self.captioner.name,
            "label_in_prompt": self.section.label_in_prompt,
        }
        try:
            _, sentence, columns = self.measured(row)
        except NoLesion:
            return known | {"outcome": records.FAILED, "reason": "no_lesion"}
        return known | {"caption": sentence, **columns, "outcome": records.ACCEPTED, "reason": None}

    def measured(self, row: Mapping[str, Any]) -> tuple[Attributes, str, dict[str, Any]]:
        """What is measured in a row's image, the sentence for it, and the columns that hold it. Raises NoLesion."""
        rgb = read_png(row["image"]["bytes"])
        found = self._mask(row, rgb)
        square = row["source_width"] == row["source_height"]
        captioner = self._squeezed if square else self.captioner
        skin_type = taxonomy.fitzpatrick(row["skin_type"], row["skin_type_scale"], row["ita"])
        attributes, sentence, _ = captioner.caption(
            rgb, found.mask, row["diagnosis"], self.section.label_in_prompt, skin_type, row
        )
        columns = {
            "asymmetry": attributes.asymmetry,
            "border_irregularity": attributes.border_irregularity,
            "color_count": attributes.color_count,
            "colors": list(attributes.colors),
            "mask_source": found.source,
            "mask_confidence": found.confidence,
        }
        return attributes, sentence, columns | measured_columns(attributes, row.get("diameter_mm"))

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


class DescribeImages:
    """`DescribeImages(section, captioner)(rows)`: as CaptionImages, in the words of a vision-language model.

    What can be measured is measured all the same, so that planning goes on and the two can be compared. An answer that
    is not valid is asked for once more, in firmer words, and then kept as failed with its text: `invalid_answer`, or
    the captioner's own problem.
    """

    def __init__(self, section: CaptionSection, captioner: Captioner) -> None:
        self.section, self.captioner = section, captioner
        self.instruction = prompt_file(section.prompt, "instruction")
        self.prefix = prompt_file(section.prefix, "prefix")
        self.measure = CaptionImages(section)

    def __call__(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        shown = [row for row in rows if row["outcome"] == records.ACCEPTED]
        answers = self.captioner.ask([self.request(row) for row in shown])
        attempts = [1] * len(shown)
        unclear = [k for k, answer in enumerate(answers) if answer.text is not None and parse(answer.text) is None]
        again = self.captioner.ask([self.request(shown[k], again=True) for k in unclear]) if unclear else []
        for k, second in zip(unclear, again, strict=True):
            attempts[k], answers[k] = 2, _after(answers[k], second)
        return [self.row(*one) for one in zip(shown, answers, attempts, strict=True)]

    def request(self, row: Mapping[str, Any], again: bool = False) -> Request:
        """What is asked about a row."""
        asked = self.instruction.worded(self.label_told(row))
        return Request(read_png(row["image"]["bytes"]), f"{asked}\n{self.instruction.again}" if again else asked)

    def row(self, row: Mapping[str, Any], answer: Answer, attempts: int) -> dict[str, Any]:
        """The caption row of an answer."""
        told = self.label_told(row)
        measured, columns = self._measured(row)
        known = {
            "record_id": row["record_id"], "captioner": self.captioner.name, "label_in_prompt": told is not None,
            "raw_text": answer.text, "attempts": attempts, "tokens_in": answer.tokens_in,
            "tokens_out": answer.tokens_out, "model_digest": self.captioner.digest,
            "prompt_digest": records.digest(self.instruction.digest, self.prefix.digest), **columns,
        }  # fmt: skip
        said = None if answer.text is None else parse(answer.text)
        if said is None:
            return known | {"outcome": records.FAILED, "reason": answer.problem or "invalid_answer"}
        return known | self._judged(row, said, measured, told)

    def _judged(
        self, row: Mapping[str, Any], said: Parsed, measured: Attributes | None, told: str | None
    ) -> dict[str, Any]:
        found = findings(
            said.description, said.asymmetry, said.border_irregularity, said.colors, measured, told,
            label_in_prompt=told is not None,
        )  # fmt: skip
        reason = next((name for name in found if name in self.section.reject), None)
        return {
            "caption": self.prefix.worded(told, said.description), "parsed_as": said.parsed_as, "findings": found,
            "stated_asymmetry": said.asymmetry, "stated_border_irregularity": said.border_irregularity,
            "stated_colors": list(said.colors), "reason": reason,
            "outcome": records.ACCEPTED if reason is None else records.REJECTED,
        }  # fmt: skip

    def _measured(self, row: Mapping[str, Any]) -> tuple[Attributes | None, dict[str, Any]]:
        try:
            attributes, _, columns = self.measure.measured(row)
        except NoLesion:
            return None, {}
        return attributes, columns

    def label_told(self, row: Mapping[str, Any]) -> str | None:
        """`benign` or `malignant` where the arm names the label and it is known."""
        if not self.section.label_in_prompt:
            return None
        malignant = row["malignant"]
        if malignant is None and row["diagnosis"] is not None:
            malignant = taxonomy.is_malignant(row["diagnosis"])
        return None if malignant is None else "malignant" if malignant else "benign"


def _after(first: Answer, second: Answer) -> Answer:
    """The second answer with the tokens of both; where it did not come, the first one's text stays."""
    tokens = (first.tokens_in + second.tokens_in, first.tokens_out + second.tokens_out)
    return Answer(first.text if second.text is None else second.text, second.problem, *tokens)
