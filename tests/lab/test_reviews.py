"""Raters' files: strict in, and results that were counted by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from factory.lab import reviews
from factory.lab.agreement import alpha
from factory.lab.reviews import read_reviews, summarize

KEY: dict[str, Any] = {
    "format": "dermafactory-caption-review", "version": 1, "study": "abc123", "title": "Study", "seed": 1,
    "backends": ["ours", "theirs"], "defects": ["hallucinated_size", "other"], "max_remark": 20,
    "items": {
        "i1": {"A": "ours", "B": "theirs"}, "i2": {"A": "theirs", "B": "ours"}, "i3": {"A": "ours"},
    },
}  # fmt: skip


def row(item: str, caption: str, plausibility: int | None, *defects: str, remark: str = "") -> dict[str, Any]:
    return {
        "item": item, "caption": caption, "plausibility": plausibility, "defects": list(defects), "remark": remark,
    }  # fmt: skip


def content(rater: str, *rows: Any) -> dict[str, Any]:
    return {
        "format": KEY["format"], "version": 1, "study": KEY["study"], "rater": rater, "saved": "", "complete": True,
        "ratings": list(rows),
    }  # fmt: skip


def write(folder: Path, what: Any, name: str = "a.json") -> Path:
    (folder / name).write_text(what if isinstance(what, str) else json.dumps(what))
    return folder / name


ANNA = content("anna", row("i1", "A", 5), row("i1", "B", 1, "other"), row("i2", "A", 2, "other"), row("i2", "B", 4),
               row("i3", "A", 4, remark="fine"))  # fmt: skip
BEN = content("ben", row("i1", "A", 5), row("i1", "B", 2, "other"), row("i2", "A", 2), row("i2", "B", None, "other"),
              row("i3", "A", None, remark="unsure"))  # fmt: skip


def test_means_defects_and_agreement_are_those_of_the_ratings(tmp_path: Path) -> None:
    result = summarize(read_reviews([write(tmp_path, BEN, "b.json"), write(tmp_path, ANNA)], KEY), KEY)
    ours, theirs = result["backends"]["ours"], result["backends"]["theirs"]
    assert list(result["raters"]) == ["anna", "ben"] and result["num_captions"] == 5
    assert result["raters"]["ben"] == {"rated": 3, "remarks": 1}
    assert ours["plausibility"]["value"] == pytest.approx((5 + 4 + 4 + 5) / 4) and ours["plausibility"]["num"] == 3
    assert theirs["plausibility"]["value"] == pytest.approx((1 + 2 + 2 + 2) / 4)
    assert ours["plausibility"]["low"] <= 4.5 <= ours["plausibility"]["high"]
    assert ours["scores"] == {"1": 0, "2": 0, "3": 0, "4": 2, "5": 2}
    other = theirs["defects"]["other"]
    assert [(other[how]["successes"], other[how]["trials"]) for how in ("any", "most")] == [(2, 2), (1, 2)]
    other = ours["defects"]["other"]  # ben's tag on i2 B stands without a score; half of two raters is not most
    assert [(other[how]["successes"], other[how]["trials"]) for how in ("any", "most")] == [(1, 3), (0, 3)]
    agreement, nan = result["agreement"], math.nan
    assert agreement["plausibility"]["value"] == pytest.approx(alpha([[5, 1, 2, 4, 4], [5, 2, 2, nan, nan]], "ordinal"))
    assert agreement["plausibility"]["num_units"] == 3 and agreement["plausibility"]["num_groups"] == 2
    assert [(p["raters"], p["successes"], p["trials"]) for p in agreement["equal"]] == [(["anna", "ben"], 2, 3)]
    assert agreement["within_one"][0]["successes"] == 3
    assert agreement["defects"]["other"]["equal"][0]["successes"] == 2  # i1 A and B; i2 A and B differ
    assert agreement["defects"]["other"]["alpha"]["value"] == pytest.approx(
        alpha([[0, 1, 1, 0], [0, 1, 0, 1]], "nominal")
    )
    assert agreement["defects"]["hallucinated_size"]["alpha"]["value"] is None
    assert {"rater": "anna", "item": "i3", "backend": "ours", "remark": "fine"} in result["remarks"]
    json.dumps(result, allow_nan=False)


def test_one_rater_has_nobody_to_agree_with_and_an_empty_file_is_a_rater_who_rated_nothing(tmp_path: Path) -> None:
    alone = summarize(read_reviews([write(tmp_path, ANNA)], KEY), KEY)
    assert alone["agreement"] is None
    nothing = summarize(read_reviews([write(tmp_path, content("zoe"))], KEY), KEY)
    assert nothing["backends"]["ours"]["plausibility"] is None
    assert nothing["backends"]["ours"]["defects"]["other"]["any"]["value"] is None
    json.dumps([alone, nothing], allow_nan=False)


def changed(**changes: Any) -> dict[str, Any]:
    return content("anna", row("i1", "A", 5) | changes)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("{", "a.json must be JSON, got JSONDecodeError"),
        ("[" * 100_000, "a.json must be JSON, got RecursionError"),
        ([1], "a.json must be a JSON object, got list"),
        (ANNA | {"format": "x"}, "a.json: format must be dermafactory-caption-review, got 'x'"),
        (ANNA | {"version": 2}, "a.json: version must be 1, got '2'"),
        (ANNA | {"study": "other"}, "a.json: study must be abc123, this run's, got 'other'"),
        (ANNA | {"rater": "../x"}, "a.json: rater must be a rater id, got '../x'"),
        (ANNA | {"rater": 7}, "a.json: rater must be a rater id"),
        (ANNA | {"ratings": {}}, "a.json: ratings must be a list"),
        (content("anna", 5), r"a.json: ratings\[0\] must be a rating, got '5'"),
        (changed(item="i9"), r"a.json: ratings\[0\].item must be an item of the study, got 'i9'"),
        (changed(item=["i1"]), r"a.json: ratings\[0\].item must be an item of the study"),
        (changed(caption="C"), r"a.json: ratings\[0\].caption must be a letter of its item, got 'C'"),
        (changed(plausibility=6), r"a.json: ratings\[0\].plausibility must be 1 to 5 or null, got '6'"),
        (changed(plausibility=0), r"plausibility must be 1 to 5 or null, got '0'"),
        (changed(plausibility=4.5), r"plausibility must be 1 to 5 or null, got '4.5'"),
        (changed(plausibility=True), r"plausibility must be 1 to 5 or null, got 'True'"),
        (changed(defects=["ugly"]), r"a.json: ratings\[0\].defects must be a list of known tags"),
        (changed(defects=["other", "other"]), r"defects must be a list of known tags, each once"),
        (changed(defects="other"), r"defects must be a list of known tags"),
        (changed(remark="x" * 21), r"a.json: ratings\[0\].remark must be a text of at most 20 characters"),
        (changed(remark=None), r"ratings\[0\].remark must be a text"),
        (content("a", row("i1", "A", 5), row("i1", "A", 4)), r"ratings\[1\] must be of a caption that is rated once"),
    ],
)
def test_a_file_that_is_not_as_the_page_saved_it_is_refused_by_field(tmp_path: Path, what: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read_reviews([write(tmp_path, what)], KEY)
    assert "hand in the file as the review page saved it" in str(refused.value)
    assert len(str(refused.value)) < 400


def test_a_rater_who_hands_in_two_files_no_file_and_a_huge_one_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [write(tmp_path, ANNA), write(tmp_path, ANNA, "again.json")]
    with pytest.raises(ValueError, match=r"again.json: rater must be in one file, got 'anna' in a.json too"):
        read_reviews(files, KEY)
    with pytest.raises(ValueError, match="--reviews must name 1 to 200 files, got 0"):
        read_reviews([], KEY)
    monkeypatch.setattr(reviews, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"a.json must have at most 100 bytes, got"):
        read_reviews(files, KEY)


def test_the_result_is_the_same_for_any_order_of_files(tmp_path: Path) -> None:
    files = [write(tmp_path, ANNA), write(tmp_path, BEN, "b.json")]
    results = [summarize(read_reviews(f, KEY), KEY) for f in (files, files[::-1])]
    assert results[0] == results[1]
