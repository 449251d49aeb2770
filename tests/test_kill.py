"""`kill -9` of the driver in the middle: the same command again finishes the run, and nothing is made twice."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from stub_endpoint import good, serving

from factory import line, records
from factory.corpora.phantom import write_phantoms
from factory.models.families import vae_digest_of
from factory.models.weights import tree_digest
from factory.recipe import Recipe, load
from factory.run import Run
from factory.stages.score import LocalGate, ScoreSamples
from factory.stages.synthesize import SynthesizeSamples

ROOT = Path(__file__).resolve().parent.parent
UNITS, ROWS = 12, 2
INGESTED = 480
IN_FLIGHT = 3  # one actor with two units in hand, and one being committed
TIMEOUT_S = 400


@pytest.fixture(scope="module")
def recipe(tiny_weights: Any) -> Recipe:
    """24 samples in 12 units, slow enough to be caught at it; half of them are audits and are always drawn."""
    return load(
        "smoke",
        [
            *tiny_weights.overrides, f"plan.count={UNITS * ROWS}", f"plan.unit_rows={ROWS}", "plan.audit_min=12",
            "plan.num_inference_steps=60", "synthesize.slots=2", "synthesize.num_actors=1",
        ],
    )  # fmt: skip


def planned(folder: Path, recipe: Recipe) -> Path:
    with line.driving(str(folder), recipe, "plan") as run:
        line.plan(run, recipe, lambda text: None)
    return folder


def parts(run: Path, table: str = "samples") -> dict[str, tuple[int, str]]:
    """Modification time and SHA-256 of every committed part."""
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted((run / table).glob("part-*.parquet"))
    }


def in_one_process(run: Run, recipe: Recipe) -> None:
    """The run's samples by the same stage, gate and commits, one unit after the other."""
    weights, gate = Path(recipe.synthesize.weights), Path(recipe.gate.weights)
    judge = LocalGate(ScoreSamples(gate, vae_digest_of(weights, None, "joint"), recipe.gate))
    stage = SynthesizeSamples(weights, None, recipe.synthesize, recipe.gate, judge, tree_digest(gate), "joint")
    find = run.table("plan").finder("unit")
    for unit in range(UNITS):
        run.table("samples").commit(unit, records.rows_to_table("samples", stage(find(unit).to_pylist())))


class Driver:
    """A step of the line as a command in a process group of its own."""

    def __init__(self, run: Path, log: Path, step: str = "synthesize", *arguments: str) -> None:
        self.run, self.log = run, log
        command = [sys.executable, "-m", "factory.cli", step, "--run", str(run), *arguments]
        with log.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        self.family: set[psutil.Process] = set()

    def meet_family(self) -> None:
        """Remember what it has started so far; processes are known by pid and start time, so none is mistaken."""
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def kill_in_the_middle(self, table: str = "samples") -> dict[str, tuple[int, str]]:
        """SIGKILL once a few parts are there and not all; returns those parts."""
        deadline = time.monotonic() + TIMEOUT_S
        while len(list((self.run / table).glob("part-*.parquet"))) < 3:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        self.meet_family()
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        return parts(self.run, table)

    def end_family(self) -> None:
        """Whatever outlived the driver, and only that."""
        for left in self.family:
            with_suppressed(left.kill)
        psutil.wait_procs(self.family, timeout=30)


def with_suppressed(call: Callable[[], None]) -> None:
    try:
        call()
    except psutil.NoSuchProcess:
        return


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """`drive(run, step, ...)` starts a driver; at the end everything that any of them started is gone."""
    drivers: list[Driver] = []

    def start(run: Path, *step: str) -> Driver:
        drivers.append(Driver(run, tmp_path / f"driver-{len(drivers)}.log", *step))
        return drivers[-1]

    yield start
    for driver in drivers:
        if driver.process.poll() is None:
            driver.meet_family()
            driver.process.kill()
            driver.process.wait()
        driver.end_family()


def test_a_killed_run_is_finished_by_the_same_command_and_is_the_undisturbed_run(
    recipe: Recipe, tmp_path: Path, drive: Callable[..., Driver]
) -> None:
    run = planned(tmp_path / "killed", recipe)
    before = drive(run).kill_in_the_middle()
    assert 3 <= len(before) < UNITS
    assert not (run / "samples/_MANIFEST.json").exists()
    judged = [row for part in before for row in _rows(run / "samples" / part)]
    assert {row["outcome"] for row in judged} >= {"rejected"}  # so there was something to be made again

    second = drive(run)  # at once: what the first left running must not be in its way
    assert second.process.wait(TIMEOUT_S) == 0, second.log.read_text()
    after = parts(run)
    assert {name: after[name] for name in before} == before
    # What was there is not made again, rejected or not. A unit that was in flight may yet be committed by what the
    # first driver left running: then it is not the second's either.
    made = len(after) - len(before)
    assert (made - IN_FLIGHT) * ROWS <= _counted(second.log.read_text()) <= made * ROWS
    assert f"{UNITS * ROWS}/{UNITS * ROWS} rows" in second.log.read_text()

    table = Run(run).table("samples")
    identifiers = table.read(["sample_id"])["sample_id"].to_pylist()
    wanted = Run(run).table("plan").read(["sample_id"])["sample_id"].to_pylist()
    assert sorted(identifiers) == sorted(wanted) and len(set(identifiers)) == UNITS * ROWS
    assert Run(run).verify() == []
    assert not (run / "_LOCK.json").exists()

    calm = Run(planned(tmp_path / "calm", recipe))
    in_one_process(calm, recipe)  # which Ray changes no byte of, by tests/runtime/test_pipelines.py
    assert {name: digest for name, (_, digest) in parts(Path(calm.uri)).items()} == {
        n: d for n, (_, d) in after.items()
    }
    images = [row["image"] for row in table.read(["image"]).to_pylist()]
    assert sum(image is not None for image in images) >= 12  # the audits at least were drawn to the end


def test_a_killed_ingest_goes_on_without_the_images_that_it_has_read(
    tmp_path: Path, drive: Callable[..., Driver]
) -> None:
    """What finished parts were made from is removed before the second driver: it must not miss it."""
    images, run = tmp_path / "images", tmp_path / "run"
    write_phantoms(images, INGESTED, 64, 5)
    arguments = ["ingest", "--corpus", f"folder={images}", "--set", "corpus.unit_rows=8", "--set", "corpus.min_side=64"]
    arguments += ["--set", "corpus.scales=[64]"]
    before = drive(run, *arguments).kill_in_the_middle("intake")
    assert 3 <= len(before) < INGESTED // 8
    assert not (run / "intake/_MANIFEST.json").exists()
    read = [name for part in before for name in _column(run / "intake" / part, "source_id")]
    for name in read:
        (images / name).unlink()

    second = drive(run, "ingest")
    assert second.process.wait(TIMEOUT_S) == 0, second.log.read_text()
    after = parts(run, "intake")
    assert {name: after[name] for name in before} == before
    made = [text for text in second.log.read_text().splitlines() if text.startswith("ingest")][-1]
    assert f"{INGESTED}/{INGESTED} rows" in made
    assert Run(run).table("intake").counts() == {"accepted": INGESTED}
    assert Run(run).verify() == []


def test_a_killed_captioning_asks_of_no_finished_unit_again(tmp_path: Path, drive: Callable[..., Driver]) -> None:
    run, units, rows = tmp_path / "run", 12, 4
    corpus = [f"corpus.phantoms.count={units * rows}", f"corpus.unit_rows={rows}", "corpus.phantoms.size=64"]
    corpus += ["corpus.min_side=64", "corpus.scales=[64]"]
    recipe = load("smoke", corpus)
    with line.driving(str(run), recipe, "ingest") as opened:
        line.ingest(opened, recipe, lambda text: None)

    def slowly(image: str, nth: int) -> Any:
        time.sleep(0.25)
        return good()

    with serving(slowly) as endpoint:
        asked = ["caption", "--backend", "http", "--model", endpoint.address, "--set", "caption.http.name=tiny"]
        before = drive(run, *asked, "--set", "caption.http.concurrency=2").kill_in_the_middle("captions")
        assert 3 <= len(before) < units
        second = drive(run, *asked)
        assert second.process.wait(TIMEOUT_S) == 0, second.log.read_text()
    after = parts(run, "captions")
    assert {name: after[name] for name in before} == before and len(after) == units
    captioned = Run(run).table("captions").read(["record_id"])["record_id"].to_pylist()
    assert captioned == Run(run).table("corpus").read(["record_id"])["record_id"].to_pylist()
    assert len(set(captioned)) == len(endpoint.asked) == units * rows and Run(run).verify() == []
    assert sum(endpoint.asked.values()) <= (units + IN_FLIGHT) * rows


def _column(part: Path, name: str) -> list[str]:
    import pyarrow.parquet as pq

    return [str(value) for value in pq.read_table(part, columns=[name])[name].to_pylist()]


def _rows(part: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(part, columns=["sample_id", "outcome"]).to_pylist()


def _counted(log: str) -> int:
    """Rows that the last progress line counts by outcome: those this driver made."""
    last = [text for text in log.splitlines() if text.startswith("synthesize")][-1]
    words = last.replace(",", "").split()
    return sum(int(words[words.index(name) + 1]) for name in ("accepted", "rejected", "failed") if name in words)
