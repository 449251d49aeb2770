"""`factory synthesize` under kills: is every sample made once, and are its bytes those of an undisturbed run?

One run of real weights, tiny and random, on Ray. Twenty times its driver is killed (SIGKILL) at a random moment after
its first commit of that start, and the same command is given again. In a second run of the same plan five of Ray's
workers that draw are killed, then the gate's replica, while the driver goes on. An undisturbed run says what the bytes
must be. Told are the parts that were there at each kill and how many of them changed, of which there may be none.

    python benchmarks/kills.py
    python benchmarks/kills.py --kills 2 --workers 1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from ingest_phases import machine

from factory import line
from factory.models.joint import JointDenoiser, build_starter
from factory.models.segmenter import LatentSegmenter, save_segmenter
from factory.recipe import Recipe, load
from factory.run import Run

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/kills.json"
DRAWS, GATE = "MapWorker(MapBatches(SynthesizeUnit))", "GateDeployment"
SECONDS = 0.05  # between two looks
ROWS = 2  # of a unit


def recipe_of(folder: Path, units: int) -> Recipe:
    """So many units, two thirds of a second each: long enough to be caught in the middle of one."""
    torch.manual_seed(11)
    build_starter(
        ["a dermoscopic image of a melanoma on dark skin", "This photo depicts a benign lesion."],
        vae={"block_out_channels": (8, 8), "layers_per_block": (0, 1)},
        unet={"block_out_channels": (16, 16), "num_plain_blocks": 1, "num_heads": 2, "norm_num_groups": 4},
        text_encoder={"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32},
        vocab_size=540, model_max_length=24, head_width=16,
    ).save(folder / "generator")  # fmt: skip
    digest = JointDenoiser.load(folder / "generator").vae_digest
    save_segmenter(LatentSegmenter(factor=2, width=8), folder / "gate", digest)
    return load(
        "smoke",
        [
            f"synthesize.weights={folder / 'generator'}", f"gate.weights={folder / 'gate'}", "synthesize.adapter=none",
            f"plan.count={units * ROWS}", f"plan.unit_rows={ROWS}", f"plan.audit_min={units}",
            "plan.num_inference_steps=60", "synthesize.slots=2", "synthesize.num_actors=2",
        ],
    )  # fmt: skip


def planned(folder: Path, recipe: Recipe) -> Path:
    with line.driving(str(folder), recipe, "plan") as run:
        line.plan(run, recipe, lambda text: None)
    return folder


def parts_of(run: Path) -> list[Path]:
    return list((run / "samples").glob("part-*.parquet"))


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of each part that is in place."""
    return {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in sorted(parts_of(run))}


class Driver:
    """`factory synthesize` in a process group of its own, and what it has started."""

    def __init__(self, run: Path) -> None:
        self.run, self.log, self.family = run, run.with_suffix(".log"), set[psutil.Process]()
        command = [sys.executable, "-m", "factory.cli", "synthesize", "--run", str(run)]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing that it started is left, however this ends; processes are known by pid and start time."""
        if self.process.poll() is None:
            self.kill()
        for process in self.family:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(self.family, timeout=30)

    def at_work(self, parts: int) -> bool:
        """Waits until so many parts are there; False if the driver has ended by then."""
        while len(parts_of(self.run)) < parts:
            if self.process.poll() is not None:
                return False
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
            time.sleep(SECONDS)
        return self.process.poll() is None

    def kill(self) -> None:
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill_one(self, title: str) -> bool:
        """SIGKILL to one process below the driver whose command line has this title; False if there is none."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    process.kill()
                    return True
            except psutil.Error:
                continue
        return False

    def ended(self) -> None:
        """Waits for its end, which must be a good one."""
        if self.process.wait():
            raise SystemExit(f"the driver must finish, but ended with {self.process.returncode}; {self.log} says why.")


def killed_drivers(run: Path, kills: int, seed: int) -> dict[str, Any]:
    """A run whose driver is killed so many times; then it is finished."""
    clock, there, at = random.Random(seed), dict[str, str](), list[int]()
    changed = 0
    while len(at) < kills:
        with Driver(run) as driver:
            if driver.at_work(len(parts_of(run)) + 1):
                time.sleep(clock.uniform(0, 1.0))
            if driver.process.poll() is not None:
                raise SystemExit(f"the run must outlast {kills} kills, but was done after {len(at)}; raise --units.")
            driver.kill()
        now = digests(run)
        changed += sum(now.get(name) != digest for name, digest in there.items())
        there = now
        at.append(len(now))
    with Driver(run) as last:
        last.ended()
    return {"kills": kills, "parts_at_each_kill": at, "parts_changed": changed, **accounted(run)}


def killed_workers(run: Path, workers: int, units: int, seed: int) -> dict[str, Any]:
    """A run in which workers that draw are killed, and the gate's replica while it is asked."""
    clock, killed = random.Random(seed), {DRAWS: 0, GATE: 0}
    with Driver(run) as driver:
        for number in range(workers + 1):
            title = DRAWS if number < workers else GATE
            if not driver.at_work((number + 1) * units // (workers + 3)):
                raise SystemExit(f"the driver must be at work, but ended; {driver.log} says why.")
            time.sleep(clock.uniform(0, 0.5))
            killed[title] += driver.kill_one(title)
        driver.ended()
    return {"killed_workers": killed[DRAWS], "killed_gate_replicas": killed[GATE], **accounted(run)}


def accounted(run: Path) -> dict[str, Any]:
    """Whether every planned sample is there once, with an outcome."""
    opened = Run(run)
    names = opened.table("samples").read(["sample_id"])["sample_id"].to_pylist()
    wanted = opened.table("plan").read(["sample_id"])["sample_id"].to_pylist()
    counts = opened.table("samples").counts()
    return {
        "samples": len(names), "outcomes": counts, "every_sample_once": names == wanted == list(dict.fromkeys(names)),
        "in_is_out": sum(counts.values()) == len(wanted), "verify": opened.verify(),
    }  # fmt: skip


def measure(wanted: argparse.Namespace, folder: Path) -> dict[str, Any]:
    recipe = recipe_of(folder, wanted.units)
    calm, drivers, workers = (planned(folder / name, recipe) for name in ("calm", "drivers", "workers"))
    with Driver(calm) as driver:
        driver.ended()
    undisturbed = digests(calm)
    result: dict[str, Any] = {"machine": machine(), "units": wanted.units, "rows_per_unit": ROWS, "seed": wanted.seed}
    result["drivers"] = killed_drivers(drivers, wanted.kills, wanted.seed)
    result["workers"] = killed_workers(workers, wanted.workers, wanted.units, wanted.seed)
    for name, run in (("drivers", drivers), ("workers", workers)):
        result[name]["same_bytes_as_undisturbed"] = digests(run) == undisturbed
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of the driver")
    parser.add_argument("--workers", type=int, default=5, help="that are killed in one run")
    parser.add_argument("--units", type=int, default=160)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    wanted = parser.parse_args()
    os.environ.pop("RAY_ADDRESS", None)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(wanted, Path(folder))
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    wanted.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
