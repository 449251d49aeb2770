"""What people really pass: every bad file gets a reason and costs nothing else, every bad request one sentence."""

from __future__ import annotations

import errno
import io
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from factory import images, line
from factory.corpora.phantom import write_phantoms
from factory.run import Run
from factory.storage import StorageError

ROOT = Path(__file__).resolve().parent.parent
Command = Callable[..., Any]
GOOD = 6


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few bytes that declares 3.6 billion pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def gif() -> bytes:
    frames = [Image.fromarray(noise(40, 40, seed=seed)) for seed in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)


JPEG = encoded(Image.fromarray(noise(48, 48, 3)), "JPEG", quality=90)
MASK = images.encode_mask(np.pad(np.ones((20, 20), bool), 10))
# File -> (bytes, its outcome, its reason).
FILES: dict[str, tuple[bytes, str, str | None]] = {
    "melanoma/truncated.jpg": (JPEG[: len(JPEG) * 2 // 3], "failed", "truncated"),
    "melanoma/zero.png": (b"", "failed", "empty_file"),
    "melanoma/notes.jpg": (b"these are not pixels, they are words", "failed", "not_an_image"),
    "melanoma/moving.jpg": (gif(), "failed", "not_an_allowed_format"),
    "melanoma/bomb.png": (bomb(), "failed", "bomb"),
    "melanoma/small.png": (encoded(Image.fromarray(noise(20, 40, 3)), "PNG"), "rejected", "too_small"),
    "nevus/alone_mask.png": (MASK, "failed", "mask_without_image"),
    "nevus/wide.png": (encoded(Image.fromarray(noise(40, 80, 3)), "PNG"), "failed", "mask_size"),
    "nevus/wide_mask.png": (MASK, "", None),
    "nevus/sixteen.png": (
        encoded(Image.fromarray(noise(40, 40).astype(np.uint16) * 257), "PNG"), "accepted", None,
    ),
    "nevus/print.jpg": (encoded(Image.fromarray(noise(40, 40, 4), mode="CMYK"), "JPEG"), "accepted", None),
    "nevus/maskless.jpg": (JPEG, "accepted", None),
    "seborrheic_keratosis/copy.jpg": (JPEG, "rejected", "exact_duplicate"),
    "nevus/.hidden.jpg": (b"", "", None),
    "nevus/readme.txt": (b"", "", None),
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good phantoms with masks among everything that is wrong with images."""
    root = tmp_path_factory.mktemp("corpus") / "lesions"
    write_phantoms(root, GOOD, 32, seed=3)
    for name, (content, _, _) in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def ingested(
    corpus: Path, tmp_path_factory: pytest.TempPathFactory, factory_command: Command, ray_cluster: None
) -> Path:
    """A run with that corpus ingested by the command; made once per session, to be copied before it is changed."""
    run = tmp_path_factory.getbasetemp() / "ingested"
    if not run.exists():
        done = factory_command("ingest", "--recipe", "smoke", "--run", run, "--corpus", f"folder={corpus}")
        assert done.status == 0, done.err
        assert done.out.rstrip().endswith(str(run))
    return run


def test_bad_files_each_get_their_reason_and_the_good_ones_go_on(ingested: Path, corpus: Path) -> None:
    rows = {row["source_id"]: row for row in Run(ingested).table("corpus").read().to_pylist()}
    for name, (_, outcome, reason) in FILES.items():
        if outcome:
            assert (rows[name]["outcome"], rows[name]["reason"]) == (outcome, reason), name
        else:
            assert name not in rows
    good = [row for name, row in rows.items() if name not in FILES]
    assert len(good) == GOOD
    assert {row["outcome"] for row in good} == {"accepted"} and all(row["mask"] for row in good)
    assert rows["nevus/maskless.jpg"]["mask"] is None
    for row in rows.values():
        assert (row["image"] is not None) == (row["outcome"] == "accepted") or row["reason"] == "exact_duplicate"


def test_in_is_accepted_and_rejected_and_failed(ingested: Path) -> None:
    run = Run(ingested)
    wanted = Counter({"accepted": GOOD}) + Counter(outcome for _, outcome, _ in FILES.values() if outcome)
    assert run.table("corpus").counts() == dict(wanted)
    listed = len(run.table("listing").read())
    assert listed == sum(wanted.values()) == run.table("corpus").sealed().rows == run.table("intake").sealed().rows


def test_the_converted_ones_have_the_pixels_they_should(ingested: Path, corpus: Path) -> None:
    rows = {row["source_id"]: row for row in Run(ingested).table("corpus").read().to_pylist()}
    stored = images.read_png(rows["nevus/sixteen.png"]["image"]["bytes"])
    # Values 257 v hold the byte v twice; then 40 px are averaged to 32.
    wanted = images.resized(np.repeat(noise(40, 40)[..., None], 3, axis=2), 32, 32)
    assert np.array_equal(stored, wanted)
    with Image.open(corpus / "nevus/print.jpg") as picture:
        wanted = images.resized(np.asarray(picture.convert("RGB")), 32, 32)
    found = images.read_png(rows["nevus/print.jpg"]["image"]["bytes"])
    assert np.abs(found.astype(int) - wanted).mean() < 1


# ---- verify


@pytest.fixture
def damaged(ingested: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    shutil.copytree(ingested, tmp_path / "copy")
    return tmp_path / "copy"


def test_verify_is_content_with_what_was_sealed(damaged: Path, factory_command: Command) -> None:
    done = factory_command("verify", "--run", damaged)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("verified    listing, intake, copies, corpus")


@pytest.mark.parametrize("harm", ["truncated", "removed", "edited"])
def test_verify_names_the_part_that_is_not_what_was_sealed(damaged: Path, factory_command: Command, harm: str) -> None:
    part = damaged / "corpus/part-000001.parquet"
    data = part.read_bytes()
    part.unlink()
    if harm == "truncated":
        part.write_bytes(data[:-7])
    if harm == "edited":
        middle = len(data) // 2
        part.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    done = factory_command("verify", "--run", damaged)
    assert done.status == 1
    assert f"corpus part 1 was {harm}" in done.out
    assert "part 0" not in done.out and "make it again" in done.out


def test_verify_of_a_run_that_holds_nothing_says_so(tmp_path: Path, factory_command: Command) -> None:
    done = factory_command("verify", "--run", tmp_path)
    assert (done.status, done.out.strip()) == (0, "verified    nothing is sealed yet")


# ---- requests that are wrong


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "wrong.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("gate:\n  min_uio: 0.7\n", ["line 2", "gate.min_uio", "did you mean min_iou?"]),
        ("plan:\n  count: thirty\n", ["line 2", "plan.count", "'thirty'"]),
        ("plan:\n  count: 40\n  count: 50\n", ["line 3", "plan.count"]),
        ("plan:\n  count: 5\n", ["plan", "18 cells, got count 5"]),
        ("gate:\n  min_uio: 1\nplan:\n  size: 33\n  guidance: no\n", ["3 mistakes", "line 2", "line 4", "line 5"]),
        ("- plan\n- gate\n", ["wrong.yaml has 1 mistake"]),
        ("plan: {count: [\n", ["wrong.yaml has 1 mistake", "line"]),
    ],
    ids=["unknown key", "wrong type", "duplicate key", "impossible quota", "three at once", "a list", "not YAML"],
)
def test_a_wrong_recipe_is_one_message_with_every_mistake_by_line(
    tmp_path: Path, factory_command: Command, text: str, sentences: list[str]
) -> None:
    done = factory_command("plan", "--run", tmp_path / "run", "--recipe", recipe_file(tmp_path, text))
    assert done.status == 2 and done.out == ""
    for sentence in sentences:
        assert sentence in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("number", "status"), [(errno.ENOSPC, 1), (errno.EIO, 1), (errno.EACCES, 2), (errno.ENOENT, 2)]
)
def test_what_the_machine_lacks_exits_with_1_and_what_was_asked_wrongly_with_2(
    tmp_path: Path, factory_command: Command, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise StorageError("one sentence", number)

    monkeypatch.setattr(line, "plan", fail)
    done = factory_command("plan", "--run", tmp_path / "run")
    assert (done.status, done.out, done.err) == (status, "", "factory: one sentence\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["ingest", "--corpus", "folder=/no/such/folder"], "must be a folder of folders named after diagnoses, got"),
        (["ingest", "--corpus", "isic2017=/no/such/folder"], "corpus.sources.isic2017 must be a folder that holds"),
        (["ingest", "--corpus", "ham10000=/tmp"], "corpus.sources"),
        (["ingest", "--corpus", "/data/isic2017"], "--corpus must be NAME=PATH, got '/data/isic2017'; for example"),
        (["ingest", "--corpus", "folder="], "--corpus must be NAME=PATH, got 'folder='"),
        (["plan", "--recipe", "smoek"], "smoke"),
        (["plan", "--set", "plan.cuont=20"], "plan.cuont"),
        (["plan", "--set", "plan.count"], "plan.count"),
        (["evaluate", "wroth"], "worth"),
        (["fit", "lara"], "lora"),
        (["demo", "--until", "sinthesize"], "synthesize"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_leaves_no_recipe_behind(
    tmp_path: Path, factory_command: Command, arguments: list[str], sentence: str
) -> None:
    where = ["--out" if arguments[0] == "demo" else "--run", tmp_path / "run"]
    done = factory_command(*arguments, *where)
    assert done.status == 2, done.err
    assert sentence in done.err and "Traceback" not in done.err
    assert not (tmp_path / "run/run.json").exists() and not (tmp_path / "run/_LOCK.json").exists()


def test_a_wrong_path_is_not_remembered_by_the_next_command(tmp_path: Path, factory_command: Command) -> None:
    assert factory_command("plan", "--run", tmp_path, "--recipe", "smoke").status == 0
    assert factory_command("ingest", "--run", tmp_path, "--corpus", "folder=/no/such/folder").status == 2
    again = factory_command("ingest", "--run", tmp_path, "--corpus", "isic2017=/no/such/place")
    assert again.status == 2
    assert "isic2017" in again.err and "/no/such/folder" not in again.err


def test_what_the_command_line_itself_refuses_exits_with_two(factory_command: Command) -> None:
    assert factory_command("plan").status == 2  # no --run
    assert factory_command("plan", "--run", "x", "--count", "many").status == 2
    assert factory_command("synthesise").status == 2
    assert factory_command("--help").status == 0


def test_a_failure_that_only_we_can_mend_exits_with_one_and_shows_where(
    tmp_path: Path, factory_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Run) -> list[str]:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(Run, "verify", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):  # Python prints it and exits with 1
        factory_command("verify", "--run", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["status", "--run", "{}"], 0),
        (["recipe", "smoke"], 0),
        (["caption", "--run", "{}"], 2),
        (["recipe", "nothing-of-that-name"], 2),
    ],
)
def test_the_installed_command_ends_with_its_status(tmp_path: Path, arguments: list[str], status: int) -> None:
    command = [sys.executable, "-m", "factory.cli", *(text.format(tmp_path / "run") for text in arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert (done.stderr != "") == (status != 0)
    assert "Traceback" not in done.stderr


def test_verify_as_a_process_exits_with_one(damaged: Path) -> None:
    (damaged / "corpus/part-000000.parquet").unlink()
    command = [sys.executable, "-m", "factory.cli", "verify", "--run", str(damaged)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "corpus part 0 was removed" in done.stdout
