"""From source files to corpus rows, and what needs all rows."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from factory import corpora, phantom, records
from factory.images import read_mask, read_png
from factory.recipe import CorpusSection, PhantomSection
from factory.stages import curate
from factory.stages.curate import CurateImages, assign_groups, assign_splits, second_pass

SECTION = CorpusSection(min_side=32, scales=[32, 64, 128])


def save(root: Path, name: str, width: int = 64, height: int = 64, mask: Image.Image | None = None) -> None:
    (root / "nevus").mkdir(exist_ok=True)
    drawn = phantom.draw(1, len(name), 64)
    Image.fromarray(drawn.image).resize((width, height)).save(root / "nevus" / f"{name}.png")
    if mask is not None:
        mask.save(root / "nevus" / f"{name}_mask.png")


def disk(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    inside = ((x - width / 2) / (width / 4)) ** 2 + ((y - height / 2) / (height / 4)) ** 2 < 1
    return Image.fromarray(inside.astype(np.uint8) * 255)


def curated(root: Path, section: CorpusSection = SECTION) -> dict[str, dict[str, object]]:
    entries = corpora.reader("folder")(str(root), section)
    rows = CurateImages(section)(entries)
    assert len(rows) == len(entries)
    records.rows_to_table("corpus", rows)
    return {str(row["source_id"]).removeprefix("nevus/"): row for row in rows}


def test_every_entry_becomes_one_row_with_at_most_one_reason(tmp_path: Path) -> None:
    save(tmp_path, "good", mask=disk(64, 64))
    save(tmp_path, "bare")
    save(tmp_path, "tiny", 31, 200)
    save(tmp_path, "blank", mask=Image.new("L", (64, 64)))
    save(tmp_path, "askew", mask=disk(64, 32))
    save(tmp_path, "coarse", mask=disk(32, 32))
    (tmp_path / "nevus/empty.jpg").write_bytes(b"")
    save(tmp_path, "torn", mask=disk(64, 64))
    torn = tmp_path / "nevus/torn_mask.png"
    torn.write_bytes(torn.read_bytes()[:60])
    out = io.BytesIO()
    Image.new("P", (64, 64)).save(out, "GIF")
    (tmp_path / "nevus/moving.jpg").write_bytes(out.getvalue())
    disk(64, 64).save(tmp_path / "nevus/lone_mask.png")
    rows = curated(tmp_path)
    assert {name: (row["outcome"], row["reason"]) for name, row in rows.items()} == {
        "good.png": ("accepted", None),
        "bare.png": ("accepted", None),
        "tiny.png": ("rejected", "too_small"),
        "blank.png": ("accepted", None),
        "askew.png": ("failed", "mask_size"),
        "coarse.png": ("accepted", None),
        "empty.jpg": ("failed", "empty_file"),
        "torn.png": ("failed", "mask_truncated"),
        "moving.jpg": ("failed", "not_an_allowed_format"),
        "lone_mask.png": ("failed", "mask_without_image"),
    }
    assert Counter(row["outcome"] for row in rows.values()).total() == 10
    sources = {name: row.get("mask_source") for name, row in rows.items() if row["outcome"] == "accepted"}
    assert sources == {"good.png": "published", "bare.png": None, "blank.png": "empty", "coarse.png": "published"}
    assert rows["blank.png"]["mask"] is None
    assert (rows["tiny.png"]["width"], rows["tiny.png"]["height"]) == (31, 200)
    assert rows["good.png"]["malignant"] is False


@pytest.mark.parametrize(
    ("width", "height", "scale", "stored"),
    [(64, 64, 64, (64, 64)), (100, 63, 32, (51, 32)), (300, 200, 128, (192, 128)), (70, 140, 64, (64, 128))],
)
def test_an_image_is_stored_at_the_largest_rung_not_above_its_short_side(
    tmp_path: Path, width: int, height: int, scale: int, stored: tuple[int, int]
) -> None:
    save(tmp_path, "a", width, height, disk(width, height))
    row = curated(tmp_path)["a.png"]
    assert (row["scale"], row["width"], row["height"]) == (scale, *stored)
    pixels, mask = read_png(row["image"]["bytes"]), read_mask(row["mask"]["bytes"])
    assert pixels.shape == (stored[1], stored[0], 3) and mask.shape == pixels.shape[:2]
    assert row["record_id"] == records.record_id(pixels)
    assert mask.mean() == pytest.approx(np.pi / 16, abs=0.02)


def test_phantoms_arrive_with_truth_and_real_skin_is_measured(tmp_path: Path) -> None:
    section = SECTION.model_copy(update={"phantoms": PhantomSection(count=4, size=64, seed=9)})
    rows = CurateImages(section)(corpora.list_entries(section))
    table = records.rows_to_table("corpus", rows)
    assert set(table["mask_source"].to_pylist()) == {"phantom"}
    assert table["true_color_count"].to_pylist() == [phantom.draw(9, i, 64).color_count for i in range(4)]
    assert set(table["skin_type_source"].to_pylist()) == {"phantom"}
    yellow = np.full((64, 64, 3), (225, 190, 160), np.uint8)
    yellow[24:40, 24:40] = (110, 70, 50)
    (tmp_path / "nevus").mkdir()
    Image.fromarray(yellow).save(tmp_path / "nevus/a.png")
    row = curated(tmp_path)["a.png"]
    # Lab of (225, 190, 160) is about (79.3, 9.0, 19.6): atan(29.3 / 19.6) = 56 degrees.
    assert (row["skin_type"], row["skin_type_scale"], row["skin_type_source"]) == ("I", "ita", "measured")


def light(rows: list[dict[str, object]]) -> pa.Table:
    filled = [
        {"source": "s", "outcome": "accepted", "row_id": f"r{i}", "record_id": f"p{i}"} | row
        for i, row in enumerate(rows)
    ]
    columns = {name: pa.array([row.get(name) for row in filled], pa.string()) for name in curate.LIGHT_COLUMNS}
    return pa.table(columns)


def test_groups_join_over_patients_lesions_and_pixels_transitively() -> None:
    table = light(
        [
            {"patient_id": "1", "lesion_id": "a"},
            {"lesion_id": "a"},
            {"patient_id": "2"},
            {"record_id": "p1"},
            {"patient_id": "1", "source": "other"},
        ]
    )
    groups = assign_groups(table)
    assert groups[0] == groups[1] == groups[3]
    assert len(set(groups)) == 3
    joined = assign_groups(table, edges=[(2, 4)])
    assert joined[2] == joined[4] != joined[0]


def test_a_groups_name_does_not_depend_on_the_order_of_rows() -> None:
    rows = [{"row_id": f"r{i}", "record_id": f"p{i}", "patient_id": str(i % 3)} for i in range(9)]
    forward = dict(zip([r["row_id"] for r in rows], assign_groups(light(rows)), strict=True))
    backward = dict(zip([r["row_id"] for r in rows[::-1]], assign_groups(light(rows[::-1])), strict=True))
    assert forward == backward


def test_no_group_crosses_splits_and_a_published_test_wins() -> None:
    groups = [f"g{i % 500}" for i in range(1500)]
    hints = [None] * 500 + ["train"] * 500 + [("test" if i < 50 else None) for i in range(500)]
    splits = assign_splits(groups, SECTION, hints)
    by_group: dict[str, set[str]] = {}
    for group, split in zip(groups, splits, strict=True):
        by_group.setdefault(group, set()).add(split)
    assert all(len(found) == 1 for found in by_group.values())
    assert all(by_group[f"g{i}"] == {"test"} for i in range(50))
    # Every other group is published as train, so none of them may be tested on.
    assert all(by_group[f"g{i}"] <= {"train", "val"} for i in range(50, 500))
    assert splits == assign_splits(groups, SECTION, hints)


def test_shares_are_met_where_nothing_is_published() -> None:
    counts = Counter(assign_splits([str(i) for i in range(5000)], SECTION, [None] * 5000))
    assert counts["test"] == pytest.approx(500, abs=80) and counts["val"] == pytest.approx(500, abs=80)
    assert assign_splits(["g"], SECTION, ["val"]) == ["val"]


def test_the_second_pass_rejects_later_copies_and_gives_splits_to_what_is_accepted() -> None:
    table = light(
        [
            {"record_id": "same", "split": "train"},
            {"record_id": "same", "split": "test"},
            {"record_id": None, "outcome": "failed", "reason": "truncated"},
            {"record_id": None, "outcome": "failed", "reason": "truncated"},
        ]
    )
    out = second_pass(table, SECTION)
    assert out["outcome"].to_pylist() == ["accepted", "rejected", "failed", "failed"]
    assert out["reason"].to_pylist() == [None, "exact_duplicate", "truncated", "truncated"]
    assert out["split"].to_pylist() == ["test", None, None, None]
    assert len(set(out["group_id"].to_pylist())) == 3
    assert out["row_id"].to_pylist() == table["row_id"].to_pylist()


def test_real_images_are_curated_with_their_masks(isic2017: Path) -> None:
    entries = corpora.reader("isic2017")(str(isic2017), CorpusSection())
    chosen = [e for e in entries if e.split_hint == "test"][:3] + entries[:3]
    table = records.rows_to_table("corpus", CurateImages(CorpusSection())(chosen))
    assert set(table["outcome"].to_pylist()) == {"accepted"} and set(table["scale"].to_pylist()) == {256}
    assert table["mask"].null_count == 0
    out = second_pass(table.select(list(curate.LIGHT_COLUMNS)), CorpusSection())
    assert out["split"].to_pylist()[:3] == ["test"] * 3 and "test" not in out["split"].to_pylist()[3:]
