"""Several datasets become one corpus on a real Ray: copies between them are found, no group crosses splits, and ids
depend on neither the run nor the size of its parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from factory import phantom
from factory.images import RGB, decode_rgb, encode_png
from factory.recipe import load
from factory.run import Run

pytestmark = pytest.mark.usefixtures("ray_cluster")

SIZE, DRAWN, OWN = 192, 30, 14
SETTLED = ("row_id", "record_id", "group_id", "split", "duplicate_of", "outcome", "reason")
Ingest = Callable[..., Path]


def encoded(rgb: RGB, quality: int) -> bytes:
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def warmer(rgb: RGB) -> RGB:
    return (np.clip((rgb / 255.0) ** 0.94 * (1.05, 1.0, 0.95), 0, 1) * 255).astype(np.uint8)


PLANTED: dict[str, Callable[[RGB], bytes]] = {
    "encoded_again": lambda rgb: encoded(rgb, 70),
    "of_224": lambda rgb: encoded(cv2.resize(np.ascontiguousarray(rgb), (224, 224)), 85),
    "flipped": lambda rgb: encoded(rgb[:, ::-1], 85),
    "turned": lambda rgb: encode_png(np.ascontiguousarray(np.rot90(rgb))),
    "cropped": lambda rgb: encode_png(np.ascontiguousarray(rgb[12:180, 8:176])),
    "of_other_colours": lambda rgb: encoded(warmer(rgb), 90),
    "as_it_is": lambda rgb: encode_png(np.ascontiguousarray(rgb)),
}


def plant(folder: Path, originals: dict[str, RGB]) -> list[tuple[str, str]]:
    """One copy of each original under another name, of each kind in turn: (original, copy) by source id."""
    kinds, pairs = list(PLANTED), []
    for number, (name, rgb) in enumerate(originals.items()):
        kind = kinds[number % len(kinds)]
        file = folder / "nevus" / f"{kind}_{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PLANTED[kind](rgb))
        pairs.append((name, f"nevus/{file.name}"))
    return pairs


def own_images(folder: Path) -> None:
    (folder / "melanoma").mkdir(parents=True)
    for drawn in phantom.draw_many(977, range(OWN), SIZE):
        (folder / "melanoma" / f"own_{drawn.index}.png").write_bytes(encode_png(drawn.image))


@pytest.fixture
def ingest(tmp_path: Path, factory_command: Callable[..., Any]) -> Ingest:
    def run(name: str, *arguments: str) -> Path:
        done = factory_command("ingest", "--run", tmp_path / name, *arguments)
        assert done.status == 0, done.err
        return tmp_path / name

    return run


@pytest.fixture
def image_model(tmp_path: Path) -> Path:
    """A small DINOv2 of the real class; random weights tell images apart well enough."""
    import torch
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    torch.manual_seed(3)
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
    Dinov2Model(Dinov2Config(**tiny)).save_pretrained(tmp_path / "dinov2")
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "dinov2")
    return tmp_path / "dinov2"


def settled(run: Path) -> list[tuple[Any, ...]]:
    rows = Run(run).table("corpus").read(list(SETTLED)).to_pylist()
    return sorted(tuple(row[name] for name in SETTLED) for row in rows)


def checked(run: Path, first: str, pairs: list[tuple[str, str]]) -> None:
    """The planted pairs are in the table of copies and in the report's matrix, and no group crosses splits."""
    rows = {row["row_id"]: row for row in Run(run).table("corpus").read().to_pylist()}
    found = {
        frozenset(rows[copy[side]]["source_id"] for side in ("row_id_a", "row_id_b"))
        for copy in Run(run).table("copies").read().to_pylist()
        if copy["source_a"] != copy["source_b"]
    }
    assert found == {frozenset(pair) for pair in pairs}
    by_name = {row["source_id"]: row for row in rows.values()}
    for pair in pairs:
        one, other = (by_name[name] for name in pair)
        assert one["group_id"] == other["group_id"]
        assert sorted(row["outcome"] for row in (one, other)) == ["accepted", "rejected"]
        lost, kept = (one, other) if one["outcome"] == "rejected" else (other, one)
        assert lost["reason"] in ("near_duplicate", "exact_duplicate") and lost["duplicate_of"] == kept["row_id"]
    report = json.loads((run / "report/corpus.json").read_text())
    matrix = report["copies"]["matrix"]
    at = matrix["rows"].index(first), matrix["columns"].index("folder")
    assert matrix["counts"][at[0]][at[1]] == len(pairs)
    assert report["copies"]["groups"]["crossing"] == 0
    assert {check["name"]: check["holds"] for check in report["checks"]}["one_split"]
    assert Run(run).verify() == []


def test_copies_between_datasets_are_found_and_nothing_depends_on_the_size_of_parts(
    tmp_path: Path, ingest: Ingest
) -> None:
    folder, seed = tmp_path / "images", load(None).corpus.phantoms.seed
    own_images(folder)
    drawn = {f"phantom-{seed}-{d.index:06d}": d.image for d in phantom.draw_many(seed, range(14), SIZE)}
    pairs = plant(folder, drawn)
    sources = ["--corpus", f"phantom={DRAWN}", "--corpus", f"folder={folder}", "--set", f"corpus.phantoms.size={SIZE}"]
    first = ingest("first", *sources, "--set", "corpus.unit_rows=8")
    checked(first, "phantom", pairs)
    assert len(settled(first)) == DRAWN + OWN + len(pairs)
    assert settled(ingest("second", *sources, "--set", "corpus.unit_rows=8")) == settled(first)
    assert settled(ingest("third", *sources, "--set", "corpus.unit_rows=19")) == settled(first)


def test_copies_of_published_photographs_leave_the_published_test_split_whole(
    isic2017: Path, tmp_path: Path, ingest: Ingest
) -> None:
    """ISIC 2017's validation images are held out as a test split: of each planted copy the published one stays."""
    published = tmp_path / "isic2017"
    published.mkdir()
    for item in isic2017.glob("ISIC-2017_Validation_*"):
        (published / item.name).symlink_to(item)
    folder = tmp_path / "images"
    own_images(folder)
    files = sorted((published / "ISIC-2017_Validation_Data").glob("*.jpg"))[:70:5]
    pairs = plant(folder, {file.stem: decode_rgb(file.read_bytes(), file.name) for file in files})
    run = ingest("run", "--corpus", f"isic2017={published}", "--corpus", f"folder={folder}", "--corpus", "phantom=20")
    checked(run, "isic2017", pairs)
    rows = Run(run).table("corpus").read(["source_id", "outcome", "split"]).to_pylist()
    kept = {row["source_id"]: row for row in rows}
    assert all(kept[original]["outcome"] == "accepted" and kept[original]["split"] == "test" for original, _ in pairs)


def test_an_embedding_keeps_what_it_cannot_tell_apart_in_one_group_and_rejects_nothing(
    tmp_path: Path, ingest: Ingest, image_model: Path
) -> None:
    folder, seed = tmp_path / "images", load(None).corpus.phantoms.seed
    own_images(folder)
    drawn = {f"phantom-{seed}-{d.index:06d}": d.image for d in phantom.draw_many(seed, range(3), SIZE)}
    pairs = plant(folder, drawn)  # encoded again, of 224 px, flipped
    run = ingest(
        "run", "--corpus", "phantom=12", "--corpus", f"folder={folder}", "--set", f"corpus.phantoms.size={SIZE}",
        "--set", f"corpus.embedding={image_model}", "--set", "corpus.min_cosine=0.9999",
        "--set", "corpus.min_likeness=1.0",  # so that the embedding alone finds them
    )  # fmt: skip
    assert Run(run).tables()[:5] == ["listing", "intake", "embeddings", "copies", "corpus"]
    rows = {row["source_id"]: row for row in Run(run).table("corpus").read().to_pylist()}
    assert {row["outcome"] for row in rows.values()} == {"accepted"}
    for original, copy in pairs[:2]:
        assert rows[original]["group_id"] == rows[copy]["group_id"]
        assert rows[original]["split"] == rows[copy]["split"]
    assert {copy["kind"] for copy in Run(run).table("copies").read().to_pylist()} == {"embedding"}
    report = json.loads((run / "report/corpus.json").read_text())
    assert report["copies"]["kinds"]["embedding"] >= 2
    assert Run(run).verify() == []
