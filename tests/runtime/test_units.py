"""Units without Ray: what a full or read-only disk, a late attempt, a second driver and twenty kills do to them.

The pipeline is the real one but for who calls it: a loop of stage and commit in the place of Ray's actors and tasks.
The same on Ray: `tests/test_kill.py` and `benchmarks/kills.py`.
"""

from __future__ import annotations

import errno
import functools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from factory import line, records
from factory.lock import LOCK_PATH
from factory.models.families import vae_digest_of
from factory.models.weights import tree_digest
from factory.progress import ProgressLine, Stopped
from factory.recipe import Recipe, load
from factory.run import Run
from factory.runtime.units import CommitTable, UnitStage, fill
from factory.stages.score import LocalGate, ScoreSamples
from factory.stages.synthesize import SynthesizeSamples

ROOT = Path(__file__).resolve().parents[2]
UNITS, ROWS = 50, 2
MADE_OF = {"made": "here"}


def recipe_of(overrides: Sequence[str], units: int = UNITS) -> Recipe:
    return load(
        "smoke",
        [*overrides, "plan.diagnoses=[nevus]", "plan.skin_types=[I]", f"plan.count={units * ROWS}", "plan.audit_min=8",
         f"plan.unit_rows={ROWS}", "plan.num_inference_steps=2", "synthesize.slots=2"],
    )  # fmt: skip


class Synthesized(UnitStage):
    """What `SynthesizeUnit` does, with the gate in this process."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        weights, gate = Path(recipe.synthesize.weights), Path(recipe.gate.weights)
        judge = LocalGate(ScoreSamples(gate, vae_digest_of(weights, None, "joint"), recipe.gate))
        self.planned = run.table("plan").finder("unit")
        self.synthesize = SynthesizeSamples(
            weights, None, recipe.synthesize, recipe.gate, judge, tree_digest(gate), "joint"
        )

    def rows(self, unit: int) -> pa.Table:
        return records.rows_to_table("samples", self.synthesize(self.planned(unit).to_pylist()))


def looped(stage: UnitStage, units: Sequence[int], commit: CommitTable) -> Iterator[dict[str, Any]]:
    """What `runtime/units.pool` yields, one unit after the other in this process."""
    for unit in units:
        yield from commit(stage(pa.table({"unit": [unit]}))).to_pylist()


def driven(
    run: Run,
    recipe: Recipe,
    units: int = UNITS,
    echo: Callable[[str], None] = lambda text: None,
    stage: UnitStage | None = None,
    seal: bool = True,
) -> None:
    """A driver's work under its lock, from wherever the run stands."""
    with line.driving(run.uri, recipe, "synthesize"):
        table, pool = run.table("samples"), functools.partial(looped, stage or Synthesized(run, recipe))
        fill(table, units, MADE_OF, units * ROWS, "synthesize", echo, pool)
        if seal:
            table.seal(units, MADE_OF, {"plan": run.table("plan").digest()})


def planned(folder: Path, recipe: Recipe) -> Run:
    run = Run(folder)
    line.plan(run, recipe, lambda text: None)
    return run


def parts(run: Run) -> dict[str, bytes]:
    return {path: run.store.read(path) for path in run.store.list("samples")}


@pytest.fixture(scope="module")
def recipe(tiny_weights: Any) -> Recipe:
    return recipe_of(tiny_weights.overrides)


@pytest.fixture(scope="module")
def calm(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The parts and the manifest of a run that nothing befell."""
    run = planned(tmp_path_factory.mktemp("calm") / "run", recipe)
    driven(run, recipe)
    return parts(run)


def main(folder: str, seed: str, weights: str, gate: str) -> None:
    """A driver that is killed at 20 random moments, each time begun again: forked, so that imports and the
    loading of weights are paid once."""
    recipe = recipe_of([f"synthesize.weights={weights}", f"gate.weights={gate}", "synthesize.adapter=none"])
    run, clock, kills, past_the_end = Run(folder), random.Random(int(seed)), 0, False
    stage = Synthesized(run, recipe)
    driven(Run(f"{folder}-warm"), recipe, 1, stage=stage, seal=False)  # whatever is imported late is there
    while kills < 20 and not past_the_end:
        child = os.fork()
        if not child:
            driven(run, recipe, stage=stage)
            os._exit(0)
        begun = len(run.table("samples").parts())
        while len(run.table("samples").parts()) == begun and not os.waitid(os.P_PID, child, EXITED):
            time.sleep(0.001)  # each gets so far as to commit a unit, so that 20 kills lie all over the run
        time.sleep(clock.uniform(0, 0.015))
        os.kill(child, signal.SIGKILL)
        past_the_end = os.waitpid(child, 0)[1] == 0
        kills += not past_the_end
    print(kills, len(run.table("samples").parts()))


EXITED = os.WEXITED | os.WNOHANG | os.WNOWAIT


def test_twenty_kills_at_random_moments_change_no_byte_and_make_nothing_twice(
    recipe: Recipe, calm: dict[str, bytes], tiny_weights: Any, tmp_path: Path
) -> None:
    run = planned(tmp_path / "run", recipe)
    command = [sys.executable, __file__, run.uri, "6", str(tiny_weights.generator), str(tiny_weights.gate)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    kills, there = map(int, done.stdout.split())
    assert kills == 20 and 20 <= there < UNITS, done.stdout
    before = {path: run.store.read(path) for path in run.store.list("samples")}
    assert before.items() <= calm.items()  # what was in place at the last kill is whole
    stamps = {path: (Path(run.uri) / path).stat().st_mtime_ns for path in before}
    said: list[str] = []
    driven(run, recipe, echo=said.append)
    made = sum(map(int, re.findall(r"(?:accepted|rejected|failed) (\d+)", said[-1])))
    assert made == (UNITS - there) * ROWS and f"{UNITS * ROWS}/{UNITS * ROWS} rows" in said[-1]
    assert {path: (Path(run.uri) / path).stat().st_mtime_ns for path in before} == stamps
    assert parts(run) == calm and run.verify() == []
    names = run.table("samples").read(["sample_id"])["sample_id"].to_pylist()
    assert names == run.table("plan").read(["sample_id"])["sample_id"].to_pylist() and len(set(names)) == UNITS * ROWS


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "found no space left; free some"), (errno.EROFS, "the folder is read-only")]
)
def test_a_disk_that_fills_or_turns_read_only_ends_the_command_with_a_sentence_and_it_goes_on_once_mended(
    tiny_weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    units, kept = 4, 2
    recipe = recipe_of(tiny_weights.overrides, units)
    run = planned(tmp_path / "run", recipe)
    asked: list[int] = []

    def refused(*arguments: Any, **more: Any) -> Any:
        raise OSError(number, os.strerror(number))

    class UntilFull(Synthesized):
        """The disk refuses every write from the third unit on."""

        def rows(self, unit: int) -> pa.Table:
            asked.append(unit)
            if len(asked) > kept:
                for owner, name in ((tempfile, "mkstemp"), (Path, "open"), (Path, "unlink")):
                    monkeypatch.setattr(owner, name, refused)
            return made[unit]

    stage, made = UntilFull(run, recipe), {}
    made |= {unit: Synthesized.rows(stage, unit) for unit in range(units)}  # drawn while reading was possible
    with pytest.raises(Stopped, match=rf"writing samples/part-000002.parquet \([\d,]+ bytes\) .*{says}") as stopped:
        driven(run, recipe, units, stage=stage)
    assert "\n" not in str(stopped.value)
    assert asked == [0, 1, 2]  # what comes after could not be kept, so it is not made
    monkeypatch.undo()
    assert run.table("samples").parts() == [0, 1]
    run.store.delete(LOCK_PATH)  # it could not be removed either; a driver that has ended is not in the way
    driven(run, recipe, units)
    assert run.table("samples").sealed().rows == units * ROWS and run.verify() == []


def test_what_stops_a_run_is_one_sentence_of_the_command_and_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    from factory.cli import _report

    with pytest.raises(SystemExit) as left:
        _report(Stopped("/run: writing samples/part-000002.parquet (5 bytes) found no space left; free some"))
    assert left.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_attempt_that_ends_after_its_unit_was_committed_changes_nothing_and_is_not_counted_again(
    tiny_weights: Any, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_weights.overrides, 2)
    run = planned(tmp_path / "run", recipe)
    table, stage = run.table("samples"), Synthesized(run, recipe)
    late = stage(pa.table({"unit": [1]}))  # made by one that was given up, and is still on its way
    said: list[str] = []
    pool = functools.partial(looped, stage)
    fill(table, 2, MADE_OF, 2 * ROWS, "synthesize", said.append, pool)
    before = parts(run), run.store.list(".parts"), table.parts()
    (found,) = CommitTable(table)(late).to_pylist()
    assert not found["won"] and not found["refused"] and found["stopped"] == ""
    assert (parts(run), run.store.list(".parts"), table.parts()) == before
    assert sum(table.seal(2, MADE_OF, {}).counts.values()) == 2 * ROWS
    # Where the late one comes first, the unit still counts once for the driver that waits for it.
    other = planned(tmp_path / "other", recipe)
    assert CommitTable(other.table("samples"))(late).to_pylist()[0]["won"]
    counted = ProgressLine("synthesize", ROWS, echo=said.append)
    counted.add(CommitTable(other.table("samples"))(stage(pa.table({"unit": [1]}))).to_pylist()[0])
    assert counted.done == ROWS and sum(counted.counts.values()) == ROWS
    assert Path(other.uri, table.part_path(1)).read_bytes() == Path(run.uri, table.part_path(1)).read_bytes()


SECOND = """
import sys, time
from factory.recipe import load
from factory import cli, line
try:
    with line.driving(sys.argv[1], load("smoke", []), "synthesize"):
        print("won", flush=True)
        time.sleep(60)
except Exception as error:
    cli._report(error)
"""


def test_of_two_drivers_of_one_run_one_works_and_the_other_says_so_and_leaves(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    drivers = [subprocess.Popen([sys.executable, "-c", SECOND, str(tmp_path)], **pipes) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while all(driver.poll() is None for driver in drivers) and time.monotonic() < deadline:
            time.sleep(0.05)
        ended = [driver for driver in drivers if driver.poll() is not None]
        assert len(ended) == 1
        (other,) = set(drivers) - set(ended)
        out, err = ended[0].communicate()
        assert ended[0].returncode == 2 and out == ""
        assert f"{tmp_path} is in use by another driver (process {other.pid} on " in err and err.count("\n") == 1
        assert other.stdout is not None and other.stdout.readline() == "won\n"
    finally:
        for driver in drivers:
            driver.kill()
            driver.communicate()


def test_a_clock_set_back_changes_nothing(
    recipe: Recipe, calm: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, began = planned(tmp_path / "run", recipe), time.monotonic()
    real, hours = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() - 3600.0 * 24 * next(hours))  # a day further back at each look
    monkeypatch.setattr(time, "gmtime", lambda *seconds: time.struct_time((1970, 1, 1, 0, 0, 0, 3, 1, 0)))
    driven(run, recipe)
    assert parts(run) == calm and run.verify() == []
    with run.lock(interval_s=0.05, stale_s=0.4) as held:
        with pytest.raises(ValueError, match="is in use by another driver"):
            run.lock(interval_s=0.05, stale_s=20.0).__enter__()
        assert not held.lost
    staged = Path(run.uri) / ".staging/left"
    staged.write_bytes(b"x")
    assert run.store.sweep(3600.0) == 0 and staged.exists()  # by the disk's clock it is fresh, whatever ours says
    os.utime(staged, (real() - 7200, real() - 7200))
    assert run.store.sweep(3600.0) == 1 and not staged.exists()
    assert time.monotonic() - began < 120


if __name__ == "__main__":
    main(*sys.argv[1:])
