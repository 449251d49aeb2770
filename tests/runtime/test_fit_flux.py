"""`fit lora` with `fit.lora.family: flux`, up to where Ray Train takes over: what is fitted, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_flux import LENGTH, save_pipeline
from tiny_run import captioned_run, corpus_rows

from factory import recipe, records
from factory.fits.flux import FitFluxLora
from factory.fits.loop import train
from factory.models.flux import FluxDenoiser
from factory.recipe import Recipe
from factory.run import Run
from factory.runtime import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Eight phantoms, four of them for training, one of which has no mask, and their captions."""
    rows = corpus_rows(8, 32)
    rows[0]["mask"] = None
    return captioned_run(tmp_path_factory.mktemp("run"), rows)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("flux"))


def asked(base: Path, *overrides: str) -> Recipe:
    own = {"preset": "null", "max_sequence_length": LENGTH, "base_dtype": "float32", "scales": "[16, 32]"}
    flux = [f"fit.lora.flux.{name}={value}" for name, value in own.items()]
    return recipe.load(
        None,
        ["fit.lora.family=flux", f"synthesize.weights={base}", "fit.lora.steps=1", "plan.size=32", *flux, *overrides],
    )


def test_it_is_fitted_on_every_captioned_training_image_with_or_without_a_mask(
    run: Run, base: Path, tmp_path: Path
) -> None:
    wanted = asked(base, "fit.lora.batch_size=2", "fit.lora.caption_dropout=0")
    objective = fit._objective(run.uri, wanted, "lora")
    assert isinstance(objective, FitFluxLora) and objective.scales == [16, 32]
    assert len(objective.examples) == 4
    flux = FluxDenoiser.load(base, max_sequence_length=LENGTH)
    captions = [f"caption {k}" for k in (0, 1, 4, 5)]
    found = objective.examples.batch(np.arange(4))["condition"]
    np.testing.assert_allclose(found.numpy(), flux.condition(captions).numpy(), atol=1e-5)
    assert run.store.list("cache/text")
    objective.save(train(objective, wanted.fit.lora, tmp_path / "fit"), tmp_path / "weights")
    inputs = fit._inputs(run, wanted, "lora")
    fit._complete_card(run, wanted, "lora", tmp_path / "weights", inputs)
    card = json.loads((tmp_path / "weights" / "card.json").read_text())
    assert card["objective"] == "lora" and card["params"] == 16 * 22 * 64 and card["inputs"] == inputs
    assert fit.weights_name(wanted, "lora") == "lora-flux"


def test_a_change_of_the_flux_section_is_a_change_of_a_flux_fit_alone(run: Run, base: Path) -> None:
    one, other = asked(base), asked(base, "fit.lora.flux.guidance=2.0")
    assert fit._inputs(run, one, "lora") != fit._inputs(run, other, "lora")
    joint = [recipe.load(None, changed) for changed in ([], ["fit.lora.flux.guidance=2.0"])]
    assert fit._inputs(run, joint[0], "lora") == fit._inputs(run, joint[1], "lora")


def test_a_base_of_another_family_is_refused_before_a_cluster_is_started(run: Run, base: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"synthesize.weights must hold a base of flux for the family flux, got one of joint in .*starter; set",
    ):
        fit._inputs(run, asked(base, "synthesize.weights=starter"), "lora")
    with pytest.raises(ValueError, match=r"must hold a base of joint for the family joint, got one of flux in"):
        fit._inputs(run, asked(base, "fit.lora.family=joint"), "lora")


def test_images_without_captions_are_refused(run: Run, base: Path, tmp_path: Path) -> None:
    bare = Run(str(tmp_path))
    for name, rows in {"corpus": corpus_rows(4, 32), "captions": []}.items():
        bare.table(name).commit(0, records.rows_to_table(name, rows))
        bare.table(name).seal(1, {"of": "test"}, {})
    with pytest.raises(
        ValueError, match="fit lora must have training images with captions, got none; ingest and caption"
    ):
        fit._objective(bare.uri, asked(base), "lora")
    with pytest.raises(ValueError, match="fit lora must have training images with masks and captions, got none"):
        fit._objective(bare.uri, recipe.load(None, []), "lora")
