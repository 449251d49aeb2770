"""`fit lora` with `fit.lora.family: inpaint`, up to where Ray Train takes over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import captioned_run, corpus_rows
from tiny_sdxl import save_pipeline

from factory import recipe
from factory.fits.inpaint import FitInpaintLora
from factory.fits.loop import train
from factory.run import Run
from factory.runtime import fit
from factory.runtime.weights import weights_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Eight phantoms, four of them for training, one of which has no mask, and their captions."""
    rows = corpus_rows(8, 32)
    rows[0]["mask"] = None
    return captioned_run(tmp_path_factory.mktemp("run"), rows)


def asked(base: Path | str, *overrides: str) -> recipe.Recipe:
    own = ["fit.lora.family=inpaint", "plan.generator=inpaint", "fit.lora.steps=1", "fit.lora.batch_size=2"]
    return recipe.load(None, [f"synthesize.weights={base}", "plan.size=32", *own, *overrides])


def test_it_is_fitted_on_captioned_training_images_with_masks_and_drawn_with(run: Run, tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "base")
    wanted = asked(base)
    objective = fit._objective(run.uri, wanted, "lora")
    assert isinstance(objective, FitInpaintLora) and len(objective.examples) == 3 and objective.preset.rank == 4
    objective.save(train(objective, wanted.fit.lora, tmp_path / "fit"), tmp_path / "weights")
    inputs = fit._inputs(run, wanted, "lora")
    fit._complete_card(run, wanted, "lora", tmp_path / "weights", inputs)
    card = json.loads((tmp_path / "weights" / "card.json").read_text())
    assert card["objective"] == "lora" and card["inputs"] == inputs and card["num_images"] == 3
    run.put_weights(fit.weights_name(wanted, "lora"), tmp_path / "weights")
    assert run.weights() == ["lora-inpaint"] and weights_of(run, wanted)[1] is not None


def test_a_change_of_the_inpaint_section_is_a_change_of_its_fit_alone(run: Run) -> None:
    change = "fit.lora.inpaint.lambda_preserve=0.5"
    own, joint = [asked("starter"), asked("starter", change)], [recipe.load(None, some) for some in ([], [change])]
    assert fit._inputs(run, own[0], "lora") != fit._inputs(run, own[1], "lora")
    assert fit._inputs(run, joint[0], "lora") == fit._inputs(run, joint[1], "lora")


def test_a_joint_base_is_one_and_a_base_of_inpainting_is_no_joint_one(run: Run, tmp_path: Path) -> None:
    fit._inputs(run, asked("starter"), "lora")
    base = save_pipeline(tmp_path / "base", xl=False)
    with pytest.raises(ValueError, match="must hold a base of joint for the family joint, got one of inpaint in"):
        fit._inputs(run, asked(base, "fit.lora.family=joint"), "lora")
