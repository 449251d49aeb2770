"""Plans that balance a set, and plans of a generator by class, against the published counts of HAM10000."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from factory import line, records, taxonomy
from factory.recipe import PlanSection, load
from factory.run import Run
from factory.stages.plan import plan_rows, sample_rows, unit_rows
from factory.stages.quotas import class_counts, quotas

# Tschandl, Rosendahl and Kittler 2018 (arXiv 1803.10417), Table 1, by our words.
HAM10000 = {
    "nevus": 6705, "melanoma": 1113, "benign_keratosis": 1099, "basal_cell_carcinoma": 514, "ak_iec_mixed": 327,
    "vascular": 142, "dermatofibroma": 115,
}  # fmt: skip
# Four fifths of each class, rounded so that the sum is four fifths of the set.
TRAINING = dict(zip(HAM10000, (5364, 890, 879, 411, 262, 114, 92), strict=True))


def section(**change: Any) -> PlanSection:
    return PlanSection(**{"generator": "class_conditional", "balance": "largest", "diagnoses": list(HAM10000)} | change)


@pytest.mark.parametrize(("real", "wanted"), [(HAM10000, 36_920), (TRAINING, 29_536)])
def test_every_class_is_lifted_to_the_largest(real: dict[str, int], wanted: int) -> None:
    found = quotas(section(), real)
    assert sum(found.values()) == wanted == 7 * real["nevus"] - sum(real.values())
    for diagnosis, count in real.items():
        own = [found[diagnosis, skin_type] for skin_type in taxonomy.SKIN_TYPES]
        assert count + sum(own) == real["nevus"] and max(own) - min(own) <= 1
    types = [sum(found[diagnosis, skin_type] for diagnosis in real) for skin_type in taxonomy.SKIN_TYPES]
    assert max(types) - min(types) <= 1


def test_the_largest_class_need_not_be_asked_for() -> None:
    found = quotas(section(diagnoses=["dermatofibroma"], skin_types=["I", "II"]), HAM10000)
    assert found == {("dermatofibroma", "I"): 3295, ("dermatofibroma", "II"): 3295}


def test_a_plan_by_class_asks_for_the_diagnosis_alone_and_every_unit_holds_every_class_it_can() -> None:
    rows = list(plan_rows(section(unit_rows=1024), "f", {}, TRAINING))
    assert len(rows) == 29_536 and len({row["sample_id"] for row in rows}) == 29_536
    assert all(row["prompt"] == row["diagnosis"] and row["generator"] == "class_conditional" for row in rows)
    share = {name: (5364 - count) / 29_536 for name, count in TRAINING.items()}
    units = [Counter(row["diagnosis"] for row in unit) for _, unit in itertools.groupby(rows, lambda row: row["unit"])]
    for unit in units[:-1]:
        assert sum(unit.values()) == 1024
        # Six cells of a class, each off by less than one row.
        assert all(abs(unit[name] - 1024 * part) <= 6 for name, part in share.items())


def test_a_unit_is_cut_by_what_the_plan_holds_and_not_by_the_count_that_is_not_read() -> None:
    assert unit_rows(section(count=1), 29_536) == unit_rows(PlanSection(count=29_536)) == 1024
    assert next(iter(plan_rows(section(count=1), "f", {}, TRAINING)))["unit"] == 0


def corpus(run: Run, counts: dict[str, int]) -> None:
    """A sealed corpus with this many training images of each class, and others that do not count."""
    kinds = [(name, "train", None) for name, count in counts.items() for _ in range(count)]
    kinds += [("nevus", "test", None)] * 15 + [("nevus", "train", "blank")] * 21 + [("polyp", "train", None)] * 50
    rows = [
        {"row_id": records.row_id("s", str(number)), "record_id": f"{number:032d}", "source": "s",
         "source_id": str(number), "diagnosis": diagnosis, "split": split, "licence": "CC0", "reason": reason,
         "outcome": "accepted" if reason is None else "rejected"}
        for number, (diagnosis, split, reason) in enumerate(kinds)
    ]  # fmt: skip
    table = run.table("corpus")
    table.commit(0, records.rows_to_table("corpus", rows))
    table.seal(1, {"recipe": "f"}, {})


def test_the_line_plans_from_the_training_split(tmp_path: Path) -> None:
    run, said = Run(str(tmp_path)), []
    counts = {"nevus": 40, "melanoma": 13, "vascular": 2}
    corpus(run, counts)
    assert class_counts(run.table("corpus").read(["diagnosis", "split", "outcome"])) == counts
    wanted = ["plan.generator=class_conditional", "plan.balance=largest", f"plan.diagnoses={[*counts]}"]
    line.plan(run, load(None, [*wanted, "plan.count=64"]), said.append)
    rows = run.table("plan").read().to_pylist()
    assert Counter(row["diagnosis"] for row in rows) == {"melanoma": 27, "vascular": 38}
    assert said == ["plan        65 rows in 2 units over 12 cells"]
    line.plan(run, load(None, [*wanted, "plan.count=999"]), said.append)  # the same plan: the count is not read
    fingerprint = run.table("plan").sealed().fingerprint
    assert fingerprint["parents.corpus"] == run.table("corpus").origin() and "plan.count" not in fingerprint


def test_a_plan_of_equal_cells_keeps_the_ids_it_had_before_there_was_a_balance(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    line.plan(run, load(None), lambda text: None)
    rows = run.table("plan").read()
    assert rows["sample_id"][0].as_py() == "d70de8f6eaf73f6646928ff081a6a3e6"
    assert records.digest(*rows["sample_id"].to_pylist()) == "912752c2e498ad01c3a41132fc829fc7"
    assert "plan.balance" not in run.table("plan").sealed().fingerprint


def test_what_cannot_be_lifted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be in the corpus's training split .* got none of vascular; ingest some"):
        quotas(section(diagnoses=["melanoma", "vascular"]), {"nevus": 3, "melanoma": 1})
    with pytest.raises(ValueError, match="must have a class to lift, got 3 images of each of nevus, melanoma; choose"):
        quotas(section(diagnoses=["nevus", "melanoma"]), {"nevus": 3, "melanoma": 3})
    assert load(None, ["plan.balance=largest", "plan.count=1"]).plan.count == 1
    with pytest.raises(ValueError, match="plan.count: must give every cell at least one sample: 18 cells, got"):
        load(None, ["plan.count=1"])


def test_a_sample_by_class_has_no_look_to_ask_for() -> None:
    asked = {"count": 2, "diagnosis": "melanoma", "section": section(), "seed": 0}
    plain = {"skin_type": None, "asymmetry": None, "border": None, "colors": None}
    assert {row["prompt"] for row in sample_rows(**asked, **plain)} == {"melanoma"}
    with pytest.raises(ValueError, match="border must be left out for a class_conditional generator, .* got 'high'"):
        sample_rows(**asked, **(plain | {"border": "high"}))
