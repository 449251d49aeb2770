"""Corpus rows to captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest

from factory import corpora, phantom, records, taxonomy
from factory.images import encode_mask, encode_png
from factory.models.captioners.protocol import Answer, Request
from factory.prompts import Attributes
from factory.recipe import CaptionSection, CorpusSection, PhantomSection
from factory.stages.caption import CaptionImages, DescribeImages, measured_columns
from factory.stages.curate import CurateImages
from factory.stages.masks import FoundMask

SECTION = CorpusSection(phantoms=PhantomSection(count=6, size=128, seed=4))


def corpus() -> list[dict[str, Any]]:
    return records.rows_to_table("intake", CurateImages(SECTION)(corpora.list_entries(SECTION))).to_pylist()


def test_every_accepted_row_gets_one_caption_of_its_own_label() -> None:
    rows = corpus()
    rows[0] |= {"outcome": "failed", "reason": "truncated", "image": None}
    table = records.rows_to_table("captions", CaptionImages(CaptionSection())(rows))
    assert table["record_id"].to_pylist() == [row["record_id"] for row in rows[1:]]
    assert set(table["outcome"].to_pylist()) == {"accepted"} and set(table["mask_source"].to_pylist()) == {"phantom"}
    for row, sentence in zip(rows[1:], table["caption"].to_pylist(), strict=True):
        assert ("malignant" in sentence) == row["malignant"]


def test_the_blind_arm_says_so_in_its_rows() -> None:
    table = records.rows_to_table("captions", CaptionImages(CaptionSection(label_in_prompt=False))(corpus()))
    assert set(table["label_in_prompt"].to_pylist()) == {False}
    assert not any("malignant" in text or "benign" in text for text in table["caption"].to_pylist())


def test_without_a_mask_the_lesion_is_found_and_the_row_says_estimated() -> None:
    rows = [row | {"mask": None, "mask_source": None} for row in corpus()]
    table = records.rows_to_table("captions", CaptionImages(CaptionSection())(rows))
    assert set(table["mask_source"].to_pylist()) <= {"estimated", None}
    assert table["outcome"].to_pylist().count("accepted") >= 5
    assert all(0 < sure <= 1 for sure in table["mask_confidence"].to_pylist() if sure is not None)


def test_a_picture_that_was_squeezed_to_a_square_is_measured_as_it_was() -> None:
    drawn = phantom.draw(9, 2, 384)
    plain = corpus()[0] | {"mask_source": "phantom"}
    image, mask = (  # (384, 512): 4:3, with more skin at both sides
        cv2.copyMakeBorder(pixels, 0, 0, 64, 64, cv2.BORDER_REPLICATE)
        for pixels in (drawn.image, drawn.mask.astype(np.uint8))
    )
    square, square_mask = (cv2.resize(pixels, (384, 384), interpolation=cv2.INTER_AREA) for pixels in (image, mask))

    def across_the_major_axis(image: Any, mask: Any, aspect: float | None) -> Any:
        row = plain | {
            "image": {"bytes": encode_png(image), "path": ""}, "mask": {"bytes": encode_mask(mask > 0), "path": ""},
            "source_width": image.shape[1], "source_height": image.shape[0],
        }  # fmt: skip
        (made,) = CaptionImages(CaptionSection(aspect=aspect))([row])
        return made["asymmetry_major"]

    true = across_the_major_axis(image, mask, None)
    assert across_the_major_axis(image, mask, 4 / 3) == true  # not square: left as it is
    squeezed, undone = (
        across_the_major_axis(square, square_mask, None),
        across_the_major_axis(square, square_mask, 4 / 3),
    )
    assert abs(undone - true) < 0.25 * abs(squeezed - true)


def test_what_was_measured_beside_the_abc_is_in_the_row() -> None:
    rows = corpus()[:2]
    rows[0]["diameter_mm"], rows[1]["diameter_mm"] = 4.5, None
    table = records.rows_to_table("captions", CaptionImages(CaptionSection())(rows))
    first, second = table.to_pylist()
    assert (first["diameter_mm"], second["diameter_mm"]) == (4.5, None)
    assert first["mask_confidence"] is None  # the mask is the record's own
    assert first["asymmetry"] == pytest.approx((first["asymmetry_major"] + first["asymmetry_minor"]) / 2)
    assert len(first["color_shares"]) == len(taxonomy.COLORS) and sum(first["color_shares"]) == pytest.approx(1.0)
    assert 1 <= first["fractal_dimension"] <= 2 and 0 <= first["abrupt_octants"] <= 8
    assert first["color_asymmetry"] > 0 and first["radial_variance"] > 0 and 0 < first["relative_diameter"] < 1.5


def test_attributes_that_were_not_measured_leave_their_columns_null() -> None:
    assert measured_columns(Attributes(0.1, 0.2, ("black",)), 3.0) == {}


def test_masks_come_from_the_source_that_is_given() -> None:
    rows = [row | {"mask": None, "mask_source": None} for row in corpus()[:1]]
    disk = np.hypot(*(np.mgrid[:128, :128] - 63.5)) < 30
    made = CaptionImages(CaptionSection(), lambda rgb: FoundMask(disk, "segmenter", 0.9))(rows)[0]
    assert (made["mask_source"], made["mask_confidence"], made["outcome"]) == ("segmenter", 0.9, "accepted")
    assert made["border_irregularity"] < 0.03


def test_an_image_without_a_lesion_is_a_failed_caption() -> None:
    plain = encode_png(np.full((64, 64, 3), 180, np.uint8))
    row = corpus()[0] | {"image": {"bytes": plain, "path": "x.png"}, "mask": None, "mask_source": None}
    (made,) = CaptionImages(CaptionSection())([row])
    assert (made["outcome"], made["reason"]) == ("failed", "no_lesion")
    assert "caption" not in made


class Scripted:
    """A captioner that says what it is told, and remembers what it was asked."""

    name, digest = "scripted", "d0"

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.asked = list(answers), []  # type: ignore[var-annotated]

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        self.asked += requests
        return [self.answers.pop(0) for _ in requests]


BY_MODEL = CaptionSection(captioner="transformers", model="somewhere")
PROSE = "The mole is highly asymmetrical with ragged borders; it is black and 3 mm wide."


def described(section: CaptionSection, rows: list[dict[str, Any]], *answers: Answer) -> tuple[Any, list[Any]]:
    captioner = Scripted(*answers)
    made = records.rows_to_table("captions", DescribeImages(section, captioner)(rows)).to_pylist()
    return captioner, made


def test_a_models_caption_keeps_its_words_what_they_state_and_what_was_measured() -> None:
    row = corpus()[0]
    _, (made,) = described(BY_MODEL, [row], Answer(PROSE, None, 90, 20))
    label = "malignant" if row["malignant"] else "benign"
    assert made["caption"] == f"This photo depicts a {label} lesion. Here's a description of the mole: {PROSE}"
    assert (made["stated_asymmetry"], made["stated_border_irregularity"]) == ("high", "high")
    assert made["stated_colors"] == ["black"] and made["parsed_as"] == "prose" and made["raw_text"] == PROSE
    assert made["asymmetry"] is not None and made["colors"] and made["mask_source"] == "phantom"
    assert "unsupported_measurement" in made["findings"] and made["outcome"] == "accepted"
    assert (made["attempts"], made["tokens_in"], made["tokens_out"], made["model_digest"]) == (1, 90, 20, "d0")


def test_an_answer_that_is_not_valid_is_asked_for_once_more_in_firmer_words() -> None:
    rows = corpus()[:3]
    captioner, made = described(
        BY_MODEL, rows, Answer("garbage", None, 5, 5), Answer(PROSE, None, 5, 5), Answer("garbage", None, 5, 5),
        Answer(PROSE, None, 5, 5), Answer("more garbage", None, 5, 5),
    )  # fmt: skip
    assert [row["record_id"] for row in made] == [row["record_id"] for row in rows]
    assert [row["attempts"] for row in made] == [2, 1, 2] and [row["tokens_in"] for row in made] == [10, 5, 10]
    assert [(row["outcome"], row["reason"]) for row in made] == [
        ("accepted", None), ("accepted", None), ("failed", "invalid_answer"),
    ]  # fmt: skip
    assert made[2]["raw_text"] == "more garbage" and made[2]["asymmetry"] is not None
    assert captioner.asked[3].prompt == captioner.asked[0].prompt + "\n" + (
        "Answer with the JSON object alone, with all four keys and nothing before or after it."
    )


def test_a_problem_is_the_reason_and_a_text_that_came_is_kept() -> None:
    rows = corpus()[:2]
    _, made = described(BY_MODEL, rows, Answer(None, "timeout"), Answer("garbage"), Answer(None, "http_500"))
    assert [(row["outcome"], row["reason"]) for row in made] == [("failed", "timeout"), ("failed", "http_500")]
    assert made[1]["raw_text"] == "garbage"


def test_only_findings_that_the_recipe_lists_reject() -> None:
    section = BY_MODEL.model_copy(update={"reject": ["unsupported_measurement"]})
    _, (made,) = described(section, corpus()[:1], Answer(PROSE))
    assert (made["outcome"], made["reason"]) == ("rejected", "unsupported_measurement") and made["caption"]
    with pytest.raises(ValueError, match="reject must hold findings .*, got ugly"):
        CaptionSection(reject=["ugly"])


def test_the_blind_arm_and_an_unknown_label_are_not_told() -> None:
    known, unknown = corpus()[0], corpus()[1] | {"malignant": None, "diagnosis": None}
    captioner, made = described(BY_MODEL, [known, unknown], Answer(PROSE), Answer(PROSE))
    assert [row["label_in_prompt"] for row in made] == [True, False]
    assert "lignant" in captioner.asked[0].prompt or "benign" in captioner.asked[0].prompt
    assert "a lesion." in captioner.asked[1].prompt and made[1]["caption"].startswith("This photo depicts a lesion.")
    blind = BY_MODEL.model_copy(update={"label_in_prompt": False})
    captioner, (made_blind,) = described(blind, [known], Answer("A melanoma with smooth borders."))
    assert not made_blind["label_in_prompt"] and "diagnosis_in_blind_caption" in made_blind["findings"]


def test_an_image_without_a_lesion_to_measure_still_has_its_words() -> None:
    plain = encode_png(np.full((64, 64, 3), 180, np.uint8))
    row = corpus()[0] | {"image": {"bytes": plain, "path": "x.png"}, "mask": None, "mask_source": None}
    _, (made,) = described(BY_MODEL, [row], Answer(PROSE))
    assert made["outcome"] == "accepted" and made["asymmetry"] is None


@pytest.mark.parametrize(
    ("scale", "stated"), [("ddi", "12"), ("milk10k", "3"), ("fst", "V"), ("ita", "II"), (None, None)]
)
def test_a_skin_type_of_any_scale_is_captioned_and_none_is_turned_into_another(
    scale: str | None, stated: str | None
) -> None:
    row = corpus()[0] | {"skin_type": stated, "skin_type_scale": scale, "ita": 35.0}
    (made,) = CaptionImages(CaptionSection())([row])
    on_this_scale = stated if scale in ("fst", "ita") else "III"  # 35 degrees
    assert f"on {taxonomy.SKIN_WORDS[str(on_this_scale)]} skin" in made["caption"]
    (unknown,) = CaptionImages(CaptionSection())([row | {"ita": None}])
    assert ("skin" in unknown["caption"]) == (scale in ("fst", "ita"))
