"""Corpus rows to captions."""

from __future__ import annotations

import numpy as np

from factory import corpora, records
from factory.images import encode_png
from factory.recipe import CaptionSection, CorpusSection, PhantomSection
from factory.stages.caption import CaptionImages
from factory.stages.curate import CurateImages

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


def test_an_image_without_a_lesion_is_a_failed_caption() -> None:
    plain = encode_png(np.full((64, 64, 3), 180, np.uint8))
    row = corpus()[0] | {"image": {"bytes": plain, "path": "x.png"}, "mask": None, "mask_source": None}
    (made,) = CaptionImages(CaptionSection())([row])
    assert (made["outcome"], made["reason"]) == ("failed", "no_lesion")
    assert "caption" not in made
