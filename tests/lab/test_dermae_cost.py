"""What the table costs: operations by hand, tasks on workers, and the figures that the recipe states."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_dermae

from factory import recipe
from factory.lab import dermae
from factory.lab.dermae_cost import Costs, cost_lines, last_end
from factory.models.student import cost_at
from factory.recipe import NetworkSection
from factory.runtime.cluster import resources_of_yaml

ROOT = Path(__file__).resolve().parents[2]


def test_a_chain_holds_a_teacher_before_what_it_teaches_and_all_chains_hold_every_cell_once() -> None:
    chains = dermae.chains(tiny_dermae.SECTION)
    assert sorted(map(str, (cell for chain in chains for cell in chain))) == sorted(
        map(str, dermae.cells_of(tiny_dermae.SECTION))
    )
    for chain in chains:
        assert len({(cell.seed, cell.data, cell.start) for cell in chain}) == 1
        assert chain[0].network == dermae.LARGE
    once = tiny_dermae.SECTION.model_copy(update={"pretrain_each_seed": False})
    assert (len(dermae.pretrainings(tiny_dermae.SECTION)), len(dermae.pretrainings(once))) == (8, 4)


def test_operations_are_three_forwards_a_step_and_one_of_a_teacher() -> None:
    section = tiny_dermae.SECTION
    kinds = {kind.name: kind for kind in Costs(section).kinds()}
    shown = section.student.steps * section.student.batch_size
    student, teacher = cost_at("test_efficientnet", 7, 32).flops, cost_at("test_vit", 7, 32, patch_size=8).flops
    assert kinds["test_efficientnet alone"].flops == 4 * 3 * student * shown
    assert kinds["test_efficientnet taught"].flops == 8 * (3 * student + teacher) * shown
    costs, tuned = Costs(section), section.pretrain.steps * section.pretrain.batch_size
    masked = [costs._forward(name, True) for name in ("large", "base")]  # one model, two sizes of patch
    assert masked[0] != masked[1] and kinds["mae of test_vit"].flops == 4 * 3 * sum(masked) * tuned
    assert sum(kind.flops for kind in kinds.values()) == pytest.approx(3600e12 * costs.hours(1, 1.0)[1])
    assert {name: kind.count for name, kind in kinds.items()} == {
        "mae of test_vit": 8, "fine-tuning of test_vit": 8, "test_vit alone": 8, "test_vit taught": 8,
        "test_efficientnet alone": 4, "test_efficientnet taught": 8,
    }  # fmt: skip
    whole = section.model_copy(update={"student": section.student.model_copy(update={"targets": "whole_image"})})
    asked_once = {kind.name: kind.flops for kind in Costs(whole).kinds()}
    assert asked_once["test_efficientnet taught"] == 2 * kinds["test_efficientnet alone"].flops


def test_a_masked_encoder_sees_a_quarter_of_its_patches() -> None:
    large = NetworkSection(model="vit_base_patch16_224")
    section = tiny_dermae.SECTION.model_copy(update={"large": large, "base": large, "image_size": 224, "seeds": 1})
    costs = Costs(section)
    masked, whole = costs._forward("large", True), costs._forward("large", False)
    assert 0.24 * whole < masked < 0.30 * whole  # 49 of 196 patches and the class token, then a small decoder


@pytest.mark.parametrize(
    ("durations", "workers", "end"), [([3, 2, 2], 1, 7), ([3, 2, 2], 2, 4), ([3, 2, 2], 8, 3), ([], 2, 0)]
)
def test_each_worker_takes_the_next_task(durations: list[float], workers: int, end: float) -> None:
    assert last_end(durations, workers) == end


def test_hours_are_unknown_until_a_rate_is_given_and_fall_with_workers() -> None:
    (last,) = cost_lines(tiny_dermae.SECTION, 2, "core", None, None)[-1:]
    assert "hours unknown: say evaluate.dermae.tflops" in last
    costs = Costs(tiny_dermae.SECTION)
    (wall, spent), (alone, same) = costs.hours(4, 1.0), costs.hours(1, 1.0)
    assert wall < alone == pytest.approx(spent) == pytest.approx(same)


@pytest.mark.parametrize("cluster", ["workstation", "rayjob"])
def test_the_recipe_states_what_it_costs_on_each_cluster(cluster: str) -> None:
    text = (ROOT / "jobs/recipes/dermae.yaml").read_text()
    section = recipe.load("dermae", []).evaluate.dermae
    gpus = resources_of_yaml(ROOT / f"cluster/{cluster}.yaml").gpus
    lines = cost_lines(section, gpus, "GPU", section.tflops, None)
    stated = [re.sub(r"^# {2,}", "", line) for line in text.splitlines() if line.startswith("#   ")]
    assert [line for line in lines[:-1] if line not in stated] == []
    wall, spent = Costs(section).hours(gpus, section.tflops or 0)
    assert f"{cluster}.yaml, {gpus} GPU(s): {wall:,.0f} h, {spent:,.0f} GPU-hours" in text


def test_the_command_prints_the_cost_and_makes_no_run(factory_command: Callable[..., Any], tmp_path: Path) -> None:
    cluster = ["--cluster", ROOT / "cluster/rayjob.yaml"]
    said = factory_command(
        "evaluate", "dermae-table", "--run", tmp_path / "none", "--recipe", "smoke", "--dry-run", *cluster
    )
    assert said.status == 0 and "hours unknown: say evaluate.dermae.tflops" in said.out
    assert not (tmp_path / "none").exists()
    refused = factory_command("evaluate", "worth", "--run", tmp_path / "none", "--dry-run")
    assert refused.status != 0 and "--dry-run must go with `evaluate dermae-table`, got worth" in refused.err
