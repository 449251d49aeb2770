"""Captioners compared: every number here was counted by hand on four images."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pytest

from factory.lab.captions import compare, of_images


def caption(record_id: str, **more: Any) -> dict[str, Any]:
    return {
        "record_id": record_id, "caption": "a brown lesion", "asymmetry": None, "border_irregularity": None,
        "colors": ["light-brown"], "outcome": "accepted", "reason": None,
    } | more  # fmt: skip


def table(*rows: dict[str, Any]) -> pa.Table:
    typed = {"asymmetry": pa.float32(), "border_irregularity": pa.float32(), "colors": pa.list_(pa.string())}
    built = pa.Table.from_pylist(list(rows))
    for name, dtype in typed.items():
        built = built.set_column(built.column_names.index(name), name, built[name].cast(dtype))
    return built


FIRST = table(
    caption("a", asymmetry=0.0, colors=["black", "red"], caption="one two three four"),
    caption("b", asymmetry=0.9, colors=["black"], caption="a lesion of 5 mm"),
    caption("c", asymmetry=0.9, colors=["white"]),
    caption("d", caption=None, colors=None, outcome="failed", reason="no_lesion"),
)
SECOND = table(
    caption("a", asymmetry_level="low", colors=["black"], findings=["size", "size"], seconds=2.0, cost=0.01),
    caption("b", asymmetry_level="high", colors=["black"], findings=[], seconds=4.0, cost=None),
    caption("c", asymmetry_level="high", colors=["red"], findings=["size", "grade"], seconds=3.0, cost=None),
    caption("d", asymmetry_level="medium", findings=None, seconds=None, cost=0.03),
)


def test_two_captioners_agree_where_they_say_the_same() -> None:
    found = compare({"ours": FIRST, "theirs": SECOND})
    assert found["num_images"] == 4
    asymmetry = found["agreement"]["asymmetry"]
    assert asymmetry["alpha"]["value"] == 1.0 and asymmetry["alpha"]["num_units"] == 3
    assert [(p["raters"], p["successes"], p["trials"]) for p in asymmetry["equal"]] == [(["ours", "theirs"], 3, 3)]
    border = found["agreement"]["border_irregularity"]
    assert border["alpha"]["value"] is None and border["equal"][0]["trials"] == 0
    colors = found["agreement"]["colors"]
    assert colors["mean_jaccard"]["value"] == pytest.approx((0.5 + 1 + 0) / 3) and colors["mean_jaccard"]["num"] == 3
    assert colors["each"]["black"]["alpha"]["value"] == 1.0
    assert colors["each"]["blue-gray"]["alpha"]["value"] is None  # named by nobody, so nothing varies
    assert colors["each"]["red"]["named"]["ours"]["successes"] == 1
    # Red by hand: units (1,0), (0,0), (0,1): D_o = 4/6, D_e = 2 * 2 * 4 / 30.
    assert colors["each"]["red"]["alpha"]["value"] == pytest.approx(1 - (4 / 6) / (16 / 30))


def test_length_findings_failures_time_and_cost_are_those_of_the_tables() -> None:
    found = compare({"ours": FIRST, "theirs": SECOND})["backends"]
    ours, theirs = found["ours"], found["theirs"]
    assert (ours["captioned"]["successes"], ours["captioned"]["trials"]) == (3, 4)
    assert ours["failures"] == {"no_lesion": 1} and theirs["failures"] == {}
    assert (ours["words"]["min"], ours["words"]["median"], ours["words"]["max"]) == (3, 4, 5)
    assert (ours["sizes_stated"]["successes"], ours["sizes_stated"]["trials"]) == (1, 3)
    assert ours["findings"] is None and ours["seconds"] is None and ours["cost"] is None
    assert (theirs["findings"]["any"]["successes"], theirs["findings"]["any"]["trials"]) == (2, 4)
    assert theirs["findings"]["each"]["size"]["successes"] == 2  # twice in one caption is one caption
    assert theirs["seconds"]["median"] == 3.0 and theirs["seconds"]["num"] == 3
    assert theirs["cost"]["mean"] == pytest.approx(0.02) and theirs["cost"]["num"] == 2


def test_a_disagreement_of_two_levels_weighs_more_than_one_of_one() -> None:
    def table_of(*words: str) -> pa.Table:
        return table(*(caption(str(i), asymmetry_level=word) for i, word in enumerate(words)))

    said = table_of("low", "low", "medium", "high", "high", "medium")
    near = table_of("low", "low", "medium", "high", "high", "high")
    far = table_of("low", "low", "medium", "high", "low", "medium")
    alphas = [
        compare({"x": said, "y": other})["agreement"]["asymmetry"]["alpha"]["value"] for other in (said, near, far)
    ]
    assert alphas[0] == 1.0 and alphas[0] > alphas[1] > alphas[2]


def test_one_captioner_has_nobody_to_agree_with() -> None:
    found = compare({"ours": FIRST})
    assert found["agreement"] is None and list(found["backends"]) == ["ours"]


def test_only_the_images_asked_for_are_counted() -> None:
    found = compare({"ours": FIRST, "theirs": of_images(SECOND, ["a", "b"])}, ["a", "b"])
    assert found["num_images"] == 2 and found["backends"]["ours"]["captioned"]["trials"] == 2
    assert not any(isinstance(v, float) and math.isnan(v) for v in found["agreement"]["asymmetry"]["alpha"].values())


def test_what_cannot_be_compared_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="captions must hold at least one backend's table"):
        compare({})
    with pytest.raises(ValueError, match="captions of theirs must have a row for each image compared, got none of d"):
        compare({"ours": FIRST, "theirs": SECOND.slice(0, 3)}, ["a", "d"])
    with pytest.raises(ValueError, match="captions must share at least one image, got none that ours, theirs share"):
        compare({"ours": FIRST.slice(0, 1), "theirs": SECOND.slice(1, 1)})
    with pytest.raises(ValueError, match="captions of ours must have the column colors"):
        compare({"ours": FIRST.drop_columns("colors")})
    with pytest.raises(ValueError, match="captions of ours must have one row per image, got 5 rows of 4"):
        compare({"ours": pa.concat_tables([FIRST, FIRST.slice(0, 1)])})
    with pytest.raises(ValueError, match="asymmetry_level must be a known word, got 'huge'"):
        compare({"x": table(caption("a", asymmetry_level="huge")), "y": table(caption("a", asymmetry_level="low"))})
