"""Corpus rows to captions."""

from __future__ import annotations

import numpy as np
import pytest

from factory import corpora, records, taxonomy
from factory.images import encode_png
from factory.prompts import Attributes
from factory.recipe import CaptionSection, CorpusSection, PhantomSection
from factory.stages.caption import CaptionImages, measured_columns
from factory.stages.curate import CurateImages
from factory.stages.masks import FoundMask

SECTION = CorpusSection(phantoms=PhantomSection(count=6, size=128, seed=4))


def corpus() -> list[dict[str, object]]:
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
