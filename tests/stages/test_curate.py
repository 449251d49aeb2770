"""From source files to intake rows."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from factory import corpora, labels, phantom, records
from factory.corpora.base import Entry
from factory.images import read_mask, read_png
from factory.recipe import CorpusSection, PhantomSection
from factory.stages import curate
from factory.stages.curate import CurateImages

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
    entries = list(corpora.list_entries(section.model_copy(update={"sources": {"folder": str(root)}})))
    rows = CurateImages(section)(entries)
    assert len(rows) == len(entries)
    records.rows_to_table("intake", rows)
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
    rows = CurateImages(section)(list(corpora.list_entries(section)))
    table = records.rows_to_table("intake", rows)
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


def test_a_label_that_the_policy_leaves_out_is_a_rejected_row_and_is_not_decoded() -> None:
    entry = Entry("isic2019", "a", "CC0-1.0", image=Path("gone.jpg"), label="UNK").judged(labels.default())
    row = CurateImages(SECTION)([entry])[0]
    assert (row["outcome"], row["reason"], row["diagnosis"]) == ("rejected", "excluded_label", None)


@pytest.mark.parametrize(("frame", "stored"), [("keep", (96, 64)), ("crop", (64, 64)), ("pad", (64, 64))])
def test_a_picture_is_kept_cropped_or_padded_to_a_square(tmp_path: Path, frame: str, stored: tuple[int, int]) -> None:
    save(tmp_path, "a", 96, 64, disk(96, 64))
    row = curated(tmp_path, SECTION.model_copy(update={"frame": frame}))["a.png"]
    assert (row["width"], row["height"]) == stored
    pixels, mask = read_png(row["image"]["bytes"]), read_mask(row["mask"]["bytes"])
    assert pixels.shape[:2] == mask.shape == stored[::-1]
    share = {"keep": 1.0, "crop": 1.5, "pad": 2 / 3}[frame]  # of the disk's, whose width is half of the picture's
    assert mask.mean() == pytest.approx(np.pi / 16 * share, abs=0.02)
    assert (pixels[:8].max() == 0) == (frame == "pad")


def test_black_borders_and_vignettes_are_measured() -> None:
    drawn = phantom.draw(1, 3, 64).image
    letterbox = drawn.copy()
    letterbox[:16] = 0
    assert curate.black_border(letterbox) == pytest.approx(0.25)
    assert curate.black_border(drawn) < 0.05 and curate.black_border(np.zeros_like(drawn)) == 1.0


def test_nothing_of_a_files_metadata_is_stored(tmp_path: Path) -> None:
    save(tmp_path, "a")
    path = tmp_path / "nevus/a.png"
    picture, info = Image.open(path), PngInfo()
    info.add_text("Comment", "patient 4711")
    exif = picture.getexif()
    exif[0x010E] = "patient 4711"
    picture.save(path, pnginfo=info, exif=exif)
    assert b"4711" in path.read_bytes()
    stored = curated(tmp_path)["a.png"]["image"]["bytes"]
    with Image.open(io.BytesIO(stored)) as kept:
        assert b"4711" not in stored and not kept.info and not kept.getexif()


def test_real_images_are_curated_with_their_masks(isic2017: Path) -> None:
    section = CorpusSection(sources={"isic2017": str(isic2017)})
    entries = list(corpora.list_entries(section))
    chosen = [e for e in entries if e.split_hint == "test"][:3] + entries[:3]
    table = records.rows_to_table("intake", CurateImages(section)(chosen))
    assert set(table["outcome"].to_pylist()) == {"accepted"} and set(table["scale"].to_pylist()) == {256}
    assert table["mask"].null_count == 0 and table["copy_keys"].null_count == 0
