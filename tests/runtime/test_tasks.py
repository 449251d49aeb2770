"""Tasks on a real Ray, DerMAE's cells: those of one process, beside each other, and errors in plain words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_dermae
import torch

from factory.evaluations import fit_dermae
from factory.lab import dermae
from factory.recipe import NetworkSection, Recipe
from factory.run import Run

pytestmark = pytest.mark.usefixtures("ray_cluster")

SECTION = tiny_dermae.SECTION.model_copy(update={"seeds": 1})


def _recipe(**changes: Any) -> Recipe:
    evaluate = Recipe().evaluate.model_copy(update={"dermae": SECTION.model_copy(update=changes)})
    return Recipe().model_copy(update={"evaluate": evaluate})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    found = Run(tmp_path / "run")
    for name, rows in (("corpus", tiny_dermae.corpus()), ("samples", tiny_dermae.samples())):
        found.table(name).commit(0, rows)
        found.table(name).seal(1, {"of": "test"}, {})
    return found


def _cells(folder: Path) -> dict[str, Any]:
    return {file.name: json.loads(file.read_text()) for file in (folder / dermae.CELLS).glob("*.json")}


def test_chains_beside_each_other_give_the_cells_of_one_process(run: Run, tmp_path: Path) -> None:
    said: list[str] = []
    fit_dermae(run, _recipe(), said.append)
    assert [line.split(",")[0] for line in said] == [
        *(f"dermae      pre-training {number} of 4" for number in range(1, 5)),  # two networks, two arms
        *(f"dermae      chain {number} of 4" for number in range(1, 5)),
    ]  # fmt: skip
    torch.set_num_threads(1)
    alone = tmp_path / "alone"
    dermae.run_table(
        Run(alone).store, alone, tiny_dermae.corpus(), tiny_dermae.samples(), SECTION, progress=lambda line: None
    )
    assert len(_cells(alone)) == 18 and _cells(Path(run.uri)) == _cells(alone)
    fit_dermae(run, _recipe(), said.append)
    assert len(said) == 8  # nothing is fitted twice


def test_a_mistake_on_a_worker_is_one_sentence(run: Run, tmp_path: Path) -> None:
    dermae.run_table(  # a checkpoint of another network
        Run(tmp_path / "other").store, tmp_path / "other", tiny_dermae.corpus(), tiny_dermae.samples(),
        SECTION.model_copy(update={"base": NetworkSection(model="test_vit2", patch_size=16)}),
        progress=lambda line: None,
    )  # fmt: skip
    (given,) = (tmp_path / "other" / dermae.FITS).glob("start-base-s0-*")
    weights = str(given / "model.safetensors")
    recipe = _recipe(base=NetworkSection(model="test_vit", patch_size=16, weights=weights))
    with pytest.raises(ValueError, match="checkpoint must hold the weights of this model at this size") as refused:
        fit_dermae(run, recipe, lambda line: None)
    assert "\n" not in str(refused.value) and "ray" not in str(refused.value).lower()
