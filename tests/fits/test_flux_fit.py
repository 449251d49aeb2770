"""LoRA on a tiny FLUX.1 of the real classes: what it sees, what it learns, and that it goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from tiny_flux import LENGTH, save_pipeline
from torch import Tensor, nn

from factory.fits.encoded import encode
from factory.fits.flux import FitFluxLora, FluxEncoder, ScaledExamples, noise_levels, square
from factory.fits.loop import train
from factory.fits.objective import RowNoise, batch_rows
from factory.fits.presets import PRESETS
from factory.images import encode_png
from factory.models.flux import FluxDenoiser
from factory.models.sampler import SampleJob, Sampler
from factory.recipe import FluxSection, LoraSection
from factory.storage import open_store

SECTION = LoraSection(
    family="flux", steps=6, batch_size=3, learning_rate=1e-2, warmup_steps=1, checkpoint_every=2, caption_dropout=0.2,
    flux=FluxSection(
        preset=None, scales=[16, 32], max_sequence_length=LENGTH, base_dtype="float32", gradient_checkpointing=False
    ),
)  # fmt: skip


def picture(number: int, width: int = 16, height: int = 16) -> bytes:
    """A disk of its own colour on skin of its own."""
    rng = np.random.default_rng(number)
    skin, lesion = rng.integers(120, 250, 3), rng.integers(20, 120, 3)
    y, x = np.mgrid[:height, :width]
    inside = (x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2
    return encode_png(np.where(inside[..., None], lesion, skin).astype(np.uint8))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("flux"))


SIDES = [(16, 16)] * 5 + [(40, 32)] * 2


def fit(base: Path, sides: Sequence[tuple[int, int]] = SIDES, cache: Any = None, **change: Any) -> FitFluxLora:
    section = SECTION.model_copy(update=change)
    images = [picture(number, *size) for number, size in enumerate(sides)]
    return FitFluxLora(base, images, [f"lesion {number}" for number in range(len(sides))], section, 16, cache)


def flux(**change: Any) -> FluxSection:
    return SECTION.flux.model_copy(update=change)


def curve(directory: Path) -> list[dict[str, float]]:
    """The logged metrics without what a clock says."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def adapter(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if ".lora_" in name}


def error(objective: FitFluxLora, model: nn.Module) -> float:
    """The loss at noise that no step has seen."""
    with torch.no_grad():
        rows = np.arange(5)
        found = [
            objective.loss(model, objective.examples.batch(rows), RowNoise(1, step, rows))["loss"] for step in range(8)
        ]
        return float(torch.stack(found).mean())


def test_the_loss_falls_and_the_base_stays_as_it_was(base: Path, tmp_path: Path) -> None:
    objective = fit(base, steps=60, checkpoint_every=60, flux=flux(preset="dermaflux_released", scales=[16]))
    fresh = objective.build()
    frozen = {name: value.clone() for name, value in fresh.named_parameters() if not value.requires_grad}
    first = error(objective, fresh)
    model = train(objective, objective.section, tmp_path)
    assert error(objective, model) < 0.9 * first
    assert frozen and all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())
    assert {name.split(".lora_")[0] for name in adapter(model)} and all(
        ".lora_" in name for name, value in model.named_parameters() if value.requires_grad
    )


class StopsAt(FitFluxLora):
    """Pulls the plug in the middle of a step."""

    calls, stop_at = 0, 3

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls - 1 == self.stop_at:
            raise InterruptedError("pulled the plug")
        return super().loss(model, batch, noise)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(base: Path, tmp_path: Path, ema_decay: float) -> None:
    section = SECTION.model_copy(update={"ema_decay": ema_decay})
    whole = adapter(train(fit(base), section, tmp_path / "whole", log_every=1))
    images = [picture(number, *size) for number, size in enumerate(SIDES)]
    cut = StopsAt(base, images, [f"lesion {number}" for number in range(len(images))], section, 16)
    with pytest.raises(InterruptedError):
        train(cut, section, tmp_path / "cut", log_every=1)
    resumed = adapter(train(fit(base), section, tmp_path / "cut", log_every=1))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert whole.keys() == resumed.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert any(value.abs().max() > 0 for name, value in whole.items() if "lora_B" in name)


def test_checkpointing_of_gradients_changes_no_gradient(base: Path, tmp_path: Path) -> None:
    plain = adapter(train(fit(base), SECTION, tmp_path / "plain"))
    saving = fit(base, flux=flux(gradient_checkpointing=True))
    found = adapter(train(saving, saving.section, tmp_path / "saving"))
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)


def test_the_librarys_pipeline_draws_with_the_fit_what_the_factory_draws(base: Path, tmp_path: Path) -> None:
    objective = fit(base, learning_rate=0.05)
    model = train(objective, objective.section, tmp_path / "fit")
    objective.save(model, tmp_path / "weights")
    denoiser = FluxDenoiser.load(base, tmp_path / "weights", max_sequence_length=LENGTH)
    job = SampleJob("x", 5, denoiser.condition(["a nevus"])[0], 3.5, 4)
    found = next(iter(Sampler(denoiser, width=16, height=16, slots=1, decode="all").run([job]))).image
    pipeline = FluxPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
        "guidance_scale": 3.5,
        "max_sequence_length": LENGTH,
    }

    def draw() -> Tensor:
        rng = torch.Generator().manual_seed(5)
        return pipeline("a nevus", generator=rng, output_type="pt", **options).images[0]

    without = draw()
    pipeline.load_lora_weights(tmp_path / "weights")
    assert found is not None
    torch.testing.assert_close((found + 1) / 2, draw(), rtol=0, atol=1e-4)
    assert (without - draw()).abs().max() > 1e-3
    again = adapter(objective.load(tmp_path / "weights"))
    assert all(torch.equal(again[name], value) for name, value in adapter(model).items())
    card = json.loads((tmp_path / "weights" / "card.json").read_text())
    assert (card["rank"], card["scales"], card["num_images"]) == (16, [16, 32], 7)


def test_an_image_is_fitted_at_the_largest_scale_it_fills_and_never_enlarged(base: Path) -> None:
    images = [picture(k, *size) for k, size in enumerate([(16, 16), (12, 40), (40, 32), (31, 90), (64, 64)])]
    rows = encode(FluxEncoder(base, [32, 16]), images)
    assert [bucket["latents"].shape for bucket in rows.buckets] == [(2, 4, 8, 8), (2, 4, 16, 16)]
    assert rows.index.tolist() == [0, 3, 2, 4] and rows.dropped == {"too_small": 1}


def test_the_middle_square_is_taken_and_scaled() -> None:
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 200
    assert (square(wide, 2) == 200).all() and square(wide, 2).shape == (2, 2, 3)


def test_a_row_whose_latents_are_not_finite_is_left_out_and_counted(base: Path, tmp_path: Path) -> None:
    # Half precision ends at 65,504: with this scaling one image's latents go beyond it and the other's do not.
    images = [picture(number) for number in range(4)]
    peaks = np.abs(encode(FluxEncoder(base, [16]), images).buckets[0]["latents"]).max(axis=(1, 2, 3)).tolist()
    worst, second = sorted(peaks)[-1], sorted(peaks)[-2]
    other = save_pipeline(tmp_path / "base")
    config = json.loads((other / "vae" / "config.json").read_text())
    config["scaling_factor"] *= 65504 / ((worst + second) / 2)
    (other / "vae" / "config.json").write_text(json.dumps(config))
    prompts = [f"lesion {number}" for number in range(4)]
    objective = FitFluxLora(other, images, prompts, SECTION.model_copy(update={"flux": flux(scales=[16])}), 16)
    assert objective.dropped == {"non_finite_latents": 1} and len(objective.examples) == 3
    kept = [prompt for prompt, peak in zip(prompts, peaks, strict=True) if peak != worst]
    found = objective.examples.batch(np.arange(3))
    assert torch.isfinite(found["latents"]).all()
    changed = FluxDenoiser.load(other, max_sequence_length=LENGTH)
    torch.testing.assert_close(found["condition"], changed.condition(kept), rtol=0, atol=1e-5)


def test_noise_levels_are_logit_normal_and_shifted_as_in_sampling(base: Path) -> None:
    rows = np.arange(4000)
    plain, shifted = noise_levels(RowNoise(0, 0, rows), 1.0), noise_levels(RowNoise(0, 0, rows), 3.0)
    logit = torch.logit(plain)
    assert logit.mean().abs() < 0.05 and (logit.std() - 1).abs() < 0.05
    # A shift of the levels adds log(shift) to their logits.
    torch.testing.assert_close(torch.logit(shifted), logit + np.log(3.0), rtol=0, atol=1e-3)
    objective = fit(base, sides=[(32, 32)] * 2)
    denoiser = FluxDenoiser.load(base, max_sequence_length=LENGTH)
    latents = objective.examples.batch(np.array([0]))["latents"]
    assert objective.shift(latents) == denoiser.shift(32, 32) != denoiser.shift(16, 16)


def test_a_dropped_caption_is_the_empty_prompts(base: Path) -> None:
    objective, rows = fit(base), np.arange(3)
    model = objective.build().eval()
    batch = objective.examples.batch(rows)
    dropping = fit(base, caption_dropout=1.0)
    empty = FluxDenoiser.load(base, max_sequence_length=LENGTH).condition([""])
    bare = batch | {"condition": empty.expand_as(batch["condition"])}
    with torch.no_grad():
        found = dropping.loss(model, batch, RowNoise(0, 0, rows))["loss"]
        wanted = objective.loss(model, bare, RowNoise(0, 0, rows))["loss"]
        kept = fit(base, caption_dropout=0.0).loss(model, batch, RowNoise(0, 0, rows))["loss"]
    torch.testing.assert_close(found, wanted)
    assert found != kept


def test_the_guidance_embedding_is_one_in_training(base: Path) -> None:
    assert FluxSection().guidance == 1.0
    objective, rows = fit(base, caption_dropout=0.0), np.arange(2)
    model, batch = objective.build().eval(), objective.examples.batch(np.arange(2))
    with torch.no_grad():
        level = noise_levels(RowNoise(0, 0, rows), objective.shift(batch["latents"]))
    noise = RowNoise(0, 0, rows)
    noise.uniform(1, 1)
    level, eps = noise_levels(noise, objective.shift(batch["latents"])), noise.normal(4, 8, 8)
    noisy = (1 - level.reshape(-1, 1, 1, 1)) * batch["latents"] + level.reshape(-1, 1, 1, 1) * eps
    denoiser = FluxDenoiser.load(base, max_sequence_length=LENGTH)
    one = torch.ones(2)
    predicted = denoiser.predict(noisy, level * 1000, batch["condition"], one, denoiser.condition([""])).guided
    with torch.no_grad():
        found = objective.loss(model, batch, RowNoise(0, 0, rows))["loss"]
    torch.testing.assert_close(found, (predicted - (eps - batch["latents"])).square().mean(), rtol=1e-4, atol=1e-5)


def test_captions_are_embedded_once_for_all_fits_of_one_length(base: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "run"))
    assert fit(base, cache=store).texts.computed == len(SIDES) + 1  # with the empty prompt
    assert fit(base, cache=store).texts.computed == 0
    assert fit(base, cache=store, flux=flux(max_sequence_length=LENGTH - 1)).texts.computed == len(SIDES) + 1


def test_batches_are_a_function_of_seed_and_step_and_of_one_resolution_each() -> None:
    buckets = [torch.zeros(5, 4, 8, 8), torch.zeros(2, 4, 16, 16), torch.zeros(9, 4, 4, 4)]
    examples = ScaledExamples(buckets, torch.zeros(1, 3, 2), np.zeros(16, np.int64))
    rounds = 2 + 1 + 3  # batches of four
    shown = [batch_rows(examples, 7, step, 4) for step in range(6 * rounds)]
    assert all(np.array_equal(rows, batch_rows(examples, 7, step, 4)) for step, rows in enumerate(shown))
    assert any(not np.array_equal(rows, batch_rows(examples, 8, step, 4)) for step, rows in enumerate(shown))
    sides = [examples.batch(rows)["latents"].shape[-1] for rows in shown]
    assert all(sorted(sides[k : k + rounds]) == [4, 4, 4, 8, 8, 16] for k in range(0, len(sides), rounds))
    counts = np.bincount(np.concatenate(shown), minlength=16)
    for bucket in (counts[:5], counts[5:7], counts[7:]):
        assert bucket.min() > 0 and bucket.max() - bucket.min() <= 1


def test_the_recipe_knows_the_presets_that_there_are() -> None:
    names = get_args(get_args(FluxSection.model_fields["preset"].annotation)[0])
    assert set(names) == set(PRESETS["flux"])
