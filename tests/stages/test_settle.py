"""What needs all rows: groups, splits, and which copy of a photograph stays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from factory.recipe import CorpusSection
from factory.stages.settle import LIGHT_COLUMNS, assign_groups, assign_splits, published_copies, settle

SECTION = CorpusSection()


def light(rows: list[dict[str, object]]) -> pa.Table:
    filled = [
        {"source": "s", "source_id": f"i{i}", "outcome": "accepted", "row_id": f"r{i}", "record_id": f"p{i}"} | row
        for i, row in enumerate(rows)
    ]
    kinds = {"scale": pa.int32()}
    return pa.table({
        name: pa.array([row.get(name) for row in filled], kinds.get(name, pa.string())) for name in LIGHT_COLUMNS
    })  # fmt: skip


def copies(*pairs: tuple[int, int, str]) -> pa.Table:
    a, b, kinds = zip(*pairs, strict=True) if pairs else ((), (), ())
    return pa.table({
        "a": pa.array(a, pa.int64()), "b": pa.array(b, pa.int64()), "kind": pa.array(kinds, pa.string())
    })  # fmt: skip


def words(values: list[str | None]) -> np.ndarray:
    return np.array(values, dtype=object)


def split_all(groups: list[str], hints: list[str | None], diagnoses: list[str | None] | None = None) -> list[str]:
    known = words(diagnoses or [None] * len(groups))
    everyone = np.ones(len(groups), bool)
    return list(assign_splits(words(groups), words(hints), known, everyone, SECTION))


def test_groups_join_over_patients_lesions_pixels_and_copies_transitively() -> None:
    table = light(
        [
            {"patient_id": "1", "lesion_id": "a"},
            {"lesion_id": "a"},
            {"patient_id": "2"},
            {"record_id": "p1"},
            {"patient_id": "1", "source": "other"},
        ]
    )
    groups = assign_groups(table, copies())
    assert groups[0] == groups[1] == groups[3]
    assert len(set(groups)) == 3
    joined = assign_groups(table, copies((2, 4, "near")))
    assert joined[2] == joined[4] != joined[0]


def test_a_groups_name_does_not_depend_on_the_order_of_rows() -> None:
    rows = [{"row_id": f"r{i}", "record_id": f"p{i}", "patient_id": str(i % 3)} for i in range(9)]
    forward = dict(zip([r["row_id"] for r in rows], assign_groups(light(rows), copies()), strict=True))
    backward = dict(zip([r["row_id"] for r in rows[::-1]], assign_groups(light(rows[::-1]), copies()), strict=True))
    assert forward == backward


def test_no_group_crosses_splits_and_a_published_test_wins() -> None:
    groups = [f"g{i % 500}" for i in range(1500)]
    hints: list[str | None] = [None] * 500 + ["train"] * 500 + [("test" if i < 50 else None) for i in range(500)]
    splits = split_all(groups, hints)
    by_group: dict[str, set[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        by_group.setdefault(group, set()).add(split)
    assert all(len(found) == 1 for found in by_group.values())
    assert all(by_group[f"g{i}"] == {"test"} for i in range(50))
    # Every other group is published as train, so none of them may be tested on.
    assert all(by_group[f"g{i}"] <= {"train", "val"} for i in range(50, 500))
    assert {"val"} in by_group.values()


def test_shares_are_met_within_each_diagnosis_and_whatever_the_order() -> None:
    groups = [str(i) for i in range(1000)]
    diagnoses: list[str | None] = ["melanoma" if i % 20 == 0 else "nevus" for i in range(1000)]
    splits = split_all(groups, [None] * 1000, diagnoses)
    counts = Counter(zip(diagnoses, splits, strict=True))
    assert counts["nevus", "test"] == counts["nevus", "val"] == 95
    assert counts["melanoma", "test"] == counts["melanoma", "val"] == 5
    backward = split_all(groups[::-1], [None] * 1000, diagnoses[::-1])
    assert backward[::-1] == splits
    assert split_all(["g"], ["val"]) == ["val"]


def test_the_copy_of_a_published_test_split_stays_and_takes_its_group_there() -> None:
    table = light(
        [
            {"record_id": "same", "split": "train"},
            {"record_id": "same", "split": "test"},
            {"record_id": None, "outcome": "failed", "reason": "truncated"},
            {"record_id": None, "outcome": "failed", "reason": "truncated"},
            {"split": "train", "patient_id": "x"},
            {"split": "train", "patient_id": "x"},
        ]
    )
    out = settle(table, copies((0, 4, "near")), SECTION)
    assert out["outcome"].to_pylist() == ["rejected", "accepted", "failed", "failed", "rejected", "accepted"]
    assert out["reason"].to_pylist() == [
        "exact_duplicate", None, "truncated", "truncated", "near_duplicate", None,
    ]  # fmt: skip
    assert out["duplicate_of"].to_pylist() == ["r1", None, None, None, "r1", None]
    # The last row is no copy, but of the patient of one, and so may not be trained on.
    assert out["split"].to_pylist() == [None, "test", None, None, None, "test"]
    assert len(set(out["group_id"].to_pylist())) == 3
    assert out["row_id"].to_pylist() == table["row_id"].to_pylist()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"mask_source": "published"}, {"scale": 512}),
        ({"scale": 256}, {"scale": 128}),
        ({"row_id": "a"}, {"row_id": "b"}),
    ],
)
def test_of_copies_the_one_with_a_mask_stays_then_the_largest_then_the_first(
    first: dict[str, object], second: dict[str, object]
) -> None:
    for rows in ([first, second], [second, first]):
        out = settle(light(rows), copies((0, 1, "published")), SECTION)
        kept = out["outcome"].to_pylist().index("accepted")
        assert rows[kept] is first and sorted(out["outcome"].to_pylist()) == ["accepted", "rejected"]
        assert out["reason"].to_pylist()[1 - kept] == "published_duplicate"


def test_copies_may_be_kept_in_one_group_instead() -> None:
    section = SECTION.model_copy(update={"near_duplicates": "group"})
    out = settle(light([{}, {}, {"record_id": "p0"}]), copies((0, 1, "near")), section)
    assert out["outcome"].to_pylist() == ["accepted", "accepted", "rejected"]
    assert len(set(out["group_id"].to_pylist())) == 1


def test_a_publishers_own_duplicates_are_looked_up_within_their_source() -> None:
    table = light(
        [{"source": "a", "source_id": "x"}, {"source": "a", "source_id": "y"}, {"source": "b", "source_id": "x"}]
    )
    same_as = pa.chunked_array([pa.array([None, "x", "gone"], pa.string())])
    a, b = published_copies(table, same_as)
    assert (a.tolist(), b.tolist()) == ([1], [0])
