"""Real fits on Ray Train: LoRA of a tiny generator, stopped once and resumed, on two workers, and loaded elsewhere."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from factory import images, phantom
from factory.fits.joint import FitLora
from factory.fits.loop import train
from factory.recipe import LoraSection, Recipe
from factory.stages.preview import DrawPreview, rows_of

pytestmark = pytest.mark.usefixtures("ray_cluster")

SECTION = LoraSection(steps=6, batch_size=4, rank=2, warmup_steps=1, checkpoint_every=2, learning_rate=1e-3)


def build(weights: Path, section: LoraSection) -> FitLora:
    drawn = [phantom.draw(7, index, 32) for index in range(6)]
    prompts = [f"a {one.diagnosis}" for one in drawn]
    encoded = [images.encode_png(one.image) for one in drawn], [images.encode_mask(one.mask) for one in drawn]
    return FitLora(weights, *encoded, prompts, section, 32)


class FallsOnce:
    """An objective whose fifth loss raises on a machine that has not seen it raise before; it counts its losses."""

    def __init__(self, inner: Any, diary: Path) -> None:
        self.inner, self.diary, self.examples = inner, diary, inner.examples

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def loss(self, *arguments: Any) -> Any:
        with self.diary.open("a") as out:
            out.write("loss\n")
        if self.diary.read_text().splitlines() == ["loss"] * 5:
            raise RuntimeError("the machine is gone")
        return self.inner.loss(*arguments)


def build_to_fall(weights: Path, section: LoraSection, diary: Path) -> FallsOnce:
    return FallsOnce(build(weights, section), diary)


@pytest.fixture(scope="module")
def fitted(tiny_weights: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a fit that fell in its fifth step and was resumed from its last checkpoint."""
    from ray import cloudpickle

    from factory.runtime import train as on_ray

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
    folder = tmp_path_factory.mktemp("fit")
    on_ray.fit(partial(build_to_fall, tiny_weights.generator, SECTION, folder / "diary"), SECTION, folder / "fit")
    return folder


def test_a_fit_whose_worker_falls_goes_on_from_its_last_checkpoint(fitted: Path) -> None:
    # Steps 1 to 4, the fifth that fell, and the fifth and sixth again: not all six again. A checkpoint travels while
    # the fit goes on, so that of step 4 may not have arrived when the fifth fell; then it is from the third on.
    assert len((fitted / "diary").read_text().splitlines()) in (5 + 2, 5 + 4)
    steps = [json.loads(row)["step"] for row in (fitted / "fit/metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]
    assert list((fitted / "fit/tensorboard").glob("events.*"))


def test_its_curve_is_that_of_a_fit_without_ray_and_without_a_fall(
    fitted: Path, tiny_weights: Any, tmp_path: Path
) -> None:
    train(build(tiny_weights.generator, SECTION), SECTION, tmp_path)
    for theirs, ours in zip(
        (fitted / "fit/metrics.jsonl").read_text().splitlines(),
        (tmp_path / "metrics.jsonl").read_text().splitlines(),
        strict=True,
    ):
        assert json.loads(theirs)["loss"] == pytest.approx(json.loads(ours)["loss"], abs=1e-4)


def drawing(weights: Path) -> DrawPreview:
    drawn = [phantom.draw(7, index, 32) for index in range(6)]
    recipe = Recipe.model_validate(
        {"plan": {"size": 32, "num_inference_steps": 2, "diagnoses": ["nevus", "melanoma"]}}, strict=False
    )
    images_of = [images.encode_png(one.image) for one in drawn]
    return DrawPreview(weights, "joint", recipe, rows_of(recipe), images_of, [str(number) for number in range(6)])


@pytest.fixture(scope="module")
def on_two(tiny_weights: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a fit on two workers, with grids."""
    from ray import cloudpickle

    from factory.runtime import train as on_ray
    from factory.runtime.preview import PreviewActor

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    folder = tmp_path_factory.mktemp("two")
    section = SECTION.model_copy(update={"num_workers": 2, "preview_every": 3})
    preview = partial(PreviewActor, folder, partial(drawing, tiny_weights.generator))
    on_ray.fit(partial(build, tiny_weights.generator, section), section, folder, build_preview=preview)
    return folder


def test_two_workers_that_share_the_batch_have_the_curve_of_one(
    on_two: Path, tiny_weights: Any, tmp_path: Path
) -> None:
    train(build(tiny_weights.generator, SECTION), SECTION, tmp_path)
    curves = [
        [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (on_two, tmp_path)
    ]
    for theirs, ours in zip(*curves, strict=True):
        assert theirs["step"] == ours["step"]
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-4)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-2)


def test_grids_are_drawn_beside_the_fit_by_an_actor_of_their_own(on_two: Path) -> None:
    grids = [images.read_png((on_two / f"previews/step-{step:06}.png").read_bytes()) for step in (3, 6)]
    # Two lines of four samples, each beside itself with its mask, 32 px and a border of 4.
    assert grids[0].shape == grids[1].shape == (2 * 36 + 4, 8 * 36 + 4, 3)
    assert (grids[0] != grids[1]).any()
    rows = [json.loads(row) for row in (on_two / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "memorised" in row] == [6]  # the grid of step 3 is settled at the next
    assert not list((on_two / "previews").glob("weights-*"))


def test_a_fit_that_is_done_is_not_run_again(fitted: Path, tiny_weights: Any) -> None:
    from factory.runtime import train as on_ray

    weights = (fitted / "fit/weights/pytorch_lora_weights.safetensors").read_bytes()
    before = (fitted / "diary").read_text()
    on_ray.fit(partial(build_to_fall, tiny_weights.generator, SECTION, fitted / "diary"), SECTION, fitted / "fit")
    assert (fitted / "diary").read_text() == before
    assert (fitted / "fit/weights/pytorch_lora_weights.safetensors").read_bytes() == weights


def test_the_adapter_loads_in_diffusers_own_pipeline_and_in_ours(fitted: Path, tiny_weights: Any) -> None:
    from diffusers import StableDiffusionPipeline

    from factory.models.joint import JointDenoiser

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_weights.generator, local_files_only=True)
    pipeline.load_lora_weights(fitted / "fit/weights", weight_name="pytorch_lora_weights.safetensors")
    assert list(pipeline.get_active_adapters()) != []
    ours = JointDenoiser.load(tiny_weights.generator, adapter=fitted / "fit/weights")
    base = JointDenoiser.load(tiny_weights.generator)
    latents = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 8, 16, 16))).float()
    text = base.condition(["a nevus"])
    drawn = [d.predict(latents, torch.tensor([500]), text, torch.ones(1), text).guided for d in (base, ours)]
    assert not torch.equal(*drawn)
    assert ours.vae_digest == base.vae_digest and ours.digest != base.digest


def build_wrongly(weights: Path, section: LoraSection) -> FitLora:
    build(weights, section).build()
    raise ValueError("fit.lora.rank must be at most that of the base, got 2; lower it.")


def test_what_a_worker_refuses_is_said_as_it_was_said_there(tiny_weights: Any, tmp_path: Path) -> None:
    from ray import cloudpickle

    from factory.runtime import train as on_ray

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(ValueError, match=r"^fit\.lora\.rank must be at most that of the base, got 2; lower it\.$"):
        on_ray.fit(partial(build_wrongly, tiny_weights.generator, SECTION), SECTION, tmp_path)
