"""Attempts at a unit are counted where a dying process cannot take them along, and failed rows are planned again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from factory import line, records
from factory.progress import FailedRows, ProgressLine, Stopped
from factory.recipe import Recipe, SynthesizeSection, load
from factory.run import Run, read_events
from factory.runtime.attempts import ACTOR_DIED, ERROR, EXIT_STATUS, TIMED_OUT, Attempt, Attempts
from factory.runtime.retry import failed_rows, plan_failed
from factory.runtime.shared_slots import SharedSlots
from factory.runtime.synthesize import SynthesizeUnit, _tell_failed
from factory.runtime.units import MAX_FAILED_IN_A_ROW, fill
from factory.storage import open_store

SMALL = ["plan.diagnoses=[nevus, melanoma]", "plan.skin_types=[I, V]", "plan.count=12", "plan.audit_min=1",
         "plan.unit_rows=4"]  # fmt: skip
Outcome = Callable[[dict[str, Any]], tuple[str, str | None]]


def marks(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".attempts/samples").glob("*"))


def test_a_mark_that_stays_is_an_attempt_that_took_its_process_along(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert Attempts(store, "samples", "one").begin(7) == Attempt(7, 1)
    assert Attempts(store, "samples", "one").begin(7) == Attempt(7, 2, 1, ACTOR_DIED)  # of the process that came after
    assert Attempts(store, "samples", "one").begin(8) == Attempt(8, 1)  # which was not begun before
    third = Attempts(store, "samples", "one").begin(7)
    assert third.spent == 2 and marks(tmp_path) == [
        "000007-one-1.json", "000007-one-2.json", "000007-one-3.json", "000008-one-1.json",
    ]  # fmt: skip
    Attempts(store, "samples", "one").forget(third)
    assert marks(tmp_path) == ["000008-one-1.json"]
    assert Attempts(store, "samples", "one").begin(7) == Attempt(7, 1)


def test_how_an_attempt_ended_is_kept_where_its_process_could_tell(tmp_path: Path) -> None:
    attempts = Attempts(open_store(tmp_path), "samples", "one")
    attempts.end(attempts.begin(3), TIMED_OUT, "in sleep")
    assert attempts.begin(3) == Attempt(3, 2, 1, TIMED_OUT, "in sleep")
    assert attempts.begin(3) == Attempt(3, 3, 2, ACTOR_DIED)


def test_neither_another_drive_nor_a_lost_machine_speaks_against_a_unit(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    Attempts(store, "samples", "killed").begin(5)
    assert Attempts(store, "samples", "again").begin(5) == Attempt(5, 1)
    Attempts(store, "samples", "spot", "lost").begin(5)
    here = Attempts(store, "samples", "spot", "here", is_there=lambda name: name == "here")
    assert here.begin(5) == Attempt(5, 2, 0)
    assert here.begin(5) == Attempt(5, 3, 1, ACTOR_DIED)


@pytest.mark.parametrize(("sleep", "status"), [(60, EXIT_STATUS), (0, 0)])
def test_the_watchdog_ends_its_process_and_says_where_it_was(tmp_path: Path, sleep: int, status: int) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom factory.runtime.attempts import watchdog\n"
        f"def hangs():\n    time.sleep({sleep})\n"
        "with watchdog(0.3, Path(sys.argv[1]).write_text):\n    hangs()\nwith watchdog(None, print):\n    pass\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "late"], timeout=300)
    assert done.returncode == status
    assert (tmp_path / "late").exists() == bool(sleep)
    if sleep:
        assert "in hangs" in (tmp_path / "late").read_text()


# ------------------------------------------------------------------------------------------------------ a unit


class Unit(SynthesizeUnit):
    """The unit without Ray and without a network: `work` is told of a unit and a try, the base class does the rest.
    Rows are drawn two units at once, of which the second ends first."""

    def __init__(self, run: Run, work: Callable[[int, int], None], drive: str = "one", max_attempts: int = 3) -> None:
        self.run, self.section = run, SynthesizeSection(max_attempts=max_attempts)
        self._of_unit, self._begun = run.table("plan").finder("unit"), {}
        self.backgrounds = None
        self.attempts = Attempts(run.store, "samples", drive)
        self.work, self.tries, self.halved = work, 0, 0
        self.order: list[int] = []  # units as their rows were drawn
        self.synthesize = self  # type: ignore[assignment]  # what `made` asks of the stage is below
        self.slots = SharedSlots(self.stream, self._begin_among_others, self._fell, self._watched)  # type: ignore[arg-type]

    def __call__(self, rows: Any) -> Any:
        if isinstance(rows, pa.Table):
            return super().__call__(rows)
        unit = rows[0]["unit"]
        self.tries += 1
        self.work(unit, self.tries)
        self.order.append(unit)
        return made(rows, lambda row: (records.ACCEPTED, None)).to_pylist()

    def stream(self, units: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        under_way: list[tuple[int, Any]] = []
        while under_way or (first := next(units, None)) is not None:
            under_way = under_way or [first]
            if (second := next(units, None)) is not None:
                under_way.append(second)
            unit, rows = under_way.pop()
            yield unit, self(rows)

    def finished(self, drawn: Any) -> Any:
        return drawn

    def failed(self, rows: list[dict[str, Any]], reason: str) -> list[dict[str, Any]]:
        return made(rows, lambda row: (records.FAILED, reason)).to_pylist()

    def halve(self) -> bool:
        self.halved += 1
        return True


def made(rows: list[dict[str, Any]], outcome: Outcome) -> pa.Table:
    kept = [{name: value for name, value in row.items() if name != "mask"} for row in rows]
    return records.rows_to_table(
        "samples", [r | dict(zip(("outcome", "reason"), outcome(r), strict=True)) for r in kept]
    )


@pytest.fixture
def planned(tmp_path: Path) -> Run:
    """A run of three units of four samples."""
    run = Run(tmp_path)
    line.plan(run, load(None, SMALL), lambda text: None)
    return run


def raises(times: int) -> Callable[[int, int], None]:
    def work(unit: int, tries: int) -> None:
        if unit == 1 and tries <= times:
            raise KeyError(f"try {tries}")

    return work


def test_a_unit_that_raises_is_tried_again_and_made(planned: Run, tmp_path: Path) -> None:
    unit = Unit(planned, raises(2))
    rows, failure = unit.made(1)
    assert (unit.tries, unit.halved, failure) == (3, 0, "") and set(rows["outcome"].to_pylist()) == {"accepted"}
    assert marks(tmp_path) == []
    ended = [event for event in read_events(planned.store) if event["event"] == "attempt_ended"]
    assert sorted((event["unit"], event["spent"], event["reason"]) for event in ended) == [(1, 1, ERROR), (1, 2, ERROR)]
    assert all("Traceback" in event["text"] and "KeyError: 'try " in event["text"] for event in ended)


def test_a_unit_that_raises_each_time_is_given_up_with_its_text(planned: Run, tmp_path: Path) -> None:
    unit = Unit(planned, raises(99))
    rows, failure = unit.made(1)
    assert unit.tries == 3 and failure == "error: KeyError: 'try 3'"
    assert set(zip(rows["outcome"].to_pylist(), rows["reason"].to_pylist(), strict=True)) == {("failed", "error")}
    assert rows["sample_id"].to_pylist() == [row["sample_id"] for row in unit.planned(1)]
    assert unit.made(0)[1] == "" and unit.tries == 4


def test_a_unit_that_was_given_up_is_not_tried_again_by_who_comes_after_until_the_drive_is_over(
    planned: Run, tmp_path: Path
) -> None:
    """Its process may die, by another unit's fault, before its failed rows are handed on."""
    given_up = Unit(planned, raises(99)).made(1)
    for _ in range(2):
        after = Unit(planned, raises(99))
        assert after.made(1) == given_up and after.tries == 0
    assert len([event for event in read_events(planned.store) if event["event"] == "attempt_ended"]) == 3
    other = Attempts(planned.store, "samples", "another")
    other.begin(1)
    after.attempts.clear()
    assert marks(tmp_path) == ["000001-another-1.json"]


@pytest.mark.parametrize(("last", "reason"), [(None, ACTOR_DIED), (TIMED_OUT, TIMED_OUT)])
def test_a_unit_whose_process_ends_each_time_is_given_up_unseen_the_last_try_with_half_the_slots(
    planned: Run, last: str | None, reason: str
) -> None:
    def killed(unit: int, tries: int) -> None:
        raise KeyboardInterrupt  # nothing in `made` may catch what ends a process

    for number in (1, 2, 3):
        process = Unit(planned, killed)
        with pytest.raises(KeyboardInterrupt):
            process.made(2)
        assert process.halved == (number == 3)
        if last:
            process.attempts.end(Attempt(2, number), last, "where")
    fourth = Unit(planned, killed)
    rows, failure = fourth.made(2)
    assert fourth.tries == 0 and failure == (f"{reason}: where" if last else reason)
    assert set(rows["reason"].to_pylist()) == {reason}
    again = Unit(planned, lambda unit, tries: None, drive="two", max_attempts=1)
    assert again.made(2)[1] == "" and again.halved == 0


def test_what_asks_for_the_run_to_be_stopped_still_does(planned: Run) -> None:
    def stops(unit: int, tries: int) -> None:
        raise Stopped("enough")

    assert Unit(planned, stops)._made(1) == (None, "enough", "")


# --------------------------------------------------------------------------------------------- several units at once


def at_once(unit: Unit, *units: int) -> dict[int, str]:
    """The units, each in a thread of its own, and what they failed by. They wait in the order that is given here."""
    with ThreadPoolExecutor(len(units)) as threads, unit.slots._turn:  # none draws before all wait
        asked = {}
        for number in units:
            waiting = len(unit.slots._waiting)
            asked[number] = threads.submit(unit.made, number)
            while len(unit.slots._waiting) == waiting and not unit._is_drawn_apart(number):
                time.sleep(0.001)
    found = {number: future.result(timeout=60) for number, future in asked.items()}
    for number, (rows, _) in found.items():
        assert rows["sample_id"].to_pylist() == [row["sample_id"] for row in unit.planned(number)]
    return {number: failure for number, (_, failure) in found.items()}


def test_units_of_several_threads_are_drawn_by_one_of_them_for_all(planned: Run, tmp_path: Path) -> None:
    unit = Unit(planned, lambda number, tries: None)
    assert at_once(unit, 0, 1, 2) == {0: "", 1: "", 2: ""}
    assert unit.order == [1, 2, 0] and unit.tries == 3 and marks(tmp_path) == []


def test_an_error_among_several_units_counts_when_it_is_met_again_apart(planned: Run, tmp_path: Path) -> None:
    def always(number: int, tries: int) -> None:
        if number == 1:
            raise KeyError("a mistake")

    unit = Unit(planned, always, max_attempts=2)
    assert at_once(unit, 0, 1, 2) == {0: "", 1: "error: KeyError: 'a mistake'", 2: ""}
    assert sorted(unit.order) == [0, 2] and unit.tries == 1 + 1 + 2 + 1
    events = [(event["event"], event.get("unit"), event.get("units")) for event in read_events(planned.store)]
    assert sorted(events, key=str) == [*[("attempt_ended", 1, None)] * 2, ("drawn_apart", None, [0, 1])]
    once = Unit(planned, raises(1), "two")
    assert at_once(once, 0, 1, 2) == {0: "", 1: "", 2: ""}


def test_what_stops_the_run_stops_each_unit_that_was_under_way(planned: Run, tmp_path: Path) -> None:
    def stops(number: int, tries: int) -> None:
        raise Stopped("enough")

    with pytest.raises(Stopped, match="enough"):
        at_once(Unit(planned, stops), 0, 1)


def test_what_was_under_way_when_a_process_ended_is_drawn_apart(planned: Run, tmp_path: Path) -> None:
    def killed(number: int, tries: int) -> None:
        if number == 1:
            raise KeyboardInterrupt  # nothing may catch what ends a process

    with pytest.raises(KeyboardInterrupt):
        Unit(planned, killed).made(1)
    assert marks(tmp_path) == ["000001-one-1.json"]
    again = Unit(planned, lambda number, tries: None)
    assert at_once(again, 0, 1, 2) == {0: "", 1: "", 2: ""}
    assert sorted(again.order) == [0, 1, 2] and marks(tmp_path) == []
    third = Unit(planned, killed, "three", max_attempts=1)  # one attempt each: whose it was must be known
    with pytest.raises(KeyboardInterrupt):
        third.made(1)
    assert at_once(Unit(planned, killed, "three", max_attempts=1), 1, 0) == {1: ACTOR_DIED, 0: ""}


# ------------------------------------------------------------------------------------------------------ a run


def synthesized(run: Run, outcome: Outcome) -> list[int]:
    """Commits and seals the planned units that are missing, drawn by nobody. Which they were."""
    table, plan = run.table("samples"), run.table("plan")
    units = max(plan.read(["unit"])["unit"].to_pylist()) + 1
    missing = table.missing(units)
    table.require({"of": "plan"})
    for unit in missing:
        rows = [row for row in plan.read().to_pylist() if row["unit"] == unit]
        table.commit(unit, made(rows, outcome))
    table.seal(units, {"of": "plan"}, {"plan": plan.digest()})
    return missing


def second_of_unit_one(row: dict[str, Any]) -> tuple[str, str | None]:
    return ("failed", "actor_died") if row["index"] in (4, 5, 7) else ("accepted", None)


def test_failed_rows_are_planned_again_as_a_round_of_just_those(planned: Run) -> None:
    recipe, said = load(None, SMALL), list[str]()
    first = planned.table("plan").sealed()
    assert synthesized(planned, second_of_unit_one) == [0, 1, 2]
    assert failed_rows(planned) == {"actor_died": 3}
    assert plan_failed(planned, recipe, said.append) and "round 1: 3 rows in 1 units" in said[-1]
    rows = planned.table("plan").read().to_pylist()
    again, failed = rows[12:], [rows[index] for index in (4, 5, 7)]
    assert sorted(row["retry_of"] for row in again) == sorted(row["sample_id"] for row in failed)
    cell_of = {row["sample_id"]: (row["diagnosis"], row["skin_type"]) for row in failed}
    assert all(cell_of[row["retry_of"]] == (row["diagnosis"], row["skin_type"]) for row in again)
    assert {(row["round"], row["unit"]) for row in again} == {(1, 3)}
    sealed = planned.table("plan").sealed()
    assert sealed.origin == first.digest and sealed.fingerprint == first.fingerprint
    assert failed_rows(planned) == {}  # each is planned again, so nothing of them is open
    assert plan_failed(planned, recipe, said.append)  # as a command that was stopped here finds it
    assert planned.table("plan").sealed() == sealed
    assert synthesized(planned, lambda row: ("accepted", None)) == [3]
    assert not plan_failed(planned, recipe, said.append) and planned.verify() == []
    assert planned.table("samples").counts() == {"accepted": 12, "failed": 3}


def test_a_round_of_retries_that_was_stopped_while_it_was_planned_goes_on(planned: Run, tmp_path: Path) -> None:
    recipe = load(None, SMALL)
    synthesized(planned, second_of_unit_one)
    plan_failed(planned, recipe, lambda text: None)
    whole = (tmp_path / "plan/part-000001.parquet").read_bytes()
    frozen = (tmp_path / ".parts/plan/_ROUND-1.json").read_bytes()
    (tmp_path / "plan/_MANIFEST.json").write_bytes((tmp_path / ".parts/plan/_MANIFEST-0.json").read_bytes())
    (tmp_path / "plan/part-000001.parquet").unlink()
    assert plan_failed(planned, recipe, lambda text: None)
    assert (tmp_path / "plan/part-000001.parquet").read_bytes() == whole
    assert (tmp_path / ".parts/plan/_ROUND-1.json").read_bytes() == frozen and planned.verify() == []


def test_a_retry_that_fails_is_planned_again_in_turn(planned: Run) -> None:
    recipe = load(None, SMALL)
    synthesized(planned, second_of_unit_one)
    plan_failed(planned, recipe, lambda text: None)
    synthesized(planned, lambda row: ("failed", "error"))
    assert failed_rows(planned) == {"error": 3}
    assert plan_failed(planned, recipe, lambda text: None)
    rows = planned.table("plan").read().to_pylist()
    assert {row["retry_of"] for row in rows[15:]} == {row["sample_id"] for row in rows[12:15]}


def test_retries_are_refused_before_the_plan_is_made_and_of_another_word(planned: Run, factory_command: Any) -> None:
    planned.write_header(load(None, SMALL))
    said = factory_command("synthesize", "--run", planned.uri, "--retry", "failed")
    assert said.status == 2 and f"got samples that are not; run `factory synthesize --run {planned.uri}`" in said.err
    said = factory_command("synthesize", "--run", planned.uri, "--retry", "rejected")
    assert said.status == 2 and "--retry must be a known word, got 'rejected'; choose one of failed" in said.err
    synthesized(planned, lambda row: ("accepted", None))
    said = factory_command("synthesize", "--run", planned.uri, "--retry", "failed")
    assert said.status == 0 and "no row has failed, or all were planned again: nothing to do" in said.out


def test_errors_end_the_command_with_their_number_and_first_text(planned: Run) -> None:
    synthesized(planned, lambda row: ("failed", "error") if row["unit"] == 1 else second_of_unit_one(row))
    made, said = ProgressLine("synthesize", 12, echo=print), list[str]()
    _tell_failed(planned, made, said.append)  # made by an earlier command, which has said so
    assert said == [
        f"failed      4 rows: error 4; `factory synthesize --retry failed --run {planned.uri}` makes them again"
    ]
    for failure in ("out_of_memory", "error: KeyError: 'a'", "error: KeyError: 'b'"):
        made.add({"accepted": 0, "rejected": 0, "failed": 4, "failure": failure})
    with pytest.raises(FailedRows, match=r"4 rows failed by an error, the first: error: KeyError: 'a'; events/ has"):
        _tell_failed(planned, made, said.append)


def test_unit_after_unit_that_fails_ends_the_run(tmp_path: Path) -> None:
    table, begun = Run(tmp_path).table("samples"), list[int]()

    def pool(bad: Callable[[int], bool]) -> Any:
        def committed(units: list[int], commit: Any) -> Any:
            for unit in units:
                begun.append(unit)
                failure = "error: ValueError: no" if bad(unit) else ""
                rows = [{"sample_id": f"s{unit}", "unit": unit, "outcome": "failed", "reason": "error"}]
                table.commit(unit, records.rows_to_table("samples", rows))
                yield {"accepted": 0, "rejected": 0, "failed": 1, "failure": failure}

        return committed

    def filled(recipe_bad: Callable[[int], bool]) -> ProgressLine:
        return fill(table, 20, {"of": "x"}, 20, "synthesize", lambda text: None, pool(recipe_bad))

    with pytest.raises(Stopped, match="ended after 5 failed units in a row, the last by error: ValueError: no"):
        filled(lambda unit: True)
    assert begun == [*range(MAX_FAILED_IN_A_ROW)]
    made = filled(lambda unit: unit % 5 < 4)  # never five in a row
    assert begun == [*range(20)] and len(made.failures) == 12
    assert json.dumps(made.counts) == '{"accepted": 0, "rejected": 0, "failed": 15}'


def test_limits_of_attempts_are_those_of_the_recipe() -> None:
    recipe: Recipe = load(None, ["synthesize.max_attempts=1", "synthesize.unit_timeout_s=2.5"])
    assert (recipe.synthesize.max_attempts, recipe.synthesize.unit_timeout_s) == (1, 2.5)
    for wrong in ("max_attempts=0", "unit_timeout_s=0"):
        with pytest.raises(ValueError, match=f"synthesize.{wrong.partition('=')[0]}"):
            load(None, [f"synthesize.{wrong}"])
