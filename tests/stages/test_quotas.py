"""Quotas by policy, the cap, acceptance and over-generation, with values worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from factory import records, taxonomy
from factory.prompts import Surroundings
from factory.recipe import PlanSection, RecipeError, load
from factory.runtime.plan import read_rates
from factory.stages.plan import PART_ROWS, Look, plan_rows, plan_tables
from factory.stages.quotas import (
    GROWTH,
    Tally,
    apportion,
    capped,
    cell_counts,
    is_impossible,
    next_round,
    quotas,
    rows_for,
    surely,
)

TWO = {"diagnoses": ["nevus", "melanoma"], "skin_types": ["I", "V"]}
COUNTS = {("nevus", "I"): 900, ("nevus", "V"): 0, ("melanoma", "I"): 64, ("melanoma", "V"): 36}


def section(**change: Any) -> PlanSection:
    return PlanSection(**(TWO | {"count": 100}) | change)


def test_the_root_of_900_64_and_36_images_shares_out_a_hundred_as_30_to_8_to_6() -> None:
    found = quotas(section(balance="square_root"), counts=COUNTS)
    # 68.18, 18.18 and 13.64: two whole ones are left over for .64 and, of the two .18, the first.
    assert found == {("nevus", "I"): 68, ("melanoma", "I"): 18, ("melanoma", "V"): 14}


def test_prevalence_repeats_the_corpus() -> None:
    found = quotas(section(balance="prevalence", count=1000), counts=COUNTS)
    assert found == {("nevus", "I"): 900, ("melanoma", "I"): 64, ("melanoma", "V"): 36}
    with pytest.raises(ValueError, match="plan.balance prevalence must have training images .* got none; ingest some"):
        quotas(section(balance="prevalence"))


def test_a_diagnosis_that_is_missed_three_times_as_often_gets_three_times_as_many() -> None:
    asked = section(balance="false_negative", false_negative_rates="x.json")
    found = quotas(asked, rates={"nevus": 0.1, "melanoma": 0.3, "vascular": 0.9})
    assert found == {
        ("nevus", "I"): 13,
        ("nevus", "V"): 13,
        ("melanoma", "I"): 37,
        ("melanoma", "V"): 37,
    }  # of 12.5 and 37.5
    with pytest.raises(ValueError, match="must hold a rate of every diagnosis and one above 0, got none of melanoma"):
        quotas(asked, rates={"nevus": 0.1})
    with pytest.raises(ValueError, match="and one above 0, got 0 of each"):
        quotas(asked, rates={"nevus": 0, "melanoma": 0})


def test_rates_are_read_as_numbers_or_as_lab_results_and_wrong_ones_are_refused() -> None:
    assert read_rates({"melanoma": 0.25}) == {"melanoma": 0.25}
    assert read_rates({"false_negative_rate": {"nevus": {"mean": 0.5, "low": 0.1}}}) == {"nevus": 0.5}
    with pytest.raises(ValueError, match="got 'melanma'; did you mean 'melanoma'"):
        read_rates({"melanma": 0.2})
    with pytest.raises(ValueError, match="must be rates from 0 to 1, got 7 for nevus; correct the file"):
        read_rates({"nevus": 7})
    with pytest.raises(ValueError, match="must hold a rate by diagnosis, got none"):
        read_rates([])


def explicit(**cells: int) -> list[str]:
    text = json.dumps({name.replace("__", "/"): count for name, count in cells.items()})
    return ["plan.balance=explicit", "plan.count=1", f"plan.cells={text}"]


def test_cells_are_taken_as_they_are_written() -> None:
    asked = load(None, explicit(melanoma__V=120, nevus__I=0)).plan
    assert quotas(asked) == {("melanoma", "V"): 120}
    assert asked.max_ratio == 3.0 and PlanSection().max_ratio is None


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (explicit(melanma__V=1), "'melanma'; did you mean 'melanoma'"),
        (explicit(melanoma__VII=1), "did you mean 'VI'"),
        (explicit(melanoma=1), "cells: must be named diagnosis/skin_type, got 'melanoma'"),
        (explicit(angioma__V=1), "angioma"),
        (explicit(vascular__V=1), "cells: must be of those in diagnoses, got 'vascular/V'; add vascular there"),
        (explicit(melanoma__V=0), "cells: must ask for at least one sample, got none"),
        (["plan.balance=explicit"], "cells: must be given exactly for balance explicit, got 0 for explicit"),
        (["plan.balance=false_negative"], "false_negative_rates: must name a JSON file exactly for balance"),
        (["plan.balance=sqare_root"], "plan.balance"),
        (["plan.sites=[hnad]", "plan.bank=extended"], "did you mean 'hand'"),
        (["plan.sites=[hand]"], "sites needs bank extended and a generator by text"),
        (["plan.lesion_sizes=[small]", "plan.bank=extended", "plan.generator=inpaint"], "planned mask is the lesion"),
    ],
)
def test_what_cannot_be_a_target_is_refused_with_the_nearest_right_one(overrides: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(None, overrides)
    assert sentence in str(caught.value)


def test_largest_remainders_get_what_is_left_and_the_sum_is_kept() -> None:
    assert apportion(10, {("a",): 1.0, ("b",): 1.0, ("c",): 1.0}) == {("a",): 4, ("b",): 3, ("c",): 3}
    for count in range(50):
        assert sum(apportion(count, {("a",): 0.1, ("b",): 0.7, ("c",): 0.2}).values()) == count


def test_the_cap_holds_where_there_are_real_images_and_nowhere_else() -> None:
    wanted = {("nevus", "I"): 100, ("nevus", "V"): 100, ("melanoma", "I"): 200, ("melanoma", "V"): 109}
    assert capped(wanted, COUNTS, 3.0) == wanted | {("melanoma", "I"): 192, ("melanoma", "V"): 108}
    assert capped(wanted, COUNTS, None) == wanted


def corpus(rows: list[dict[str, Any]]) -> pa.Table:
    names = ["diagnosis", "skin_type", "skin_type_scale", "ita", "site", "split", "outcome"]
    schema = pa.schema([records.CORPUS.field(name) for name in names] + [pa.field("relative_diameter", pa.float32())])
    usual = {"split": "train", "outcome": "accepted"}
    return pa.Table.from_pylist([{name: (usual | row).get(name) for name in schema.names} for row in rows], schema)


def test_images_are_counted_by_stated_skin_type_else_by_angle_else_shared_out() -> None:
    nevus = {"diagnosis": "nevus"}
    rows = [nevus | {"skin_type": "V", "skin_type_scale": "fst", "ita": 60.0}] * 3  # what is stated counts
    rows += [nevus | {"ita": 60.0}] * 9  # I
    rows += [nevus | {"ita": 20.0}] * 5  # IV, which is not asked for
    rows += [nevus | {"skin_type": "34", "skin_type_scale": "ddi", "ita": -20.0}]  # V: another scale's words
    rows += [nevus] * 13  # unknown: 9 to 4 is as 9 to 4
    rows += [{"diagnosis": "melanoma"}] * 3 + [{"diagnosis": "vascular", "ita": 60.0}, nevus | {"split": "test"}]
    counts, unknown = cell_counts(corpus(rows), section())
    assert counts == {("nevus", "I"): 18, ("nevus", "V"): 8, ("melanoma", "I"): 2, ("melanoma", "V"): 1}
    assert unknown == 16
    for bound in (*taxonomy.ITA_BOUNDS, 90.0, -90.0):
        expected = taxonomy.skin_type_of_ita(bound)
        only, _ = cell_counts(corpus([nevus | {"ita": bound}]), section(skin_types=list(taxonomy.SKIN_TYPES)))
        assert only["nevus", expected] == 1


def by_place() -> PlanSection:
    return PlanSection(
        diagnoses=["nevus"], skin_types=["I"], sites=["hand", "foot"], lesion_sizes=["small", "large"],
        bank="extended", count=8,
    )  # fmt: skip


def test_sites_and_sizes_are_cells_that_prompts_and_rows_name() -> None:
    looks = {"nevus": [Look("low", "low", ("red",), Surroundings("oral_genital", "medium-sized", "dermoscopic"))]}
    rows = list(plan_rows(by_place(), "f", looks))
    assert [(row["site"], row["lesion_size"]) for row in rows[:4]] == [
        ("hand", "small"), ("hand", "large"), ("foot", "small"), ("foot", "large"),
    ]  # fmt: skip
    for row in rows:
        assert row["site"] in row["prompt"] and row["lesion_size"] in row["prompt"]
        assert "dermoscopic" in row["prompt"] and "genital" not in row["prompt"]
    known = [{"diagnosis": "nevus", "ita": 60.0, "site": "foot", "relative_diameter": 0.1}] * 2
    counts, _ = cell_counts(corpus(known), by_place())
    assert counts["nevus", "I", "foot", "small"] == 2 and sum(counts.values()) == 2


def wilson_low(k: int, n: int, z: float = 1.959963984540054) -> float:
    p = k / n
    return (p + z * z / (2 * n) - z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)


def test_over_generation_divides_by_wilsons_lower_bound_and_by_the_prior_where_nothing_is_known() -> None:
    asked = section(overgenerate=True)
    assert rows_for(65, Tally(), asked) == 100  # 65 / .65
    assert rows_for(100, Tally(200, 130), asked) == math.ceil(100 / wilson_low(130, 200)) == 172
    assert surely(Tally(8, 1), 0.65) == pytest.approx(wilson_low(1 + 8, 20))  # .65 of the 12 that are missing is 8
    assert rows_for(7, Tally(), section()) == 7 and rows_for(0, Tally(), asked) == 0
    assert rows_for(10, Tally(30, 0), asked) == GROWTH * 30  # no evidence of anything: a few times more, not 500


def test_a_cell_is_impossible_when_the_upper_bound_is_below_the_least() -> None:
    assert not is_impossible(Tally(180, 0), 0.02)  # at most 2.09 %
    assert is_impossible(Tally(200, 0), 0.02)  # at most 1.88 %
    assert not is_impossible(Tally(19, 0), 0.5) and is_impossible(Tally(20, 0), 0.5)


def test_a_round_plans_what_is_short_within_the_budget_and_names_what_cannot_be() -> None:
    wanted = {("nevus", "I"): 10, ("nevus", "V"): 10, ("melanoma", "I"): 10, ("melanoma", "V"): 10}
    own = {("nevus", "I"): Tally(12, 10), ("nevus", "V"): Tally(10, 4), ("melanoma", "I"): Tally(400, 1),
           ("melanoma", "V"): Tally(10, 8)}  # fmt: skip
    found = next_round(section(), wanted, own, own, 432)
    assert found.planned == {("nevus", "V"): 6, ("melanoma", "V"): 2}
    assert found.impossible == {("melanoma", "I"): Tally(400, 1)} and found.cut == 0
    cut = next_round(section(max_samples=436), wanted, own, own, 432)
    assert cut.planned == {("nevus", "V"): 3, ("melanoma", "V"): 1} and cut.cut == 4


LOOKS = {
    "melanoma": [Look("high", "high", ("black", "red"),
                      Surroundings("hand", "small", "dermoscopic", ("dark corners",))),
                 Look("medium", "high", ("black",)), Look("medium", "high", ("black",))],
    "nevus": [Look("low", "low", ("red",), Surroundings("foot"))],
}  # fmt: skip
PINNED = [
    ({"count": 1000}, 1000, "ea28c85ef8abb93a470c2fd3e784b1f4"),
    ({"count": 1000, "bank": "extended", "unit_rows": 100, "size": 256}, 1000, "e6c659ac233169cd7806b497cde46ca9"),
    ({"balance": "largest", "diagnoses": ["nevus", "melanoma", "vascular"], "guidance": 3.3}, 91,
     "90ff1ba8dc212cf6b393ff0b9dc41f09"),
    ({"balance": "largest", "diagnoses": ["melanoma", "vascular"], "generator": "class_conditional",
      "skin_types": ["I", "IV"]}, 91, "fb5ab47b1b99a4167c6bf4069a9bc84d"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "count", "digest"), PINNED)
def test_plans_are_what_they_were_when_rows_were_made_one_by_one(keys: dict, count: int, digest: str) -> None:
    rows = list(plan_rows(PlanSection(**keys), "f", LOOKS, {"nevus": 53, "melanoma": 13, "vascular": 2}))
    before = [
        {name: value for name, value in row.items() if name not in ("site", "lesion_size", "bank")} for row in rows
    ]
    assert (len(rows), records.digest(json.dumps(before, sort_keys=True))) == (count, digest)


def test_many_ids_and_seeds_at_once_are_those_of_one_by_one() -> None:
    many = records.sample_ids('a "quoted" plan', range(7, 1007))
    assert [name.decode() for name in many] == [records.sample_id('a "quoted" plan', i) for i in range(7, 1007)]
    for salt in ("", "look"):
        expected = [records.seed_of(name.decode() + salt) for name in many]
        assert records.seeds_of(many, salt.encode()).tolist() == expected


def test_a_long_plan_comes_in_parts_that_go_on_where_the_last_one_ended(tmp_path: Path) -> None:
    parts = list(plan_tables(PlanSection(count=PART_ROWS + 10), "f", quotas(PlanSection(count=PART_ROWS + 10)), LOOKS))
    assert [len(part) for part in parts] == [PART_ROWS, 10]
    assert parts[1]["index"].to_pylist() == list(range(PART_ROWS, PART_ROWS + 10))
    assert parts[1]["unit"][0].as_py() == PART_ROWS // 1024
    assert parts[1]["sample_id"][0].as_py() == records.sample_id("f", PART_ROWS)


def test_images_count_for_the_banks_of_their_cell_in_equal_shares_and_skin_types_are_kept():
    rows = [{"diagnosis": "nevus", "ita": 60.0, "split": "train", "outcome": "accepted"}] * 101
    asked = section(skin_types=list(taxonomy.SKIN_TYPES), banks=["minimal", "extended"])
    counts, unknown = cell_counts(corpus(rows), asked)
    assert unknown == 0 and {cell: count for cell, count in counts.items() if count} == {
        ("nevus", "I", "minimal"): 51, ("nevus", "I", "extended"): 50,
    }  # fmt: skip
