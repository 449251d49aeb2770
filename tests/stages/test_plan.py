"""The plan: quotas, ids, units, audits and prompts, each counted independently of the code."""

from __future__ import annotations

from collections import Counter

import pytest

from factory import records, taxonomy
from factory.recipe import PlanSection
from factory.stages.plan import Look, looks_of, plan_rows, sample_rows, unit_rows
from factory.stages.quotas import quotas

LOOKS = {"melanoma": [Look("high", "high", ("black", "red")), Look("medium", "high", ("black",))]}


def rows(count: int = 100, fingerprint: str = "f", **keys: object) -> list[dict]:
    return list(plan_rows(PlanSection(count=count, **keys), fingerprint, LOOKS))


def test_a_hundred_over_eighteen_cells_are_six_for_ten_cells_and_five_for_eight():
    counts = Counter(quotas(PlanSection(count=100)).values())
    assert counts == {6: 10, 5: 8}


def test_every_cell_gets_its_quota_and_no_id_comes_twice():
    planned = rows()
    assert Counter((r["diagnosis"], r["skin_type"]) for r in planned) == Counter(quotas(PlanSection(count=100)))
    assert len({r["sample_id"] for r in planned}) == 100
    assert [r["index"] for r in planned] == list(range(100))


def test_seeds_come_from_ids_and_ids_from_the_fingerprint():
    first, other = rows(), rows(fingerprint="g")
    assert [r["seed"] for r in first] == [records.seed_of(r["sample_id"]) for r in first]
    assert not {r["sample_id"] for r in first} & {r["sample_id"] for r in other}


def test_a_longer_plan_begins_with_the_shorter_one_when_quotas_allow():
    short, long = rows(36), rows(72)
    assert [r["sample_id"] for r in short] == [r["sample_id"] for r in long[:36]]


def test_the_first_unit_holds_every_cell():
    planned = rows(200, unit_rows=64)
    assert {(r["diagnosis"], r["skin_type"]) for r in planned if r["unit"] == 0} == set(quotas(PlanSection(count=200)))


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (256, 128, 64),  # a small plan: never below 64
        (4000, 128, 500),  # an eighth of the plan
        (1_000_000, 128, 1024),  # never above 1024
        (1_000_000, 512, 116),  # 64 MiB over 2.2 bytes for each of 512 x 512 pixels
    ],
)
def test_a_unit_holds_what_64_mib_hold_within_bounds(count: int, size: int, expected: int):
    assert unit_rows(PlanSection(count=count, size=size)) == expected


def test_the_audit_share_is_two_percent_but_at_least_its_minimum_and_does_not_depend_on_order():
    assert sum(r["audit"] for r in rows(100, audit_min=16)) == 16
    assert sum(r["audit"] for r in rows(2000, audit_min=16)) == 40
    audited = {r["sample_id"] for r in rows(100) if r["audit"]}
    assert audited == set(sorted(r["sample_id"] for r in rows(100))[:16])


def test_prompts_use_the_looks_of_their_diagnosis_and_name_the_skin():
    for row in rows():
        assert taxonomy.SKIN_WORDS[row["skin_type"]] + " skin" in row["prompt"]
        assert ("asymmetry" in row["prompt"]) == (row["diagnosis"] == "melanoma")


def test_looks_are_levels_of_measured_attributes():
    rows = [{"diagnosis": "nevus", "asymmetry": 0.5, "border_irregularity": 0.0, "colors": ["red"]}]
    assert looks_of(rows) == {"nevus": [Look("high", "low", ("red",))]}


def test_samples_of_one_look_share_a_prompt_and_not_a_seed():
    wanted = sample_rows(
        count=3, diagnosis="melanoma", skin_type="V", asymmetry="high", border=None, colors=("black",),
        section=PlanSection(), seed=0,
    )  # fmt: skip
    assert len({r["prompt"] for r in wanted}) == 1
    assert len({r["seed"] for r in wanted}) == 3
    assert "brown skin, high asymmetry, color black" in wanted[0]["prompt"]


def test_an_unknown_diagnosis_is_refused_with_the_nearest_word():
    with pytest.raises(ValueError, match="did you mean 'melanoma'"):
        sample_rows(
            count=1, diagnosis="melanma", skin_type=None, asymmetry=None, border=None, colors=None,
            section=PlanSection(), seed=0,
        )  # fmt: skip


def test_prompt_banks_are_quotas_of_their_own_and_each_words_its_rows():
    looks = {"nevus": [Look("high", "low", ("red",))]}
    section = PlanSection(count=24, diagnoses=["nevus"], skin_types=["I", "V"], banks=["minimal", "standard"])
    found = list(plan_rows(section, "f", looks))
    assert Counter((row["skin_type"], row["bank"]) for row in found) == {
        (skin, bank): 6 for skin in ("I", "V") for bank in ("minimal", "standard")
    }
    for row in found:
        assert ("asymmetry" in row["prompt"]) == (row["bank"] == "standard")
    assert {row["bank"] for row in plan_rows(section.model_copy(update={"banks": []}), "f", looks)} == {None}
    with pytest.raises(ValueError, match="banks must be empty for balance prevalence"):
        PlanSection(banks=["minimal"], balance="prevalence")
    with pytest.raises(ValueError, match="sites needs bank extended .* got bank minimal, extended"):
        PlanSection(banks=["minimal", "extended"], sites=["hand"])
