"""Rounds of a plan on made-up samples: what is short is planned again, until it is met, spent or impossible."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from factory import line, records
from factory.recipe import Recipe, load
from factory.run import Run
from factory.runtime.plan_cost import MADE, Estimate, measured

CELLS = ["plan.diagnoses=[nevus, melanoma]", "plan.skin_types=[I, V]", "plan.count=40", "plan.audit_min=1"]
ROUNDS = [*CELLS, "plan.overgenerate=true", "plan.max_rounds=null", "plan.acceptance=0.5"]
Verdict = Callable[[dict[str, Any]], str]


def synthesized(run: Run, verdict: Verdict) -> list[int]:
    """Makes and seals the planned units that are missing, each row with a verdict; no image is drawn. The units."""
    plan, table = run.table("plan"), run.table("samples")
    rows = plan.read().to_pylist()
    units = rows[-1]["unit"] + 1
    fingerprint = {"parents.plan": plan.origin()}
    table.require(fingerprint)
    missing = table.missing(units)
    for unit in missing:
        made = [
            {name: value for name, value in row.items() if name != "mask"}
            | {"outcome": (outcome := verdict(row)), "reason": None if outcome == "accepted" else "low_iou"}
            for row in rows
            if row["unit"] == unit
        ]
        table.commit(unit, records.rows_to_table("samples", made))
    table.seal(units, fingerprint, {"plan": plan.digest()})
    return missing


def accepts(share: Callable[[dict[str, Any]], float]) -> Verdict:
    """Accepts the share of a row's cell, drawn by the row's own seed."""
    return lambda row: "accepted" if row["seed"] / 2**63 < share(row) else "rejected"


def planned(run: Run, recipe: Recipe) -> list[str]:
    said: list[str] = []
    line.plan(run, recipe, said.append)
    return said


def by_cell(run: Run, table: str = "plan", **only: Any) -> Counter[tuple[str, str]]:
    rows = run.table(table).read(["diagnosis", "skin_type", *only]).to_pylist()
    return Counter((r["diagnosis"], r["skin_type"]) for r in rows if all(r[k] == v for k, v in only.items()))


def test_rounds_go_on_until_every_cell_has_its_quota_and_then_stop(tmp_path: Path) -> None:
    run, recipe = Run(tmp_path), load(None, ROUNDS)
    planned(run, recipe)
    assert set(by_cell(run).values()) == {20}  # 10 of each, half of which are expected to pass
    first = run.table("plan").sealed()
    shares = {("nevus", "I"): 0.9, ("nevus", "V"): 0.5, ("melanoma", "I"): 0.3, ("melanoma", "V"): 0.15}
    verdict = accepts(lambda row: shares[row["diagnosis"], row["skin_type"]])
    assert synthesized(run, verdict) == [0, 1]
    for _ in range(20):
        before, said = run.table("plan").sealed(), planned(run, recipe)
        if any("every quota is met; 0 accepted samples are short" in text for text in said):
            break
        rows = run.table("plan").read().to_pylist()
        short = {c for c in shares if by_cell(run, "samples", outcome="accepted")[c] < 10}
        added = rows[before.rows :]
        assert {(row["diagnosis"], row["skin_type"]) for row in added} == short
        assert [row["index"] for row in rows] == list(range(len(rows)))
        assert min(row["unit"] for row in added) == rows[before.rows - 1]["unit"] + 1
        made = synthesized(run, verdict)
        assert made == sorted({row["unit"] for row in added})  # of the new round only
    else:
        pytest.fail("twenty rounds did not meet the quotas")
    assert min(by_cell(run, "samples", outcome="accepted").values()) >= 10
    rows = run.table("plan").read().to_pylist()
    assert len({row["sample_id"] for row in rows}) == len(rows) and rows[-1]["round"] >= 1
    sealed = run.table("plan").sealed()
    assert sealed.predecessors[0] == first.digest == sealed.origin and sealed.parts[:1] == first.parts
    assert run.verify() == [] and f"in {rows[-1]['round'] + 1} rounds" in "\n".join(line.status(run))
    assert planned(run, recipe)[-1] == f"plan        {len(rows)} rows in {rows[-1]['unit'] + 1} units over 4 cells"


def test_status_raises_an_alarm_for_a_cell_that_is_rejected_too_often_while_it_is_made(tmp_path: Path) -> None:
    run, recipe = Run(tmp_path), load(None, ROUNDS)
    planned(run, recipe)
    synthesized(run, accepts(lambda row: 0.0 if row["diagnosis"] == "melanoma" else 1.0))
    told = [text for text in line.status(run) if text.startswith("ALARM")]
    assert [text.split(":")[0] for text in told] == [
        "ALARM      rejected_too_often, melanoma I", "ALARM      rejected_too_often, melanoma V",
    ]  # fmt: skip
    assert "20 of 20 rejected, surely above" in told[0]
    text = line.metrics_of(run)
    assert f'factory_run_alarms{{kind="rejected_too_often",run="{run.uri}"}} 2.0' in text
    assert f'factory_run_alarms{{kind="scores_drift",run="{run.uri}"}} 0.0' in text
    assert f'factory_run_samples{{outcome="rejected",run="{run.uri}"}} 40.0' in text


def test_a_cell_that_is_never_accepted_is_named_and_not_planned_for_ever(tmp_path: Path) -> None:
    run, recipe = Run(tmp_path), load(None, ROUNDS)
    verdict = accepts(lambda row: 0.0 if row["skin_type"] == "V" else 1.0)
    planned(run, recipe)
    said: list[str] = []
    for _ in range(10):
        synthesized(run, verdict)
        said = planned(run, recipe)
        if any(text.startswith("rounds") for text in said):
            break
    made = by_cell(run)["melanoma", "V"]
    assert said[-2] == "rounds      no further one: what is short cannot be made; 20 accepted samples are short"
    assert (
        f"impossible  melanoma/V: 0 of {made} accepted (0.0%), surely below plan.min_acceptance 0.02; it is planned no "
        "more"
    ) in said
    assert made == 20 + 80 + 400 and by_cell(run)["melanoma", "I"] == 20  # four times what was tried, each time


def test_budgets_end_the_rounds_and_may_be_raised(tmp_path: Path) -> None:
    run, verdict = Run(tmp_path), accepts(lambda row: 0.2)
    planned(run, load(None, [*ROUNDS, "plan.max_samples=60"]))
    assert run.table("plan").sealed().rows == 60
    synthesized(run, verdict)
    assert any(
        "plan.max_samples (60) is spent" in text for text in planned(run, load(None, [*ROUNDS, "plan.max_samples=60"]))
    )
    capped = load(None, [*ROUNDS, "plan.max_samples=75"])
    said = planned(run, capped)
    assert said[-1].startswith("plan        round 1: 15 rows in 1 units over ") and said[0].startswith("cut  ")
    assert any("is planned and not made" in text for text in planned(run, load(None, ROUNDS)))
    synthesized(run, verdict)
    said = planned(run, load(None, [*ROUNDS, "plan.max_rounds=2"]))
    assert any("no further one: plan.max_rounds (2) is spent" in text for text in said)
    assert run.table("plan").sealed().rows == 75


def test_one_round_is_the_default_and_changes_nothing_once_it_is_made(tmp_path: Path) -> None:
    run, recipe = Run(tmp_path), load(None, CELLS)
    assert planned(run, recipe) == ["plan        40 rows in 1 units over 4 cells"]
    digest = run.table("plan").digest()
    synthesized(run, accepts(lambda row: 0.0))
    assert planned(run, recipe) == ["plan        40 rows in 1 units over 4 cells"]
    assert run.table("plan").digest() == digest


def test_a_round_that_was_stopped_goes_on_as_it_was_decided(tmp_path: Path) -> None:
    run, recipe = Run(tmp_path / "a"), load(None, ROUNDS)
    planned(run, recipe)
    synthesized(run, accepts(lambda row: 0.3))
    before = run.store.read("plan/_MANIFEST.json")
    planned(run, recipe)
    whole = run.table("plan").digest()
    run.store.replace("plan/_MANIFEST.json", before)  # stopped before it was sealed, and its part lost
    run.store.delete(run.table("plan").part_path(1))
    planned(run, load(None, [*ROUNDS, "plan.max_samples=81"]))  # a budget of later does not change it
    assert run.table("plan").digest() == whole and run.verify() == []


def test_failed_samples_are_planned_again_by_name(tmp_path: Path) -> None:
    run, recipe = Run(tmp_path), load(None, [*CELLS, "plan.max_rounds=3"])
    planned(run, recipe)
    failing = {row["sample_id"] for row in run.table("plan").read().to_pylist()[:3]}
    synthesized(run, lambda row: "failed" if row["sample_id"] in failing else "accepted")
    planned(run, recipe)
    again = run.table("plan").read().to_pylist()[40:]
    assert {row["retry_of"] for row in again} == failing and len(again) == 3
    assert {row["sample_id"] for row in again}.isdisjoint(failing)
    cell_of = {row["sample_id"]: (row["diagnosis"], row["skin_type"]) for row in run.table("plan").read().to_pylist()}
    assert all(cell_of[row["retry_of"]] == (row["diagnosis"], row["skin_type"]) for row in again)


def test_another_runs_samples_say_what_the_first_round_may_expect(tmp_path: Path) -> None:
    known, run = Run(tmp_path / "known"), Run(tmp_path / "run")
    planned(known, load(None, [*CELLS, "plan.count=400"]))
    synthesized(known, lambda row: "accepted" if row["skin_type"] == "I" or row["index"] % 8 < 4 else "rejected")
    planned(run, load(None, [*ROUNDS, f"plan.acceptance_from={known.uri}"]))
    found = by_cell(run)
    assert found["nevus", "I"] == 11  # 100 of 100: at least .963
    accepted, made = by_cell(known, "samples", outcome="accepted")["nevus", "V"], 100
    assert found["nevus", "V"] > 10 * made / accepted


def test_verify_misses_a_predecessor_that_was_removed_or_edited(tmp_path: Path) -> None:
    run, recipe = Run(tmp_path), load(None, ROUNDS)
    planned(run, recipe)
    synthesized(run, accepts(lambda row: 0.3))
    planned(run, recipe)
    assert run.verify() == []
    path = ".parts/plan/_MANIFEST-0.json"
    kept = run.store.read(path)
    run.store.delete(path)
    assert ["predecessor 0" in text and "was removed" in text for text in run.verify()] == [True]
    run.store.replace(path, run.store.read("plan/_MANIFEST.json"))
    assert "is not what plan/_MANIFEST.json names" in run.verify()[0]
    run.store.replace(path, kept.replace(b'"rows": 80', b'"rows": 81', 1))
    assert "cannot be trusted" in run.verify()[0]


def test_a_cap_is_counted_on_the_corpus_and_each_capped_cell_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path)
    kinds = [("nevus", "I")] * 30 + [("melanoma", "I")] * 2 + [("melanoma", "V")]
    rows = [
        {"row_id": str(i), "record_id": str(i), "source": "s", "source_id": str(i), "diagnosis": d, "skin_type": t,
         "skin_type_scale": "fst", "split": "train", "licence": "CC0", "outcome": "accepted"}
        for i, (d, t) in enumerate(kinds)
    ]  # fmt: skip
    run.table("corpus").commit(0, records.rows_to_table("corpus", rows))
    run.table("corpus").seal(1, {"f": "g"}, {})
    said = planned(run, load(None, [*CELLS, "plan.max_ratio=3"]))
    assert said[:2] == [
        "capped      melanoma/I from 10 to 6: 3 for each of 2 real images",
        "capped      melanoma/V from 10 to 3: 3 for each of 1 real images",
    ]
    assert by_cell(run) == {("nevus", "I"): 10, ("nevus", "V"): 10, ("melanoma", "I"): 6, ("melanoma", "V"): 3}
    assert run.table("plan").sealed().fingerprint["parents.corpus"] == run.table("corpus").origin()


def test_the_table_says_what_each_cell_costs_and_a_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    run, said = Run(tmp_path / "run"), list[str]()
    wanted = [*ROUNDS, "plan.images_per_s=0.5", "plan.price_per_gpu_hour=1.5"]
    line.preview(run, load(None, wanted), echo=said.append)
    assert not (tmp_path / "run").exists() or run.store.list("") == []
    assert said[0].split() == ["cell", "real", "wanted", "accepted", "planned", "expected", "hours"]
    assert said[1].split() == ["nevus/I", "0", "10", "0", "20", "10.0", "0.006"]  # 20 images at 1 per s
    assert said[5].split() == ["all", "0", "40", "0", "80", "40.0", "0.022"]
    assert said[6] == (
        "cost        80 images at 1 images/s by plan.images_per_s on 2 actor(s), 2 GPU(s): 0.02 h, 0.04 GPU-hours, "
        "0.07 at 1.5 per GPU-hour"
    )
    assert "unknown on 2 actor(s)" in Estimate(None, "", 2, 2.0).line(5)


def test_the_rate_is_measured_where_there_is_something_to_measure(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert measured(run) is None
    for rows, seconds, actors in ((100, 10.0, 2), (20, 5.0, 4)):
        with run.events() as events:
            events.write(MADE, step="synthesize", rows=rows, seconds=seconds, actors=actors)
    assert measured(run) == 120 / (20 + 20)


def test_rates_of_a_file_are_part_of_what_the_plan_is_made_from(tmp_path: Path) -> None:
    run, path = Run(tmp_path / "run"), tmp_path / "rates.json"
    path.write_text(json.dumps({"nevus": 0.1, "melanoma": 0.3}))
    asked = [*CELLS, "plan.balance=false_negative", f"plan.false_negative_rates={path}"]
    planned(run, load(None, asked))
    assert by_cell(run)["melanoma", "V"] == 15
    path.write_text(json.dumps({"nevus": 0.1, "melanoma": 0.2}))
    with pytest.raises(ValueError, match="plan.false_negative_rates was .*, is .*; use another --run"):
        planned(run, load(None, asked))
    with pytest.raises(ValueError, match="must be a JSON file, here or in the run, got lab/none.json"):
        planned(run, load(None, [*asked[:-1], "plan.false_negative_rates=lab/none.json"]))
