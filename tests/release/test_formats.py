from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from tiny_run import TinyRun, build, write_lab

from factory import taxonomy
from factory.images import read_png
from factory.recipe import GateSection, ReleaseSection
from factory.release import card, formats, licences
from factory.release.marking import read_mark
from factory.release.publish import Release, publish

SECTION = ReleaseSection(name="tiny <set>", shard_bytes=120_000)


@pytest.fixture(scope="module")
def release(run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return publish(run.path, tmp_path_factory.mktemp("out") / "release", SECTION)


def _accepted(run: TinyRun) -> list[dict]:
    return [row for row in run.samples if row["outcome"] == "accepted"]


def _rows(release: Release) -> list[dict]:
    return [row for name in release.shards.files for row in pq.read_table(release.out / name).to_pylist()]


def test_a_release_holds_every_accepted_sample_once_and_no_other(run: TinyRun, release: Release) -> None:
    assert [row["sample_id"] for row in _rows(release)] == [row["sample_id"] for row in _accepted(run)]
    assert release.shards.rows == len(_accepted(run)) == 28


def test_released_pixels_are_the_samples_and_carry_the_mark(run: TinyRun, release: Release) -> None:
    for ours, theirs in zip(_rows(release), _accepted(run), strict=True):
        for column in ("image", "mask"):
            assert np.array_equal(read_png(ours[column]["bytes"]), read_png(theirs[column]["bytes"]))
            said = read_mark(ours[column]["bytes"])
            assert said is not None and said["row_id"] == theirs["sample_id"] and said["seed"] == str(theirs["seed"])
            assert ours[column]["path"].startswith("synthetic-")


def test_rows_say_what_they_are(run: TinyRun, release: Release) -> None:
    for ours, theirs in zip(_rows(release), _accepted(run), strict=True):
        assert taxonomy.DIAGNOSES[ours["diagnosis"]] == theirs["diagnosis"]
        assert ours["malignant"] is (theirs["diagnosis"] == "melanoma")
        assert ours["synthetic"] is True and ours["licence"] == "Apache-2.0"
        assert (ours["prompt"], ours["parents"]) == (theirs["prompt"], theirs["parents"])


def test_no_shard_and_no_row_group_is_larger_than_asked(release: Release) -> None:
    assert len(release.shards.files) > 2
    total = len(release.shards.files)
    for number, (name, (rows, size)) in enumerate(release.shards.files.items()):
        assert name == f"data/train-{number:05d}-of-{total:05d}.parquet"
        assert size == (release.out / name).stat().st_size <= SECTION.shard_bytes
        assert pq.read_metadata(release.out / name).num_rows == rows


def test_one_large_shard_has_several_row_groups_below_the_limit(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "ROW_GROUP_BYTES", 100_000)
    shards = formats.write_parquet(run.path, tmp_path / "out", ReleaseSection())
    (name,) = shards.files
    metadata = pq.read_metadata(tmp_path / "out" / name)
    assert metadata.num_row_groups > 2
    assert max(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)) < 101_000


def test_datasets_loads_the_release_as_image_image_and_class_label(
    run: TinyRun, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(str(release.out), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(loaded) == 28
    assert isinstance(loaded.features["image"], datasets.Image) and isinstance(loaded.features["mask"], datasets.Image)
    assert loaded.features["diagnosis"] == datasets.ClassLabel(names=list(taxonomy.DIAGNOSES))
    assert loaded[0]["image"].size == (64, 64) and loaded[0]["mask"].mode == "1"
    assert loaded.features["diagnosis"].int2str(loaded[1]["diagnosis"]) == _accepted(run)[1]["diagnosis"]
    assert loaded[1]["parents"] == _accepted(run)[1]["parents"]


def test_shards_alone_load_too(run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    formats.write_parquet(run.path, tmp_path / "out", SECTION)
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert isinstance(loaded.features["mask"], datasets.Image) and len(loaded) == 28


def test_the_card_has_a_header_that_matches_the_shards(release: Release) -> None:
    datasets = pytest.importorskip("datasets")
    text = (release.out / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    schema = pq.read_schema(release.out / next(iter(release.shards.files)))
    features = datasets.Features.from_arrow_schema(schema)
    assert datasets.Features._from_yaml_list(header["dataset_info"]["features"]) == features
    assert header["license"] == "apache-2.0" and header["size_categories"] == ["n<1K"]
    assert header["dataset_info"]["splits"][0]["num_examples"] == 28


def test_the_card_tells_the_funnel_the_licence_and_what_was_not_measured(release: Release) -> None:
    text = (release.out / "README.md").read_text()
    for line in (
        "| planned | 44 |", "| rejected: low iou | 4 |", "| rejected: empty mask | 4 |",
        "| failed: out of memory | 4 |",
        "| not made yet | 4 |", "| accepted | 28 |", "| **released** | **28** |", "| phantom | corpus | Apache-2.0 |",
        "Not measured for this release.", "# tiny \\<set\\>",
    ):  # fmt: skip
        assert line in text


@pytest.mark.parametrize(
    ("rows", "word"), [(999, "n<1K"), (1000, "1K<n<10K"), (40_000, "10K<n<100K"), (10**6, "1M<n<10M"), (10**8, "n>10M")]
)
def test_the_size_category_is_the_hubs_word(rows: int, word: str) -> None:
    assert card.size_category(rows) == word


def test_a_licence_the_hub_does_not_know_is_given_by_name() -> None:
    verdict = licences.join([licences.Parent("corpus", "a", "research only")])
    header = card.card_header(SECTION, formats.Shards({"data/a": (3, 9)}, {}), verdict)
    assert (header["license"], header["license_name"]) == ("other", "research-only")


def test_the_manifest_seals_every_file_and_a_change_is_found(fresh_run: TinyRun, tmp_path: Path) -> None:
    out = publish(fresh_run.path, tmp_path / "out", SECTION).out
    listed = json.loads((out / "_MANIFEST.json").read_text())
    assert set(listed["files"]) == {p.relative_to(out).as_posix() for p in out.rglob("*.*")} - {"_MANIFEST.json"}
    assert listed["rows"] == 28 and formats.verify(out) == []
    (out / "README.md").write_text("edited")
    (out / "extra.txt").write_text("")
    (out / sorted(listed["files"])[1]).unlink()
    assert sorted(p.split(" ")[1:3] for p in formats.verify(out)) == [
        ["has", "changed"],
        ["is", "listed"],
        ["is", "there"],
    ]
    (out / "_MANIFEST.json").unlink()
    assert "not a sealed release" in formats.verify(out)[0]


def test_releasing_the_same_again_changes_nothing_and_another_is_refused(run: TinyRun, release: Release) -> None:
    before = (release.out / "_MANIFEST.json").stat().st_mtime_ns
    assert publish(run.path, release.out, SECTION).shards == release.shards
    assert formats.write_parquet(run.path, release.out, SECTION) == release.shards
    assert (release.out / "_MANIFEST.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="out must be a new or empty directory"):
        publish(run.path, release.out, ReleaseSection(name="another"))


def test_two_releases_of_one_run_have_the_same_bytes(run: TinyRun, release: Release, tmp_path: Path) -> None:
    again = publish(run.path, tmp_path / "again", SECTION)
    for name in (*release.shards.files, "README.md", "_MANIFEST.json"):
        assert (again.out / name).read_bytes() == (release.out / name).read_bytes()


def test_a_run_with_nothing_accepted_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    empty = build(tmp_path / "failed", count=10, only="failed")
    with pytest.raises(ValueError, match="must hold an accepted sample to release"):
        formats.write_parquet(empty.path, tmp_path / "out", SECTION)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_stricter_policy_applied_again_leaves_samples_out_and_the_card_says_so(run: TinyRun, tmp_path: Path) -> None:
    strict = [row for row in _accepted(run) if row["iou"] >= 0.825]
    release = publish(run.path, tmp_path / "out", SECTION, gate=GateSection(min_iou=0.825, shift_tolerance=0.0))
    assert [row["sample_id"] for row in _rows(release)] == [row["sample_id"] for row in strict]
    assert release.shards.left_out == 28 - len(strict) > 0
    card_text = (release.out / "README.md").read_text()
    assert f"| left out by a stricter policy at release | {28 - len(strict)} |" in card_text
    assert f"| **released** | **{len(strict)}** |" in card_text


def test_near_copies_that_were_measured_are_on_the_card(fresh_run: TinyRun, tmp_path: Path) -> None:
    write_lab(fresh_run.path)
    text = (publish(fresh_run.path, tmp_path / "out", SECTION).out / "README.md").read_text()
    assert "1 of 28 checked samples" in text and "the 99.9th percentile" in text


def test_commercial_use_is_refused_before_anything_is_written(fresh_run: TinyRun, tmp_path: Path) -> None:
    base = licences.Parent("weights", "someone's base", "CC-BY-NC-4.0")
    section = ReleaseSection(allow="commercial")
    with pytest.raises(ValueError, match="someone's base"):
        publish(fresh_run.path, tmp_path / "out", section, weights=[base])
    assert not (tmp_path / "out").exists()
    assert publish(fresh_run.path, tmp_path / "out", section).verdict.commercial


def test_an_accepted_sample_without_an_image_is_refused(tmp_path: Path) -> None:
    run = build(tmp_path / "run", count=10, without_image=2)
    with pytest.raises(ValueError, match="must hold an image, got none"):
        formats.write_parquet(run.path, tmp_path / "out", SECTION)


def test_released_images_open_in_pillow_with_their_packet(release: Release) -> None:
    with Image.open(io.BytesIO(_rows(release)[0]["image"]["bytes"])) as image:
        assert "trainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]


@pytest.mark.parametrize(
    ("generator", "has_mask", "words"),
    [
        ("joint", True, "drew image and mask of each planned sample"), ("inpaint", True, "inside each planned mask"),
        ("flux", False, "A text-conditioned rectified flow"),
        ("class_conditional", False, "conditioned on the diagnosis alone, and on no words"),
    ],
)  # fmt: skip
def test_the_card_says_how_samples_of_each_generator_came_to_be(
    release: Release, run: TinyRun, generator: str, has_mask: bool, words: str
) -> None:
    from dataclasses import replace

    from factory.release.counts import Funnel
    from factory.release.provenance import run_facts
    from factory.storage import open_store

    facts = run_facts(open_store(str(run.path)))
    gate = {"min_iou": 0.7, "max_hausdorff_px": 9.0, "theta_by_area": [[0.02, 0.6], [1.0, 0.75]]}
    told = facts.recipe | {"plan": {"generator": generator}, "gate": gate}
    funnel = Funnel(planned=1, accepted=1, rejected={}, failed={})
    text = card.render_card(replace(facts, recipe=told), SECTION, release.shards, release.verdict, funnel)
    assert words in text and ("its lesion mask" in text) == ('["mask"]' in text) == has_mask
    assert ("There are no masks" in text) == (not has_mask) == ("expected IoU" not in text)
    assert "boundary distance (px) at most 9" in text
    assert ("0.6 up to 0.02 of the image, 0.75 up to 1 of the image" in text) == has_mask
