"""The class-conditional fit: what it sees, what it learns, whole and as LoRA, and that it goes on where it was."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from tiny_classes import CLASSES, build_classes
from torch import Tensor, nn

from factory.fits.class_conditional import FitClassConditional
from factory.fits.loop import train
from factory.fits.objective import RowNoise
from factory.fits.weighting import snr_weights
from factory.images import encode_png
from factory.models.class_conditional import ClassConditionalDenoiser
from factory.models.class_networks import NETWORKS, class_tables
from factory.models.families import load_denoiser
from factory.models.latents import LatentStats
from factory.models.sampler import SampleJob, Sampler
from factory.models.weights import STARTER, family_of, is_whole_generator
from factory.recipe import ClassesSection, LoraSection

SECTION = LoraSection(
    family="class_conditional", train_mode="full", rank=2, steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=1,
    checkpoint_every=2, caption_dropout=0.3,
)  # fmt: skip
NAMES = ["nevus", "melanoma"] * 5


def picture(number: int, diagnosis: str | None = "nevus", side: int = 16) -> bytes:
    """A disk on skin; the diagnosis is its colour."""
    rng = np.random.default_rng(number)
    lesion = {"nevus": (150, 90, 60), "melanoma": (30, 20, 40)}.get(diagnosis or "", (90, 160, 90))
    y, x = np.mgrid[:side, :side]
    inside = (x - side / 2) ** 2 + (y - side / 2) ** 2 < (side / 3) ** 2
    skin = rng.integers(190, 230, 3)
    return encode_png(np.where(inside[..., None], lesion, skin).astype(np.uint8))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {kind: tmp_path_factory.mktemp(kind) for kind in ("unet", "dit")}
    for kind, directory in found.items():
        build_classes(kind).save(directory)
    return found


def fit(
    base: Path, names: Sequence[str | None] = NAMES, classes: Sequence[str] = ("nevus", "melanoma"),
    kind: type[FitClassConditional] = FitClassConditional, **change: Any,
) -> FitClassConditional:  # fmt: skip
    images = [picture(number, name) for number, name in enumerate(names)]
    return kind(base, images, names, SECTION.model_copy(update=change), 16, classes)


def trained_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def curve(directory: Path) -> list[dict[str, float]]:
    """The logged metrics without what a clock says."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def error(objective: FitClassConditional, model: nn.Module) -> float:
    """The loss at noise that no step has seen."""
    rows = np.arange(len(objective.examples))
    with torch.no_grad():
        found = [
            objective.loss(model, objective.examples.batch(rows), RowNoise(1, step, rows))["loss"] for step in range(8)
        ]
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize("train_mode", ["full", "lora"])
def test_the_loss_falls_and_lora_leaves_the_base_as_it_was(
    bases: dict[str, Path], tmp_path: Path, kind: str, train_mode: str
) -> None:
    objective = fit(bases[kind], train_mode=train_mode, steps=60, checkpoint_every=60)
    fresh = objective.build()
    frozen = {name: value.clone() for name, value in fresh.named_parameters() if not value.requires_grad}
    first = error(objective, fresh)
    model = train(objective, objective.section, tmp_path)
    assert error(objective, model) < 0.95 * first
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())
    assert bool(frozen) == (train_mode == "lora")
    assert error(objective, objective.build()) == first  # training leaves what `build` begins with alone


class StopsAt(FitClassConditional):
    """Pulls the plug in the middle of a step."""

    calls, stop_at = 0, 3

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls - 1 == self.stop_at:
            raise InterruptedError("pulled the plug")
        return super().loss(model, batch, noise)


@pytest.mark.parametrize("kind", ["unet", "dit"])
@pytest.mark.parametrize(("train_mode", "ema_decay"), [("full", 0.9), ("lora", 0.0)])
def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(
    bases: dict[str, Path], tmp_path: Path, kind: str, train_mode: str, ema_decay: float
) -> None:
    change = {"train_mode": train_mode, "ema_decay": ema_decay, "min_snr_gamma": 5.0}
    section = SECTION.model_copy(update=change)
    torch.manual_seed(1)  # a network that still dropped labels by itself would take them from here
    whole = trained_values(train(fit(bases[kind], **change), section, tmp_path / "whole", log_every=1))
    with pytest.raises(InterruptedError):
        train(fit(bases[kind], kind=StopsAt, **change), section, tmp_path / "cut", log_every=1)
    torch.manual_seed(2)
    resumed = trained_values(train(fit(bases[kind], **change), section, tmp_path / "cut", log_every=1))
    assert len(curve(tmp_path / "whole")) == 6 and curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert whole.keys() == resumed.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_exactly_the_rows_that_are_drawn_for_it_see_the_null_class(bases: dict[str, Path], kind: str) -> None:
    objective = fit(bases[kind])
    seen: list[Tensor] = []

    class Watched(nn.Module):
        dtype = torch.float32

        def forward(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor, return_dict: bool) -> tuple[Tensor]:
            seen.append(class_labels)
            return (latents,)

    rows = np.arange(len(NAMES))
    for step in range(20):
        objective.loss(Watched(), objective.examples.batch(rows), RowNoise(3, step, rows))
    drawn = torch.stack([RowNoise(3, step, rows).uniform() < 0.3 for step in range(20)])
    given = torch.tensor([0, 1] * 5).expand(20, 10)
    assert torch.equal(torch.stack(seen), torch.where(drawn, 2, given))
    assert 0.2 < drawn.float().mean() < 0.4


def test_a_dit_in_training_drops_no_label_by_itself(bases: dict[str, Path]) -> None:
    objective = fit(bases["dit"], caption_dropout=0.0)
    model, rows = objective.build(), np.arange(10)
    assert model.training
    batch = objective.examples.batch(rows)
    found = [objective.loss(model, batch, RowNoise(0, 0, rows))["loss"].item() for _ in range(5)]
    assert len(set(found)) == 1
    library = objective.denoiser.network.train()  # as diffusers has it
    assert len({objective.loss(library, batch, RowNoise(0, 0, rows))["loss"].item() for _ in range(5)}) > 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_the_librarys_target_weighted_by_min_snr(tmp_path: Path, prediction_type: str) -> None:
    build_classes("unet", prediction_type=prediction_type).save(tmp_path)
    objective, rows = fit(tmp_path, caption_dropout=0.0, min_snr_gamma=2.0), np.arange(6)
    model, batch = objective.build().eval(), objective.examples.batch(rows)
    noise = RowNoise(0, 0, rows)
    noise.uniform()
    timesteps, eps = noise.integers(1000), noise.normal(4, 8, 8)
    scheduler, latents = objective.denoiser.scheduler, batch["latents"]
    target = eps if prediction_type == "epsilon" else scheduler.get_velocity(latents, eps, timesteps)
    with torch.no_grad():
        noisy = scheduler.add_noise(latents, eps, timesteps)
        errors = (model(noisy, timesteps, class_labels=batch["label"]).sample - target).square().mean(dim=(1, 2, 3))
        found = objective.loss(model, batch, RowNoise(0, 0, rows))
    weights = snr_weights(prediction_type, scheduler.alphas_cumprod[timesteps], 2.0)
    torch.testing.assert_close(found["loss"], (weights * errors).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["mse"], errors.mean(), rtol=1e-4, atol=1e-5)


def test_a_whole_fit_of_a_dit_draws_in_the_librarys_pipeline(bases: dict[str, Path], tmp_path: Path) -> None:
    objective = fit(bases["dit"])
    model = train(objective, objective.section, tmp_path / "fit")
    objective.save(model, tmp_path / "weights")
    assert family_of(tmp_path / "weights") == "class_conditional" and is_whole_generator(tmp_path / "weights")
    denoiser = load_denoiser(tmp_path / "weights")
    assert isinstance(denoiser, ClassConditionalDenoiser) and dict(denoiser.labels) == {"nevus": 0, "melanoma": 1}
    job = SampleJob("x", 5, denoiser.condition(["melanoma"])[0], 3.0, 4)
    image = next(iter(Sampler(denoiser, width=16, height=16, slots=1, decode="all").run([job]))).image
    pipeline = DiTPipeline.from_pretrained(tmp_path / "weights")
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(5)
    wanted = pipeline([1], guidance_scale=3.0, generator=rng, num_inference_steps=4, output_type="pt").images[0]
    assert image is not None
    torch.testing.assert_close((image + 1) / 2, wanted, rtol=0, atol=1e-4)


def test_what_is_saved_is_loaded_and_says_what_it_was_fitted_on(bases: dict[str, Path], tmp_path: Path) -> None:
    names = [*NAMES, None, "vascular"]
    for mode in ("full", "lora"):
        objective = fit(bases["unet"], names, train_mode=mode)
        model = train(objective, objective.section, tmp_path / "fit" / mode)
        objective.save(model, tmp_path / mode)
        batch, rows = objective.examples.batch(np.arange(4)), np.arange(4)
        one, other = (
            objective.loss(m.eval(), batch, RowNoise(0, 0, rows)) for m in (model, objective.load(tmp_path / mode))
        )
        torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-4, atol=1e-5)
        card = json.loads((tmp_path / mode / "card.json").read_text())
        assert card["mode"] == mode and card["classes"] == {"nevus": 5, "melanoma": 5} and card["num_images"] == 10
        assert (
            card["dropped"] == {"no_diagnosis": 1, "class_not_asked": 1} and card["base_family"] == "class_conditional"
        )
    assert not is_whole_generator(tmp_path / "lora")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "card.json", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip


def test_known_classes_keep_their_rows_and_new_ones_begin_as_the_null_class(bases: dict[str, Path]) -> None:
    base = ClassConditionalDenoiser.load(bases["unet"])
    (old,) = class_tables(base.network)
    objective = fit(bases["unet"], ["vascular", "melanoma"], ["vascular", "melanoma"])
    (new,) = class_tables(objective.build())  # type: ignore[arg-type]
    assert torch.equal(new.weight, old.weight[[3, CLASSES["melanoma"], 3]])
    assert objective.examples.labels.tolist() == [0, 1] and objective.examples.labels.dtype == np.int64


def test_lora_keeps_the_numbers_of_the_bases_classes_and_learns_no_new_one(bases: dict[str, Path]) -> None:
    objective = fit(bases["unet"], ["seborrheic_keratosis", "melanoma"], ["seborrheic_keratosis", "melanoma"],
                    train_mode="lora")  # fmt: skip
    assert objective.examples.labels.tolist() == [2, 1] and objective.denoiser.null == 3
    with pytest.raises(ValueError, match="must be the base's for train_mode lora, got 'melanosis'; did you mean 'mela"):
        fit(bases["unet"], ["melanosis"], ["melanosis"], train_mode="lora")


def test_a_network_from_nothing_keeps_the_starters_space_so_that_its_gate_judges_it(tmp_path: Path) -> None:
    objective = fit(STARTER, steps=1)
    assert objective.denoiser.vae_digest == load_denoiser(STARTER).vae_digest
    assert objective.examples.latents.shape == (10, 4, 4, 4)
    first, again = objective.build(), fit(STARTER).build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    model = train(objective, objective.section, tmp_path / "fit")
    objective.save(model, tmp_path / "weights")
    loaded = load_denoiser(tmp_path / "weights")
    assert loaded.family == "class_conditional" and loaded.vae_digest == objective.denoiser.vae_digest
    card = json.loads((tmp_path / "weights" / "card.json").read_text())
    assert (card["preset"], card["base_family"]) == ("budget", "joint")


def test_a_vae_without_a_scale_is_measured_and_one_with_a_factor_kept(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from tiny_classes import DIT

    from factory.models import class_networks

    monkeypatch.setitem(NETWORKS, "dermae_dit_b", (class_networks.DiTTransformer2DModel, DIT))
    shutil.copytree(STARTER, tmp_path / "bare")
    (tmp_path / "bare" / "latent_stats.json").unlink()
    unet = fit(tmp_path / "bare")
    white = unet.examples.batch(np.arange(len(unet.examples)))["latents"]
    torch.testing.assert_close(white.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=0.01)
    torch.testing.assert_close(white.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=0.01)
    dit = fit(tmp_path / "bare", class_conditional=ClassesSection(preset="dermae_dit_b"))
    assert dit.examples.batch(np.arange(len(dit.examples)))["latents"].std().item() == pytest.approx(1.0, abs=0.01)
    assert dit.denoiser.stats == LatentStats() and dit.denoiser.vae.config.scaling_factor != 1.0
    dit.save(dit.build(), tmp_path / "saved")
    image = DiTPipeline.from_pretrained(tmp_path / "saved")  # with our own kind of VAE, too
    assert image.vae.config.scaling_factor == dit.denoiser.vae.config.scaling_factor
    scaled = tmp_path / "scaled"
    shutil.copytree(STARTER, scaled)
    (scaled / "latent_stats.json").unlink()
    config = scaled / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 1.0', '"scaling_factor": 0.5'))
    kept = fit(scaled)
    assert kept.denoiser.stats == LatentStats() and kept.denoiser.vae.config.scaling_factor == 0.5


def test_rows_that_are_left_out_are_counted_by_reason(bases: dict[str, Path], tmp_path: Path) -> None:
    names = ["nevus", None, "vascular", "melanoma", "melanoma", "nevus"]
    images = [picture(number, name, 8 if number == 4 else 24) for number, name in enumerate(names)]
    objective = FitClassConditional(bases["unet"], images, names, SECTION, 16, ["nevus", "melanoma"])
    assert objective.dropped == {"no_diagnosis": 1, "class_not_asked": 1, "too_small": 1}
    assert objective.examples.labels.tolist() == [0, 1, 0] and objective.counts == {"nevus": 2, "melanoma": 1}
    # Half precision ends at 65,504: with this factor every image's latents go beyond it.
    build_classes("dit").save(tmp_path)
    config = tmp_path / "vae" / "config.json"
    config.write_text(config.read_text().replace('"scaling_factor": 0.7', '"scaling_factor": 1e9'))
    with pytest.raises(ValueError, match="every class must have a training image, got none of nevus, melanoma; ingest"):
        fit(tmp_path)


def test_a_class_without_an_image_is_refused_and_one_with_a_single_image_is_named(
    bases: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"got none of vascular; ingest some, or leave it out of fit\.lora\.class"):
        fit(bases["unet"], classes=["nevus", "melanoma", "vascular"])
    with caplog.at_level(logging.WARNING):
        fit(bases["unet"], ["nevus", "nevus", "melanoma"])
    assert "melanoma has a single training image; its samples will be copies of it" in caplog.text
    assert "nevus has" not in caplog.text


def test_a_lora_on_a_base_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="train_mode must be full on a base of joint, which has no network of classes"):
        fit(STARTER, train_mode="lora")


def test_the_recipe_knows_the_networks_that_there_are() -> None:
    assert set(get_args(ClassesSection.model_fields["preset"].annotation)) == set(NETWORKS)
