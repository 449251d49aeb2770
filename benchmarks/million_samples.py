"""A million samples that cost nothing to draw: planned, made on Ray, killed half way, gone on with.

What is timed is the factory's own: reading the plan, the sampler's loop at one call a sample, encoding 32 px images and
masks, actors, commits. `factory synthesize`'s own pipeline runs in a process of its own (`--drive`), is killed with
SIGKILL when half of the units are committed, and the same is started again. Noted from outside: the driver's resident
memory, the object store by the raylet's own count, the parts and their times. The ceiling is the same stage and the
same commits in one loop in one process without Ray, in the same run; nothing is judged, so everything is accepted.

    python benchmarks/million_samples.py --count 20000
    python benchmarks/million_samples.py
    python benchmarks/million_samples.py --resume-only --work DIR

Goals, at a million: planning under 60 s, from the second driver's start to the first unit that it makes under 20 s, the
driver under 1.5 GiB and flat (a fitted growth of at most 64 MiB over a driver's commits after their first tenth),
nothing spilled, 2,000 samples a second committed on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import free
import numpy as np
import psutil
from caption_kills import ended as end_family
from corpus_scale import MOST_DRIVER_MIB, MOST_GROWTH_MIB, ObjectStore, object_store, resident
from free import DIGEST, SynthesizeFree, Ungated
from ingest_phases import machine, require_disk, steady_rate

from factory import line, records
from factory.recipe import Recipe, load
from factory.run import Run
from factory.runtime import cluster
from factory.runtime.synthesize import synthesize

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks/results/million_samples.json"
SIZE, EVERY_S = 32, 0.5
BYTES = 1_300  # of a sample on disk, its sidecars and its plan with it
CEILING_ROWS = 20_480
MOST_PLAN_S, MOST_RESUME_S, LEAST_RATE = 60.0, 20.0, 2000.0


def recipe_of(count: int, actors: int) -> Recipe:
    return load(
        "smoke",
        [
            f"plan.count={count}", f"plan.size={SIZE}", "plan.num_inference_steps=1", "plan.audit_min=0",
            f"synthesize.num_actors={actors}", "synthesize.slots=64", "gate.checkpoints=[]",
        ],
    )  # fmt: skip


class Noting(Ungated):
    """Ungated, and notes in a file beside the run when it is asked for its first unit."""

    def __init__(self, run_uri: str, *arguments: object) -> None:
        super().__init__(run_uri, *arguments)
        self.note = Path(f"{run_uri}-began-{os.getpid()}")

    def made(self, unit: int) -> Any:
        if not self.note.exists():
            self.note.write_text(str(time.time()))
        return super().made(unit)


def drive(uri: Path, count: int, actors: int) -> None:
    """What `factory synthesize` does, with a generator that is free and no gate."""
    free.for_workers(__name__)
    recipe = recipe_of(count, actors)
    with line.driving(str(uri), recipe, "synthesize") as run, cluster.connect() as resources:
        pools = cluster.pools(resources, recipe)
        digests, paths = dict.fromkeys(("generator", "gate"), DIGEST), {"generator": "", "adapter": None}
        synthesize(run, recipe, pools, digests, paths, nullcontext(), print, Noting)


def driven(run: Path, count: int, actors: int, until: int | None) -> dict[str, Any]:
    """One driver from its start to its end, or to its SIGKILL once `until` units are committed; what was noted."""
    for note in run.parent.glob(f"{run.name}-began-*"):
        note.unlink()
    command = [sys.executable, __file__, "--drive", str(run), "--count", str(count), "--actors", str(actors)]
    store, samples, started = ObjectStore(), list[dict[str, float]](), time.time()
    there = set((run / "samples").glob("part-*"))
    with (run.parent / "driver.log").open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    driver, family = psutil.Process(process.pid), set[psutil.Process]()
    while process.poll() is None:
        parts = sum(1 for _ in (run / "samples").glob("part-*"))
        held: dict[str, int] = {}
        try:
            family |= set(driver.children(recursive=True))
            held = store.stats(list(family))
        except psutil.Error:
            pass
        samples.append({"time": time.time(), "parts": parts, "driver_rss": resident(driver)[0], **held})
        if until is not None and parts >= until:
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(EVERY_S)
    ended = time.time()
    end_family(family)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the driver must finish, but ended with {process.returncode}; {out.name} says why.")
    began = [float(note.read_text()) for note in run.parent.glob(f"{run.name}-began-*")]
    made = sorted(set((run / "samples").glob("part-*")) - there)
    times = sorted(part.stat().st_mtime for part in made)
    return {
        "killed": process.returncode != 0, "seconds": round(ended - started, 1), "units": len(made),
        "first_unit_began_s": round(min(began) - started, 2), "first_unit_committed_s": round(times[0] - started, 2),
        "all_actors_began_s": round(max(began) - started, 2), "actors": len(began),
        "end_s": round(ended - times[-1], 2), "times": times, "driver_mib": driver_memory(samples),
        "object_store": object_store(samples),
    }  # fmt: skip


def driver_memory(samples: list[dict[str, float]]) -> dict[str, Any]:
    """MiB: the most, and how it grows with what is committed after its first tenth."""
    rss = np.array([sample["driver_rss"] for sample in samples]) / 2**20
    parts = np.array([sample["parts"] for sample in samples])
    during = (parts > parts.min() + (parts.max() - parts.min()) / 10) & (rss > 0)
    growth = slope = None
    if len(np.unique(parts[during])) > 1:
        slope = float(np.polyfit(parts[during], rss[during], 1)[0])
        growth = round(slope * float(np.ptp(parts[during])), 2)
    return {
        "max": round(float(rss.max()), 1), "growth": growth, "looks": len(samples),
        "growth_per_1000_units": None if slope is None else round(1000 * slope, 2),
    }  # fmt: skip


def ceiling(folder: Path) -> float:
    """Samples per second of the same stage and commits in one loop, one process and one thread."""
    recipe = recipe_of(CEILING_ROWS, 1)
    run = Run(folder / "ceiling")
    line.plan(run, recipe, lambda text: None)
    stage = SynthesizeFree("", None, recipe.synthesize, recipe.gate, None, DIGEST)
    find, table = run.table("plan").finder("unit"), run.table("samples")
    stage(find(0).to_pylist()[:64])
    started, unit = time.perf_counter(), 0
    while rows := find(unit).to_pylist():
        table.commit(unit, records.rows_to_table("samples", stage(rows)))
        unit += 1
    spent = time.perf_counter() - started
    shutil.rmtree(run.uri)
    return CEILING_ROWS / spent


def measure(wanted: argparse.Namespace) -> dict[str, Any]:
    folder = wanted.work / f"million_samples-{wanted.count}"
    run, count, actors = folder / "run", wanted.count, wanted.actors
    result: dict[str, Any] = {"machine": machine(), "count": count, "size": SIZE, "actors": actors}
    if not wanted.resume_only:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        require_disk(folder, count * BYTES, f"{count} samples")
        started = time.perf_counter()
        line.plan(Run(run), recipe_of(count, actors), print)
        result["plan_s"] = round(time.perf_counter() - started, 1)
    units, drivers = len(_units(run)), []
    result |= {"units": units, "ceiling": round(ceiling(folder), 1)}
    if not wanted.resume_only:
        drivers.append(driven(run, count, actors, units // 2))
    resumed_at = len(list((run / "samples").glob("part-*")))
    drivers.append(driven(run, count, actors, None))
    rows = {info.part: info.rows for info in Run(run).table("samples").sealed().parts}
    rate = [_rate(driver.pop("times"), count / len(rows)) for driver in drivers]
    result |= {
        "resumed_at_units": resumed_at, "drivers": drivers, "samples_per_s": rate,
        "ratio": [round(each / result["ceiling"], 3) for each in rate], **accounted(run, count),
    }  # fmt: skip
    if not wanted.keep:
        shutil.rmtree(folder)
    return result | {"goals": goals_of(result)}


def _units(run: Path) -> set[int]:
    return set(Run(run).table("plan").read(["unit"])["unit"].to_pylist())


def _rate(times: list[float], rows: float) -> float:
    return round(steady_rate([(time, rows) for time in times]), 1)  # type: ignore[misc]


def accounted(run: Path, count: int) -> dict[str, Any]:
    """Whether every planned sample is there once."""
    table = Run(run).table("samples")
    names = [table.read(["sample_id"])["sample_id"], Run(run).table("plan").read(["sample_id"])["sample_id"]]
    same = names[0].combine_chunks().equals(names[1].combine_chunks())
    return {"outcomes": table.counts(), "every_sample_once_in_order": same and len(names[0].unique()) == count}


def goals_of(result: dict[str, Any]) -> dict[str, bool]:
    """What was not seen is not met."""
    stores = [driver["object_store"] for driver in result["drivers"]]
    memory = [driver["driver_mib"] for driver in result["drivers"]]
    return {
        "plan_under_60_s": result.get("plan_s", MOST_PLAN_S) < MOST_PLAN_S,
        "resume_under_20_s": result["drivers"][-1]["first_unit_began_s"] < MOST_RESUME_S,
        "driver_below_1536_mib": all(each["max"] < MOST_DRIVER_MIB for each in memory),
        "driver_flat": all(each["growth"] is not None and each["growth"] <= MOST_GROWTH_MIB for each in memory),
        "nothing_spilled": all(each["spilled_bytes"] == each["fallback_bytes"] == 0 for each in stores),
        "2000_samples_per_s": min(result["samples_per_s"]) >= LEAST_RATE,
        "every_sample_accounted_for": result["every_sample_once_in_order"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--actors", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where the run goes; it is removed at the end")
    parser.add_argument("--keep", action="store_true", help="leave the run where it is")
    parser.add_argument("--resume-only", action="store_true", help="go on with a run that was stopped under --work")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    cluster.quiet()
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.pop("RAY_ADDRESS", None)
    if wanted.drive:
        drive(wanted.drive, wanted.count, wanted.actors)
        return
    wanted.work = wanted.work.absolute()
    result = measure(wanted)
    wanted.out.parent.mkdir(parents=True, exist_ok=True)
    wanted.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
