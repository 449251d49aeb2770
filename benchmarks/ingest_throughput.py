"""Images per second of `factory ingest`, beside a bare Pillow loop on as many processes and img2dataset over loopback.

All read the same files in the same run, in turn, for several rounds; a ratio is the median over the rounds. Counted is
the pass over the images (the table `intake`) from when a quarter of them is committed until the last part: starting Ray
and its actors, and what needs all rows (copies, settle), are told beside it, in seconds. The loops and img2dataset are
counted from when their processes are up. The files are in the page cache for all.

What each does, per image:

    ingest         `factory ingest` as a command: read, caps, decode, orient, RGB, reduce to the largest rung of
                   128, 256 and 512 that is not above the short side (nothing is enlarged; smaller rungs are had by
                   reducing it later), the mask likewise, SHA-256 of the pixels, keys of up to 7 frames for finding
                   copies, black border, vignette, skin angle, PNG of both, a row, Parquet parts that are synced and
                   put in place if absent.
    same_outputs   Pillow: read, decode, orient, RGB, that same rung, the mask likewise, SHA-256 of the pixels, a
                   pHash of 64 bits, PNG of both at Pillow's default, Parquet parts that are synced and renamed.
    fast_png       as `same_outputs`, with PNG at level 1: larger files, in less than a third of the time.
    three_scales   as `same_outputs`, with every rung that fits stored, each with its mask and its hash.
    with_measures  as `same_outputs`, with ingest's own measurements in place of the pHash.
    stage          ingest's own stage and its own commit, in bare processes: what is over it is Ray and moving rows.
    img2dataset    its own downloader on a loopback server, `resize_mode=keep_ratio` to the rung that ingest stores
                   most of the files at, nothing enlarged, `output_format=parquet compute_hash=sha256`, as PNG
                   (level 1) and as JPEG, its default. It gets the images alone: no masks, nothing turned upright.

`same_outputs` is the plain reading of "a Pillow loop that does the same work": it stores what ingest stores and
describes an image as cheaply as is usual. Nine tenths of it are zlib at Pillow's level, which ingest does not use, so
`fast_png` stands beside it under the same goal, and is the harder one. `three_scales` stores more than ingest does;
`with_measures` and `stage` ask what the machinery costs. The bytes that each stores are told. img2dataset is timed
from its first shard's start to its last one's end, by its own statistics, with the number of threads that was fastest
here.

    python benchmarks/ingest_throughput.py [--isic2017 PATH] [--count 2000] [--rounds 3] [--img2dataset-python PATH]

img2dataset is no dependency of this project: `uv venv --python 3.11 i2d && uv pip install --python i2d/bin/python
img2dataset` makes what `--img2dataset-python i2d/bin/python` wants. Without it that contender is left out, and the
result says so.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import img2dataset_peer as peer
import ingest_phases as phases
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps
from scipy.fft import dct

from factory import corpora, phantom, records
from factory.corpora.base import Entry
from factory.quality.attributes import estimate_mask
from factory.quality.copies import describe, packed
from factory.quality.skin_tone import ita, vignette_mask
from factory.recipe import Recipe, load
from factory.run import Run
from factory.stages.curate import CurateImages, black_border, measured

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/ingest_throughput.json"
PROCESSES = os.cpu_count() or 1  # of every contender; ingest takes all cores
SCALES = (128, 256, 512)
LEAST_UNITS = 4 * PROCESSES
PNG_LEVEL = 6  # Pillow's default
_barrier: Any = None  # where the processes of a pool meet before the clock starts
LOOPS = ("same_outputs", "fast_png", "three_scales", "with_measures")
BYTES_PER_IMAGE = 2 * 2**20  # more than a file, its stored forms and its share of two tables take at 1024 px
GOALS = {"same_outputs": 0.85, "fast_png": 0.85, "img2dataset_png": 1.5, "img2dataset_jpg": 1.5}

# ------------------------------------------------------------------------------------------------------- the files

SIZES = ((600, 450), (600, 450), (1024, 768), (640, 480), (450, 600))  # of phantom files, in turn
TURNED = 8  # every so many-th is stored lying on its side, with the EXIF tag that says so


def drawn_files(root: Path, *, count: int) -> str:
    """Phantoms as JPEG files of quality 90 with PNG masks, laid out for the reader `folder`, which is returned."""
    with get_context("spawn").Pool(PROCESSES) as pool:
        pool.starmap(_draw_file, [(root, index) for index in range(count)], chunksize=16)
    return "folder"


def _draw_file(root: Path, index: int) -> None:
    drawn, size = phantom.draw(0, index, 512), SIZES[index % len(SIZES)]
    folder, name = root / drawn.diagnosis, f"phantom-{index:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    picture = ImageOps.fit(Image.fromarray(drawn.image), size, Image.Resampling.LANCZOS)
    tags = Image.Exif()
    if index % TURNED == 0:
        picture, tags[0x0112] = picture.transpose(Image.Transpose.ROTATE_90), 6  # upright again when turned clockwise
    picture.save(folder / f"{name}.jpg", quality=90, exif=tags)
    mask = ImageOps.fit(Image.fromarray(drawn.mask).convert("L"), size, Image.Resampling.NEAREST)
    mask.convert("1").save(folder / f"{name}_mask.png")


def linked_files(root: Path, *, isic2017: Path, count: int) -> str:
    """The first `count` images of the challenge's published layout, as links; the reader's name is returned."""
    recipe = load(None, [f"corpus.sources.isic2017={isic2017}"])
    for entry in islice(corpora.list_entries(recipe.corpus), count):
        for file in (entry.image, entry.mask):
            if file is not None:
                target = root / file.parent.name / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(file.resolve())
    for table in sorted(isic2017.glob("*_Part3_GroundTruth.csv")):
        _write_some_labels(table, root)
    return "isic2017"


def _write_some_labels(table: Path, root: Path) -> None:
    """A label table with the rows of the linked images alone: a label without an image would be a failed row."""
    images = root / table.name.replace("_Part3_GroundTruth.csv", "_Data")
    head, *rows = csv.reader(table.read_text().splitlines())
    if images.is_dir():
        with (root / table.name).open("w", newline="") as file:
            csv.writer(file).writerows([head, *(row for row in rows if (images / f"{row[0]}.jpg").exists())])


def listed(recipe: Recipe) -> list[Entry]:
    """The entries that every contender reads. Their bytes are read once, so that no contender finds them cold."""
    entries = list(corpora.list_entries(recipe.corpus))
    for entry in entries:
        for file in (entry.image, entry.mask):
            if file is not None:
                file.read_bytes()
    return entries


# ------------------------------------------------------------------------------------------------------- contenders


def ingest(work: Path, source: str, unit_rows: int, count: int) -> dict[str, Any]:
    """The command, with every row accounted for."""
    command = [sys.executable, "-m", "factory.cli", "ingest", "--run", str(work), "--corpus", source]
    began = time.time()
    done = subprocess.run(
        [*command, "--set", f"corpus.unit_rows={unit_rows}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"`{' '.join(command)}` must succeed, but ended with {done.returncode}: {done.stderr[-2000:]}")
    sealed = phases.manifest(work, "corpus")
    if sealed["rows"] != count:
        raise SystemExit(f"the corpus must hold all {count} rows, got {sealed['rows']}; run `factory verify` on {work}")
    spent = phases.seconds(work, began, ended)
    return {
        "images_per_s": phases.steady_rate(phases.commits(work, "intake")), "wall_s": ended - began,
        "phases_s": spent, "outcomes": sealed["outcomes"], "bytes": phases.stored_bytes(work / "intake"),
    }  # fmt: skip


def bare(task: Callable[..., None], units: Sequence[tuple[Any, ...]], count: int, out: Path) -> dict[str, Any]:
    """Units on bare processes, each taking the next one when it is free. They are up before the clock starts."""
    began = time.perf_counter()
    context = get_context("spawn")
    with context.Pool(PROCESSES, _meet_at, (context.Barrier(PROCESSES),)) as pool:
        pool.map(_met, range(PROCESSES), chunksize=1)
        started = time.perf_counter()
        pool.starmap(task, units, chunksize=1)
        ended = time.perf_counter()
    spent = {"images_per_s": count / (ended - started), "wall_s": ended - began}
    return spent | {"bytes": phases.stored_bytes(out)}


def _meet_at(barrier: Any) -> None:
    global _barrier
    _barrier = barrier


def _met(_: int) -> None:
    _barrier.wait()  # so that each process takes one of these


def stage_unit(uri: str, recipe: Recipe, unit: int, entries: list[Entry]) -> None:
    """What `IngestUnit` and `CommitTable` of `factory/runtime` do, in one process."""
    Run(uri).table("intake").commit(unit, records.rows_to_table("intake", CurateImages(recipe.corpus)(entries)))


def loop_unit(folder: Path, variant: str, unit: int, entries: list[Entry]) -> None:
    """One Parquet shard of the Pillow loop, durable once it has its name."""
    shard, staged = folder / f"part-{unit:06d}.parquet", folder / f"{unit}.tmp"
    pq.write_table(pa.Table.from_pylist([loop_row(variant, entry) for entry in entries]), staged)
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    staged.rename(shard)


def loop_row(variant: str, entry: Entry) -> dict[str, Any]:
    """What the loop keeps of one image; see the table at the top."""
    with Image.open(entry.require_image()) as picture:
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    mask = None
    if entry.mask is not None:
        with Image.open(entry.mask) as picture:
            mask = picture.convert("L")
    rungs = [rung for rung in SCALES if rung <= min(upright.size)]
    stored = [reduced(upright, mask, rung) for rung in (rungs if variant == "three_scales" else rungs[-1:])]
    row: dict[str, Any] = {
        "name": entry.source_id,
        "label": entry.label,
        "width": upright.width,
        "height": upright.height,
    }
    level = 1 if variant == "fast_png" else PNG_LEVEL
    row["pictures"] = [kept(rgb, lesion, level) for rgb, lesion in stored]
    return row | (measures(*stored[-1]) if variant == "with_measures" else {"phash": phash(stored[-1][0])})


def reduced(rgb: Image.Image, mask: Image.Image | None, rung: int) -> tuple[Image.Image, Image.Image | None]:
    """Image and one-bit mask with `rung` as their short side. Box filters average areas, as ingest does."""
    shrink = rung / min(rgb.size)
    size = (round(rgb.width * shrink), round(rgb.height * shrink))
    rgb = rgb.resize(size, Image.Resampling.BOX)
    if mask is None:
        return rgb, None
    return rgb, mask.resize(size, Image.Resampling.BOX).point(lambda grey: 255 * (grey >= 128)).convert("1")


def kept(rgb: Image.Image, mask: Image.Image | None, level: int) -> dict[str, Any]:
    return {
        "sha256": hashlib.sha256(rgb.tobytes()).hexdigest(), "image": png(rgb, level),
        "mask": None if mask is None else png(mask, level),
    }  # fmt: skip


def png(picture: Image.Image, level: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=level)
    return out.getvalue()


def phash(rgb: Image.Image) -> bytes:
    """64 bits: the lowest 8 x 8 frequencies of 32 x 32 grey pixels, over their median (Zauner 2010)."""
    grey = np.asarray(rgb.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float64)
    low = dct(dct(grey, axis=0), axis=1)[:8, :8]
    return np.packbits(low > np.median(low)).tobytes()


def measures(picture: Image.Image, mask: Image.Image | None) -> dict[str, Any]:
    """What ingest measures of every image, by its own functions."""
    small = measured(np.asarray(picture))
    side = (small.shape[1], small.shape[0])
    lesion = estimate_mask(small) if mask is None else np.asarray(mask.resize(side))
    return {
        "copy_keys": packed(describe(small)), "black_border": black_border(small),
        "vignette": float(vignette_mask(small).mean()), "ita": ita(small, lesion),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the rounds

Contender = Callable[[Path], dict[str, Any]]


def fresh(contender: Contender, work: Path) -> dict[str, Any]:
    """What a contender does in a folder that is gone afterwards."""
    try:
        return contender(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def contenders(recipe: Recipe, source: str, entries: list[Entry]) -> dict[str, Contender]:
    """Ingest and the loops, each from the same entries in the same units."""
    rows, count = recipe.corpus.unit_rows, len(entries)
    units = [(number, entries[start : start + rows]) for number, start in enumerate(range(0, count, rows))]

    def looping(variant: str) -> Contender:
        def run(work: Path) -> dict[str, Any]:
            work.mkdir()
            return bare(loop_unit, [(work, variant, *unit) for unit in units], count, work)

        return run

    return {
        "ingest": lambda work: ingest(work, source, rows, count),
        **{variant: looping(variant) for variant in LOOPS},
        "stage": lambda work: bare(stage_unit, [(str(work), recipe, *unit) for unit in units], count, work / "intake"),
    }


def measure(wanted: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All rounds, over files made or linked below `work`."""
    files = work / "files"
    files.mkdir()
    make = drawn_files if wanted.isic2017 is None else partial(linked_files, isic2017=wanted.isic2017)
    source = f"{make(files, count=wanted.count)}={files}"
    recipe = load(None, [f"corpus.sources.{source}", f"corpus.unit_rows={wanted.unit_rows}"])
    entries, out, before = listed(recipe), work / "out", phases.machine()
    count = len(entries)
    racing, absent, setup = contenders(recipe, source, entries), peer.why_not(wanted.img2dataset_python), None
    with peer.served([entry.require_image() for entry in entries]) as address:
        if absent is None:
            python = wanted.img2dataset_python
            download = partial(peer.stored, python=python, address=address, side=commonest_rung(entries))
            tried = peer.tuned(out, partial(download, count=min(count, 512)), wanted.img2dataset_threads)
            best = {encoding: max(rates, key=rates.__getitem__) for encoding, rates in tried.items()}
            racing |= {
                f"img2dataset_{encoding}": partial(download, count=count, encoding=encoding, threads=threads)
                for encoding, threads in best.items()
            }
            setup = {
                "version": peer.version_of(python), "image_size": commonest_rung(entries), "threads": best,
                "images_per_s_by_threads": tried,
            }  # fmt: skip
        rounds = [{name: fresh(run, out) for name, run in racing.items()} for _ in range(wanted.rounds)]
    return {
        "machine": before, "files": described_files(source, entries), "unit_rows": wanted.unit_rows,
        "processes": PROCESSES, "rounds": wanted.rounds, **summary(rounds, count),
        "img2dataset": setup or {"left_out": absent},
    }  # fmt: skip


def commonest_rung(entries: list[Entry]) -> int:
    """The rung that ingest stores most of the files at."""
    rungs = []
    for entry in entries:
        with Image.open(entry.require_image()) as picture:
            rungs.append(max(rung for rung in SCALES if rung <= min(picture.size)))
    return statistics.mode(rungs)


def described_files(source: str, entries: list[Entry]) -> dict[str, Any]:
    sizes = [entry.require_image().stat().st_size for entry in entries]
    return {
        "layout": source.partition("=")[0], "images": len(entries), "mean_bytes": round(statistics.mean(sizes)),
        "masks": sum(entry.mask is not None for entry in entries),
    }  # fmt: skip


def summary(rounds: list[dict[str, dict[str, Any]]], count: int) -> dict[str, Any]:
    """Medians over the rounds, and of each round's ratio of ingest to a contender."""
    rate = {name: [done[name]["images_per_s"] for done in rounds] for name in rounds[0]}
    ratio = {
        name: round(statistics.median(ours / theirs for ours, theirs in zip(rate["ingest"], rates, strict=True)), 3)
        for name, rates in rate.items()
        if name != "ingest"
    }
    spent = [done["ingest"]["phases_s"] for done in rounds]
    return {
        "images_per_s": {name: round(statistics.median(rates), 1) for name, rates in rate.items()},
        "images_per_s_by_round": {name: [round(one, 1) for one in rates] for name, rates in rate.items()},
        "wall_s": {name: round(statistics.median(done[name]["wall_s"] for done in rounds), 1) for name in rate},
        "stored_bytes_per_image": {name: round(done["bytes"] / count) for name, done in rounds[0].items()},
        "ingest_phases_s": {name: round(statistics.median(one[name] for one in spent), 2) for name in spent[0]},
        "ingest_outcomes": rounds[0]["ingest"]["outcomes"],
        "ratio_of_ingest_to": ratio,
        "goals": {
            name: {"at_least": goal, "met": ratio[name] >= goal} for name, goal in GOALS.items() if name in ratio
        },
    }


def told(result: dict[str, Any]) -> str:
    """The result in one paragraph."""
    rate, ratio, spent = (result[name] for name in ("images_per_s", "ratio_of_ingest_to", "ingest_phases_s"))
    others = "; ".join(f"{name} {rate[name]} ({ratio[name]:.2f})" for name in ratio)
    missed = [name for name, goal in result["goals"].items() if not goal["met"]]
    left_out = result["img2dataset"].get("left_out")
    return (
        f"ingest: {rate['ingest']} images/s over {result['files']['images']} files ({result['files']['layout']}) on "
        f"{result['processes']} processes, median of {result['rounds']} rounds; beside it, with the ratio to each: "
        f"{others}. A whole ingest took {result['wall_s']['ingest']} s, of which copies {spent['copies']} s and settle "
        f"{spent['settle']} s. "
        + (f"Below its goal: {', '.join(missed)}." if missed else "Every goal that was measured is met.")
        + (f" img2dataset was left out: {left_out}." if left_out else "")
    )


def absolute(text: str) -> Path:
    return Path(text).absolute()  # not resolved: the Python of an environment is a link out of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isic2017", type=Path, help="the challenge's published layout; without it phantoms are drawn")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unit-rows", type=int, default=64)
    parser.add_argument("--img2dataset-python", type=absolute, help="the Python of an environment that has img2dataset")
    parser.add_argument("--img2dataset-threads", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument(
        "--work", type=Path, help="where files and results go meanwhile; a temporary folder if not given"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    wanted = parser.parse_args()
    if wanted.count < LEAST_UNITS * wanted.unit_rows:
        raise SystemExit(
            f"--count must be at least {LEAST_UNITS} units of {wanted.unit_rows}, so that a steady part is seen, got "
            f"{wanted.count}; raise it, or lower --unit-rows."
        )
    with tempfile.TemporaryDirectory(dir=wanted.work) as folder:
        phases.require_disk(Path(folder), wanted.count * BYTES_PER_IMAGE, f"a round of {wanted.count} images")
        result = measure(wanted, Path(folder))
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    wanted.out.write_text(json.dumps(result, indent=2) + "\n")
    print(told(result))


if __name__ == "__main__":
    main()
