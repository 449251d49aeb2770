"""`fit lora` of the class-conditional family up to where Ray Train takes over, and a run that draws with what was
fitted."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_classes import build_classes
from tiny_run import corpus_rows

from factory import line, recipe, records
from factory.fits.class_conditional import FitClassConditional
from factory.fits.loop import train
from factory.models.weights import STARTER
from factory.recipe import Recipe
from factory.run import Run
from factory.runtime import fit
from factory.runtime.weights import fitted_generator, weights_of
from factory.stages import plan


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Twelve phantoms, six of them for training, one of these without a diagnosis, and no captions."""
    found, rows = Run(str(tmp_path / "run")), corpus_rows(12, 32)
    rows[0]["diagnosis"] = None
    found.table("corpus").commit(0, records.rows_to_table("corpus", rows))
    found.table("corpus").seal(1, {"of": "test"}, {})
    return found


def asked(*overrides: str) -> Recipe:
    own = ["fit.lora.family=class_conditional", "fit.lora.train_mode=full", "plan.generator=class_conditional",
           "plan.size=32", "fit.lora.steps=1", "fit.lora.batch_size=2"]  # fmt: skip
    return recipe.load(None, [*own, *overrides])


def test_a_whole_fit_takes_the_bases_place_in_the_run_and_the_shipped_gate_judges_it(run: Run, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    wanted = asked("plan.num_inference_steps=2")
    inputs = fit._inputs(run, wanted, "lora")  # needs no captions
    assert inputs["classes"] == ["nevus", "melanoma", "seborrheic_keratosis"] and list(inputs["tables"]) == ["corpus"]
    objective = fit._objective(run.uri, wanted, "lora")
    assert isinstance(objective, FitClassConditional) and objective.dropped == {"no_diagnosis": 1}
    assert len(objective.examples) == 5 and sum(objective.counts.values()) == 5
    assert fitted_generator(run, wanted) == (STARTER, None)
    objective.save(train(objective, wanted.fit.lora, tmp_path / "fit"), tmp_path / "weights")
    fit._complete_card(run, wanted, "lora", tmp_path / "weights", inputs)
    card = json.loads((tmp_path / "weights" / "card.json").read_text())
    assert card["mode"] == "full" and card["licence"] == "Apache-2.0" and card["params"] > 5_000_000
    run.put_weights(fit.weights_name(wanted, "lora"), tmp_path / "weights")
    generator, adapter, gate = weights_of(run, wanted)
    assert generator == run.weights_dir("lora-class_conditional") and adapter is None and gate == STARTER / "gate"
    assert weights_of(run, asked("synthesize.adapter=none"))[0] == STARTER
    named = asked(f"synthesize.adapter={tmp_path / 'weights'}")
    assert weights_of(None, named)[:2] == (tmp_path / "weights", None)

    rows = plan.sample_rows(
        count=3, diagnosis="melanoma", skin_type=None, asymmetry=None, border=None, colors=None, section=wanted.plan,
        seed=0,
    )  # fmt: skip
    made = line.sample(run.uri, wanted, rows, tmp_path / "sheet.png")
    assert Counter(row["generator"] for row in made) == {"class_conditional": 3}
    assert all(row["image"] is not None and row.get("mask") is None for row in made)
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_a_gate_is_fitted_for_the_generator_that_was_fitted(run: Run, tmp_path: Path) -> None:
    build_classes("unet").save(tmp_path / "weights")
    (tmp_path / "weights" / "card.json").write_text(json.dumps({"mode": "full"}))
    run.put_weights("lora-class_conditional", tmp_path / "weights")
    objective = fit._objective(run.uri, asked("fit.gate.phantoms=2"), "gate")
    assert objective.vae_digest == build_classes("unet").vae_digest
    bases = [fit._inputs(run, asked(*more), "gate")["base"] for more in ([], ["synthesize.adapter=none"])]
    assert bases[0] != bases[1]


def test_a_lora_needs_a_base_of_classes_and_says_so_before_a_cluster_is_started(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_mode must be full on a base of joint, which has no network of classes"):
        fit._inputs(run, asked("fit.lora.train_mode=lora"), "lora")
    build_classes("unet").save(tmp_path / "base")
    named = [f"synthesize.weights={tmp_path / 'base'}", "fit.lora.train_mode=lora"]
    assert fit._inputs(run, asked(*named), "lora")["classes"]
    with pytest.raises(ValueError, match="must hold a base of joint for the family joint, got one of class_c"):
        fit._inputs(run, asked(*named, "fit.lora.family=joint"), "lora")


def test_a_change_of_the_section_is_a_change_of_this_fit_alone(run: Run) -> None:
    one, other = asked(), asked("fit.lora.class_conditional.prediction_type=epsilon")
    assert fit._inputs(run, one, "lora") != fit._inputs(run, other, "lora")
    flux = asked("fit.lora.flux.guidance=2.0")
    assert fit._inputs(run, one, "lora") == fit._inputs(run, flux, "lora")
