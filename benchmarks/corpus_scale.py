"""Does ingest stay the same at half a million images? Its cost per image, its memory and its object store, watched.

`factory ingest --corpus phantom=N` runs as the command it is, in a process of its own. Every few seconds are noted: the
driver's resident memory, that of all processes below it (pages that they share count in each), the largest of these,
the object store's use and what was ever spilled by Ray's own count, and how many rows are committed. Seconds by phase
and the cost per image in windows come from the times of the parts.

    python benchmarks/corpus_scale.py --count 50000
    python benchmarks/corpus_scale.py --count 500000
    python benchmarks/corpus_scale.py --compare results/corpus_scale-50000.json results/corpus_scale-500000.json

A run that was stopped goes on with the same command, and its result says that it was resumed; the time in which
nothing ran is left out of it. What an image costs is the pass over the images at its steady rate, copies and settle;
the start and the end of Ray are told apart. The goals: the driver under 1.5 GiB and flat, nothing spilled, and an image
at half a million at most 1.2 times as dear as at 50,000. Flat is a fitted growth of at most 64 MiB over the pass over
the images, after its first tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

import ingest_phases as phases
import numpy as np
import psutil

from factory import corpora, records
from factory.parts import conform, encode
from factory.recipe import Recipe, load
from factory.runtime import cluster
from factory.stages.curate import CurateImages

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
MOST_DRIVER_MIB, MOST_GROWTH_MIB, MOST_RATIO = 1536, 64, 1.2
WINDOWS = 10  # a run is cut into so many windows of cost, or into windows of WINDOW rows where these are fewer
WINDOW = 50_000
COSTS = (
    "intake",
    "copies",
    "settle",
)  # what an image costs; the start and end of Ray are told apart
TABLES = ("listing", "intake", "copies", "corpus")

Sample = dict[str, Any]

# ------------------------------------------------------------------------------------------------------- watching


class ObjectStore:
    """What the object store of the Ray below a process holds and ever spilled, by the raylet's own count."""

    def __init__(self) -> None:
        self._raylet: tuple[str, int] | None = None

    def stats(self, family: Sequence[psutil.Process]) -> dict[str, int]:
        """In bytes; empty while there is no Ray to ask."""
        from ray._private import internal_api  # what `ray memory --stats-only` asks; it has no public name

        try:
            self._raylet = self._raylet or _raylet(family)
            if self._raylet is None:
                return {}
            found = internal_api.node_stats(*self._raylet, include_memory_info=False).store_stats
        except Exception:  # Ray is starting or ending: there are other samples, and none at all is told as such
            return {}
        return {
            "store_used": found.object_store_bytes_used,
            "store_spilled": found.spilled_bytes_total,
            "store_fallback": found.object_store_bytes_fallback,
        }


def _raylet(family: Sequence[psutil.Process]) -> tuple[str, int] | None:
    """Where the raylet among these processes answers, or None. Ray's directory is asked once and let go at once: a
    client of it ends its own process a minute after the directory has gone."""
    from ray._private import internal_api

    words = [word for process in family if process.name() == "raylet" for word in process.cmdline()]
    directory = next((word.partition("=")[2] for word in words if word.startswith("--gcs-address=")), None)
    if directory is None:
        return None
    state = internal_api.get_state_from_address(directory)
    try:
        node = next(node for node in state.node_table() if node["Alive"])
    finally:
        state.disconnect()
    return node["NodeManagerAddress"], node["NodeManagerPort"]


def resident(process: psutil.Process) -> tuple[int, str]:
    """Bytes of resident memory and a name; nothing for a process that is gone."""
    try:
        return process.memory_info().rss, process.name()
    except psutil.Error:
        return 0, ""


class CpuClock:
    """Seconds of CPU that a process and all below it have spent: what an image costs whatever else the machine does."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}

    def seconds(self, family: Sequence[psutil.Process]) -> float:
        """Of all that were ever seen; what one spends between a last look and its end is lost."""
        for process in family:
            try:
                spent = process.cpu_times()
                self._seen[process.pid, process.create_time()] = spent.user + spent.system
            except psutil.Error:
                continue
        return sum(self._seen.values())


def sampled(driver: psutil.Process, store: ObjectStore, clock: CpuClock, run: Path) -> Sample:
    """One look at the driver, at all below it, and at what is committed."""
    try:
        family = driver.children(recursive=True)
        memory = [resident(process) for process in family]
        held = store.stats(family)
    except psutil.Error:  # it has ended meanwhile
        family, memory, held = [], [], {}
    largest, name = max(memory, default=(0, ""))
    own = resident(driver)[0]
    return {
        "time": time.time(), "cpu_s": clock.seconds([driver, *family]), "driver_rss": own,
        "tree_rss": own + sum(rss for rss, _ in memory),
        "largest_rss": largest, "largest": name, "processes": len(memory) + 1, **held,
        "phase": next((table for table in TABLES if not (run / table / "_MANIFEST.json").exists()), "end"),
        "parts": {table: sum(1 for _ in (run / table).glob("part-*.parquet")) for table in ("intake", "corpus")},
    }  # fmt: skip


def watched(run: Path, recipe_keys: Sequence[str], count: int, every_s: float, notes: Path) -> None:
    """One driver from its start to its end, noted line by line. SystemExit where it fails."""
    command = [sys.executable, "-m", "factory.cli", "ingest", "--run", str(run), "--corpus", f"phantom={count}"]
    sets = [word for key in recipe_keys for word in ("--set", key)]
    log, store, clock = notes.with_suffix(".log"), ObjectStore(), CpuClock()
    with notes.open("a") as file, log.open("ab") as out:
        _note(file, {"driver_started": time.time()})
        process = subprocess.Popen([*command, *sets], cwd=ROOT, stdout=out, stderr=out, env=_environment())
        driver = psutil.Process(process.pid)
        try:
            while process.poll() is None:
                _note(file, sampled(driver, store, clock, run))
                _wait(process, every_s)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        _note(file, {"driver_ended": time.time(), "status": process.returncode})
    if process.returncode:
        raise SystemExit(
            f"ingest must finish, but ended with {process.returncode} ({log} says why); the same command goes on."
        )


def _environment() -> dict[str, str]:
    """The driver's: a Ray of its own, whose token this process knows too, so that it may ask."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def _note(file: Any, content: Sample) -> None:
    file.write(json.dumps(content) + "\n")
    file.flush()


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


# ------------------------------------------------------------------------------------------------------- the result


def idle_spans(noted: Sequence[Sample], run: Path) -> list[phases.Span]:
    """When no driver ran: from the last that is known of one to the start of the next."""
    parts = [time for table in ("intake", "corpus") for time, _ in phases.commits(run, table)]
    starts = [note["driver_started"] for note in noted if "driver_started" in note]
    seen = sorted([note["time"] for note in noted if "time" in note] + parts)
    return [(max([first, *(at for at in seen if at < second)]), second) for first, second in pairwise(starts)]


def result_of(run: Path, noted: Sequence[Sample], recipe: Recipe, count: int) -> dict[str, Any]:
    """Everything that is told of a finished run."""
    samples = [note for note in noted if "time" in note]
    drivers = sum("driver_started" in note for note in noted)
    idle = idle_spans(noted, run)
    spent = phases.seconds(run, noted[0]["driver_started"], noted[-1]["driver_ended"], idle)
    done = phases.without_idle(phases.commits(run, "intake"), idle)
    windows = phases.cost_windows(done, min(WINDOW, count // WINDOWS))
    sealed = {table: phases.manifest(run, table) for table in TABLES}
    cost = {phase: round(1000 * spent[phase] / count, 3) for phase in ("copies", "settle")}
    cost["intake"] = round(1000 / phases.steady_rate(done), 3)
    result = {
        "count": count, "size": recipe.corpus.phantoms.size, "unit_rows": recipe.corpus.unit_rows,
        "resumed": drivers > 1, "drivers": drivers, "samples": len(samples),
        "rows": {table: sealed[table]["rows"] for table in TABLES},
        "outcomes": {table: sealed[table]["outcomes"] for table in ("intake", "corpus")},
        "wall_s": round(sum(spent.values()), 1), "phases_s": spent, "ms_per_image": round(sum(cost.values()), 3),
        "ms_per_image_by_phase": cost,
        "cpu_ms_per_image_by_phase": cpu_costs(samples, count), "intake_windows": windows,
        "last_window_over_first": _last_over_first(windows),
        "driver_mib": driver_memory(samples, recipe.corpus.unit_rows, count), "family": family_memory(samples),
        "object_store": object_store(samples),
        "bytes": {table: phases.stored_bytes(run / table) for table in TABLES},
    }  # fmt: skip
    return result | {"goals": goals_of(result)}


def cpu_costs(samples: Sequence[Sample], count: int) -> dict[str, float]:
    """Milliseconds of CPU per image in each phase, of all processes."""
    spent = dict.fromkeys((*COSTS, "end"), 0.0)
    for last, this in pairwise(samples):
        spent[this["phase"] if this["phase"] in spent else "settle" if this["phase"] == "corpus" else "intake"] += max(
            this["cpu_s"] - last["cpu_s"], 0.0
        )
    return {phase: round(1000 * seconds / count, 3) for phase, seconds in spent.items()}


def _last_over_first(windows: list[dict[str, float]]) -> float | None:
    return round(windows[-1]["ms_per_row"] / windows[0]["ms_per_row"], 3) if len(windows) > 1 else None


def driver_memory(samples: Sequence[Sample], unit_rows: int, count: int) -> dict[str, Any]:
    """MiB: the most in each phase, and how it grows with the images of the pass after its first tenth."""
    rss = np.array([sample["driver_rss"] for sample in samples]) / 2**20
    named = np.array([sample["phase"] for sample in samples])
    rows = np.array([min(sample["parts"]["intake"] * unit_rows, count) for sample in samples])
    during = (named == "intake") & (rows >= count / 10)
    found: dict[str, Any] = {
        "max": round(float(rss.max()), 1),
        "max_by_phase": {phase: round(float(rss[named == phase].max()), 1) for phase in dict.fromkeys(named.tolist())},
        "growth": None, "growth_per_100k": None,
    }  # fmt: skip
    if len(np.unique(rows[during])) > 1:
        slope = float(np.polyfit(rows[during], rss[during], 1)[0])
        span = int(rows[during].max() - rows[during].min())
        found |= {"growth": round(slope * span, 2), "growth_per_100k": round(slope * 100_000, 2)}
    return found


def family_memory(samples: Sequence[Sample]) -> dict[str, Any]:
    """The most that all processes held, and the most that one of them did that is not the driver, in MiB."""
    most, largest = (max(samples, key=itemgetter(name)) for name in ("tree_rss", "largest_rss"))
    return {
        "max_mib": round(most["tree_rss"] / 2**20, 1), "processes": most["processes"], "phase": most["phase"],
        "largest_mib": round(largest["largest_rss"] / 2**20, 1), "largest": largest["largest"],
        "largest_phase": largest["phase"],
    }  # fmt: skip


def object_store(samples: Sequence[Sample]) -> dict[str, Any]:
    """The most in use and all that was spilled or put on disk for want of room; null where Ray was never asked."""
    asked = [sample for sample in samples if "store_used" in sample]
    most = {name: max((s[f"store_{name}"] for s in asked), default=None) for name in ("used", "spilled", "fallback")}
    used = most["used"]
    return {
        "samples": len(asked), "max_used_mib": None if used is None else round(used / 2**20, 1),
        "spilled_bytes": most["spilled"], "fallback_bytes": most["fallback"],
    }  # fmt: skip


def goals_of(result: dict[str, Any]) -> dict[str, bool]:
    """What one run can show. What was not seen is not met."""
    driver, store, rows = result["driver_mib"], result["object_store"], result["rows"]
    counted = {table: sum(outcomes.values()) for table, outcomes in result["outcomes"].items()}
    wanted = dict.fromkeys(("listing", "intake", "corpus"), result["count"])
    return {
        "driver_below_1536_mib": driver["max"] < MOST_DRIVER_MIB,
        "driver_flat": driver["growth"] is not None and driver["growth"] <= MOST_GROWTH_MIB,
        "nothing_spilled": store["spilled_bytes"] == 0 and store["fallback_bytes"] == 0,
        "every_row_accounted_for": {**rows, **counted} == {**wanted, "copies": rows["copies"]},
    }


def compared(small: dict[str, Any], large: dict[str, Any]) -> dict[str, Any]:
    """Cost per image of the larger run over that of the smaller."""
    if small["count"] >= large["count"] or small["size"] != large["size"]:
        raise SystemExit(
            f"--compare must have a smaller and a larger run of one size, got {small['count']} at "
            f"{small['size']} px and {large['count']} at {large['size']} px; give the smaller first."
        )
    ratio = large["ms_per_image"] / small["ms_per_image"]
    phase_ratio = {
        phase: round(cost / small["ms_per_image_by_phase"][phase], 3) if small["ms_per_image_by_phase"][phase] else None
        for phase, cost in large["ms_per_image_by_phase"].items()
    }
    goals = {f"{name}_at_{run['count']}": met for run in (small, large) for name, met in run["goals"].items()}
    return {
        "ms_per_image": {run["count"]: run["ms_per_image"] for run in (small, large)},
        "ratio": round(ratio, 3), "ratio_by_phase": phase_ratio,
        "driver_max_mib": {run["count"]: run["driver_mib"]["max"] for run in (small, large)},
        "resumed": {run["count"]: run["resumed"] for run in (small, large)},
        "goals": {"ratio_at_most_1.2": ratio <= MOST_RATIO, **goals},
        "runs": [small, large],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the command


def bytes_per_image(keys: Sequence[str]) -> int:
    """What an image will take on disk, from a few of them: it is stored in `intake` and again in `corpus`."""
    section = load(None, [*keys, "corpus.phantoms.count=16"]).corpus
    rows = CurateImages(section)(list(corpora.list_entries(section)))
    part = encode(conform("intake", records.rows_to_table("intake", rows)))
    return round(1.1 * 2 * len(part) / len(rows))


def measure(wanted: argparse.Namespace) -> dict[str, Any]:
    """Runs ingest to its end, or goes on with a run that was stopped, and reads what was noted."""
    keys = [f"corpus.phantoms.size={wanted.size}", f"corpus.unit_rows={wanted.unit_rows}"]
    if wanted.size < 128:
        keys += [f"corpus.min_side={wanted.size}", f"corpus.scales=[{wanted.size}]"]
    wanted.work.mkdir(parents=True, exist_ok=True)
    folder = wanted.work / f"corpus_scale-{wanted.count}"
    run, notes, recipe = folder / "run", folder / "notes.jsonl", load(None, keys)
    there = sum(phases.stored_bytes(run / table) for table in TABLES)
    needed = max(0, wanted.count * bytes_per_image(keys) - there)
    print(f"{wanted.count} images at {wanted.size} px: {needed / 2**30:.1f} GiB below {wanted.work}", flush=True)
    phases.require_disk(wanted.work, needed, f"ingest of {wanted.count} images")
    folder.mkdir(exist_ok=True)
    before = phases.machine()
    watched(run, keys, wanted.count, wanted.every, notes)
    noted = [json.loads(text) for text in notes.read_text().splitlines()]
    result = {"machine": before, **result_of(run, noted, recipe, wanted.count)}
    if not wanted.keep:
        shutil.rmtree(folder)
    return result


def told(result: dict[str, Any]) -> str:
    """A run's result in one paragraph."""
    driver, store, family = result["driver_mib"], result["object_store"], result["family"]
    missed = [name for name, met in result["goals"].items() if not met]
    return (
        f"{result['count']} images at {result['size']} px: {result['ms_per_image']} ms each, pass, copies and settle "
        f"({result['ms_per_image_by_phase']}), {result['wall_s']} s in all"
        + (f", resumed: {result['drivers']} drivers" if result["resumed"] else "")
        + f". Driver at most {driver['max']} MiB, growing {driver['growth']} MiB over the pass; all processes "
        f"{family['max_mib']} MiB, the largest of them {family['largest_mib']} MiB ({family['largest']} in "
        f"{family['largest_phase']}). Object store at most {store['max_used_mib']} MiB, spilled "
        f"{store['spilled_bytes']} bytes. Last window over the first: {result['last_window_over_first']}. "
        + (f"Not met: {', '.join(missed)}." if missed else "Every goal of one run is met.")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--size", type=int, default=128, help="pixels of a phantom")
    parser.add_argument("--unit-rows", type=int, default=256)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where the run goes; it is removed at the end")
    parser.add_argument("--keep", action="store_true", help="leave the run where it is")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("SMALL", "LARGE"), help="two results of this file")
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    cluster.quiet()
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    if wanted.compare:
        result = compared(*(json.loads(path.read_text()) for path in wanted.compare))
        text = f"an image costs {result['ratio']} times as much in the larger run; goals: {result['goals']}"
    else:
        result = measure(wanted)
        text = told(result)
    out = wanted.out or RESULTS / ("corpus_scale.json" if wanted.compare else f"corpus_scale-{wanted.count}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(text)


if __name__ == "__main__":
    main()
