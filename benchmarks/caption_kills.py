"""50,000 images captioned while a worker and then the driver are killed: is every image captioned once?

The corpus is that of a run of `corpus_scale.py --keep`, whose captions are made anew. A third of the way one of
Ray's workers that caption is killed (SIGKILL), at two thirds the driver, and the same command is given again. Told are
the parts that were there at each kill and whether one byte of them changed, the rows that the second driver made, the
rows of a unit, and whether each accepted image of the corpus has exactly one caption. `undisturbed` is the same corpus
captioned once more without a kill: its parts must be the same bytes.

    python benchmarks/corpus_scale.py --count 50000 --work DIR --keep
    python benchmarks/caption_kills.py --run DIR/corpus_scale-50000/run
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import ingest_phases as phases
import psutil

from factory.run import Run

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/caption_kills.json"
WORKER = "MapWorker(MapBatches(CaptionUnit))"
SECONDS = 0.2  # between two looks


def parts_of(run: Path) -> dict[str, str]:
    """SHA-256 of each part of the captions that is in place."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((run / "captions").glob("*.parquet"))}


def started(run: Path, log: Path) -> subprocess.Popen[bytes]:
    """`factory caption` in a process group of its own."""
    command = [sys.executable, "-m", "factory.cli", "caption", "--run", str(run)]
    with log.open("ab") as out:
        return subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)


def until(process: subprocess.Popen[bytes], run: Path, parts: int, log: Path) -> list[psutil.Process]:
    """Waits for so many parts; all that the driver has started by then."""
    while len(list((run / "captions").glob("*.parquet"))) < parts:
        if process.poll() is not None:
            raise SystemExit(f"the driver must be at work, but ended with {process.returncode}; {log} says why.")
        time.sleep(SECONDS)
    return psutil.Process(process.pid).children(recursive=True)


def kill_a_worker(family: list[psutil.Process]) -> str:
    """SIGKILL to one process that captions; its title."""
    for process in family:
        try:
            title = " ".join(process.cmdline())
            if WORKER in title:
                process.kill()
                return title.strip()
        except psutil.Error:
            continue
    raise SystemExit(f"a process titled {WORKER} must be at work, got none; is another Ray in use?")


def ended(family: Collection[psutil.Process]) -> None:
    """Whatever outlived the driver, and only that: processes are known by pid and start time."""
    for process in family:
        try:
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(family, timeout=30)


def finished(process: subprocess.Popen[bytes], log: Path) -> float:
    """Seconds until the driver has ended well."""
    begun = time.monotonic()
    if process.wait() != 0:
        raise SystemExit(f"the driver must finish, but ended with {process.returncode}; {log} says why.")
    return time.monotonic() - begun


def disturbed(run: Path, log: Path) -> dict[str, Any]:
    """Captions with both kills."""
    total = len(Run(run).table("corpus").sealed().parts)
    driver = started(run, log)
    family = until(driver, run, total // 3, log)
    at_worker, worker = parts_of(run), kill_a_worker(family)
    family = until(driver, run, 2 * total // 3, log)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    at_driver = parts_of(run)
    ended(family)
    late = len(parts_of(run)) - len(at_driver)  # what Ray's workers committed after their driver's end
    seconds = finished(started(run, log), log)
    after = parts_of(run)
    kept: Callable[[dict[str, str]], bool] = lambda before: all(after[name] == before[name] for name in before)  # noqa: E731
    return {
        "parts": total, "killed_worker": worker, "parts_when_the_worker_was_killed": len(at_worker),
        "parts_when_the_driver_was_killed": len(at_driver), "committed_after_the_driver_s_end": late,
        "parts_made_by_the_second_driver": total - len(at_driver) - late,
        "seconds_of_the_second_driver": round(seconds),
        "parts_kept_to_the_byte": kept(at_worker) and kept(at_driver), "digests": after,
    }  # fmt: skip


def counted(run: Path) -> dict[str, Any]:
    """Whether each accepted image of the corpus has one caption."""
    opened = Run(run)
    corpus = opened.table("corpus").read(["record_id", "outcome"]).to_pylist()
    wanted = sorted(row["record_id"] for row in corpus if row["outcome"] == "accepted")
    captioned = sorted(opened.table("captions").read(["record_id"])["record_id"].to_pylist())
    return {
        "images": len(wanted), "captions": len(captioned), "different": len(set(captioned)),
        "every_image_once": wanted == captioned, "outcomes": opened.table("captions").counts(),
        "verify": opened.verify(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="a run with a sealed corpus and no captions")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    run = args.run.absolute()
    if (run / "captions").exists():
        raise SystemExit(f"{run} must have no captions yet; move {run / 'captions'} away.")
    log = run.parent / "caption_kills.log"
    result = {"machine": phases.machine(), **disturbed(run, log)}
    digests = result.pop("digests")
    result |= counted(run)
    shutil.move(run / "captions", run.parent / "captions-disturbed")
    begun = time.monotonic()
    finished(started(run, log), log)
    seconds = time.monotonic() - begun
    result["undisturbed"] = {
        "seconds": round(seconds), "images_per_s": round(result["images"] / seconds, 1),
        "same_parts_to_the_byte": parts_of(run) == digests,
    }  # fmt: skip
    shutil.rmtree(run.parent / "captions-disturbed")
    print(json.dumps(result, indent=1))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
