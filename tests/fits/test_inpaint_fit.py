"""LoRA for inpainting on tiny bases of the real classes: what it sees, what it learns, what the library reads of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import cv2
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from safetensors.torch import load_file
from test_inpaint import draw, drawn_by
from tiny_sdxl import build_pipeline, save_pipeline
from torch import Tensor, nn

from factory.fits.encoded import EncodedRows, encode
from factory.fits.inpaint import FitInpaintLora, InpaintEncoder, background_error, inpaint_loss
from factory.fits.loop import train
from factory.fits.objective import RowNoise
from factory.fits.presets import PRESETS, describe
from factory.images import encode_mask, encode_png
from factory.models.denoiser import clean_estimate
from factory.models.inpaint import InpaintDenoiser, load_unet, widen
from factory.recipe import InpaintSection, LoraSection
from factory.storage import open_store

SECTION = LoraSection(
    family="inpaint", steps=6, batch_size=3, learning_rate=1e-2, warmup_steps=1, checkpoint_every=2, rank=4,
    caption_dropout=0.2, inpaint=InpaintSection(preset=None, dilation=0.0),
)  # fmt: skip
KINDS = {"sdxl": {"xl": True}, "sd": {"xl": False}, "widened": {"xl": False, "channels": 4}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_pipeline(tmp_path_factory.mktemp(name), **kind) for name, kind in KINDS.items()}


def pair(number: int, radius: float = 6, size: int = 32) -> tuple[bytes, bytes]:
    """A disk of its own colour on skin of its own, and its mask."""
    rng = np.random.default_rng(number)
    skin, lesion = rng.integers(120, 250, 3), rng.integers(20, 120, 3)
    y, x = np.mgrid[:size, :size]
    inside = (x - size / 2) ** 2 + (y - size / 2) ** 2 < radius**2
    return encode_png(np.where(inside[..., None], lesion, skin).astype(np.uint8)), encode_mask(inside)


def fit(base: Path, count: int = 5, cache: Any = None, kind: type = FitInpaintLora, **change: Any) -> FitInpaintLora:
    section = SECTION.model_copy(update=change)
    images, masks = zip(*(pair(number, 5 + number) for number in range(count)), strict=True)
    prompts = [f"lesion {number}" for number in range(count)]
    return kind(base, list(images), list(masks), prompts, section, 32, cache)


def curve(directory: Path) -> list[dict[str, float]]:
    """The logged metrics without what a clock says."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def error(objective: FitInpaintLora, model: nn.Module) -> float:
    """The loss at noise that no step has seen."""
    rows = np.arange(5)
    with torch.no_grad():
        found = [objective.loss(model, objective.examples.batch(rows), RowNoise(1, k, rows))["loss"] for k in range(8)]
    return float(torch.stack(found).mean())


# ---- learning and going on


def test_the_loss_falls_and_the_base_stays_as_it_was(bases: dict[str, Path], tmp_path: Path) -> None:
    objective = fit(bases["sdxl"], steps=60, checkpoint_every=60, learning_rate=2e-2)
    fresh = objective.build()
    frozen = {name: value.clone() for name, value in fresh.named_parameters() if not value.requires_grad}
    first = error(objective, fresh)
    model = train(objective, objective.section, tmp_path)
    assert error(objective, model) < 0.95 * first
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in frozen.items())
    assert all(".lora_" in name for name in trained(model))


class StopsAt(FitInpaintLora):
    """Pulls the plug in the middle of a step."""

    calls, stop_at = 0, 3

    def loss(self, model: nn.Module, batch: dict[str, Tensor], noise: RowNoise) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls - 1 == self.stop_at:
            raise InterruptedError("pulled the plug")
        return super().loss(model, batch, noise)


@pytest.mark.parametrize(("kind", "ema_decay"), [("widened", 0.0), ("widened", 0.9), ("sdxl", 0.0)])
def test_a_fit_that_was_stopped_goes_on_to_the_same_bits(
    bases: dict[str, Path], tmp_path: Path, kind: str, ema_decay: float
) -> None:
    section = SECTION.model_copy(update={"ema_decay": ema_decay})
    whole = trained(train(fit(bases[kind]), section, tmp_path / "whole", log_every=1))
    with pytest.raises(InterruptedError):
        train(fit(bases[kind], kind=StopsAt), section, tmp_path / "cut", log_every=1)
    resumed = trained(train(fit(bases[kind]), section, tmp_path / "cut", log_every=1))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole") and len(curve(tmp_path / "whole")) == 6
    assert whole.keys() == resumed.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert any(name.startswith("conv_in") for name in whole) == (kind == "widened")


def test_building_again_starts_again(bases: dict[str, Path], tmp_path: Path) -> None:
    objective = fit(bases["widened"])
    first = trained(objective.build())
    train(objective, SECTION, tmp_path)
    again = trained(objective.build())
    assert first.keys() == again.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_checkpointing_of_gradients_changes_no_gradient(bases: dict[str, Path], tmp_path: Path) -> None:
    plain = trained(train(fit(bases["sdxl"]), SECTION, tmp_path / "plain"))
    own = SECTION.inpaint.model_copy(update={"gradient_checkpointing": True})
    saving = fit(bases["sdxl"], inpaint=own)
    found = trained(train(saving, saving.section, tmp_path / "saving"))
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)


# ---- what the library reads


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_librarys_pipeline_draws_with_the_fit_what_the_factory_draws(
    bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    objective = fit(bases[kind], learning_rate=0.05)
    model = train(objective, objective.section, tmp_path / "fit")
    objective.save(model, tmp_path / "weights")
    denoiser = InpaintDenoiser.load(bases[kind], tmp_path / "weights")
    found = draw(denoiser)["x"].image
    if kind == "widened":
        pipeline: Any = StableDiffusionInpaintPipeline.from_pretrained(bases[kind], safety_checker=None)
        widen(pipeline.unet)
    else:
        library = StableDiffusionXLInpaintPipeline if kind == "sdxl" else StableDiffusionInpaintPipeline
        pipeline = library.from_pretrained(bases[kind])
    without = drawn_by(pipeline)
    dual_io = tmp_path / "weights" / "dual_io.safetensors"
    assert dual_io.is_file() == (kind == "widened")
    if dual_io.is_file():
        state = load_file(dual_io)
        assert set(state) == {"conv_in.weight", "conv_in.bias"} and state["conv_in.weight"].shape[1] == 9
        pipeline.unet.load_state_dict(state, strict=False)
    pipeline.load_lora_weights(tmp_path / "weights")
    with_fit = drawn_by(pipeline)
    torch.testing.assert_close(found, with_fit, rtol=0, atol=1e-4)
    assert (without - with_fit).abs().max() > 1e-3
    again = dict(objective.load(tmp_path / "weights").named_parameters())
    assert all(torch.equal(again[name], value) for name, value in trained(model).items())
    card = json.loads((tmp_path / "weights" / "card.json").read_text())
    assert (card["rank"], card["widened"], card["num_images"], card["lambda_preserve"]) == (
        4, kind == "widened", 5, 0.1,
    )  # fmt: skip


def test_the_mask_is_dilated_alike_in_fitting_and_in_drawing(bases: dict[str, Path], tmp_path: Path) -> None:
    own = SECTION.inpaint.model_copy(update={"dilation": 0.125})
    objective = fit(bases["sd"], count=1, inpaint=own)
    objective.save(objective.build(), tmp_path)
    drawing = InpaintDenoiser.load(bases["sd"], tmp_path)
    assert drawing.dilation == 0.125
    image, mask = pair(0, 5)
    rgb = torch.from_numpy(cv2.imdecode(np.frombuffer(image, np.uint8), 1)[..., ::-1].copy()).permute(2, 0, 1)[None]
    found = torch.from_numpy(cv2.imdecode(np.frombuffer(mask, np.uint8), 0) > 0)[None, None].float()
    context = drawing.context(rgb.float() / 127.5 - 1, found)
    fitted = objective.examples.batch(np.array([0]))["context"]
    torch.testing.assert_close(context, fitted, rtol=0, atol=2e-3)  # fitted latents are kept in half precision
    assert fitted[:, 0].sum() > found[..., ::2, ::2].sum()


# ---- the loss


def terms(kind: str, inside: float = 0.0, outside: float = 0.0, **more: Any) -> dict[str, float]:
    """The loss of a prediction that is wrong by so much inside and outside a mask of half the cells."""
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 4, 4, 4, generator=rng), torch.randn(2, 4, 4, 4, generator=rng)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1.0
    alpha_bar = torch.tensor([0.9, 0.5])
    signal, spread = (value.reshape(-1, 1, 1, 1) for value in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    exact = noise if kind == "epsilon" else signal * noise - spread * latents
    options = {"lambda_preserve": 0.1, "counted": torch.tensor([True, True])} | more
    found = inpaint_loss(
        kind, alpha_bar, latents=latents, noise=noise, predicted=exact + inside * mask + outside * (1 - mask),
        mask=mask, **options,
    )  # fmt: skip
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_preserving_costs_nothing_for_a_perfect_prediction_and_grows_with_the_backgrounds_error_only(kind: str) -> None:
    assert terms(kind)["loss"] < 1e-10 and terms(kind)["preserve"] < 1e-10
    lesion = terms(kind, inside=1.0)
    assert lesion["noise_mse"] == pytest.approx(0.5) and lesion["preserve"] < 1e-10
    # An error e of the prediction is one of e sqrt((1 - a) / a) in z0 for epsilon, and of e sqrt(1 - a) for v.
    gain = {"epsilon": (0.1 / 0.9 + 1.0) / 2, "v_prediction": (0.1 + 0.5) / 2}[kind]
    for error in (0.5, 1.0, 2.0):
        found = terms(kind, outside=error)
        assert found["preserve"] == pytest.approx(gain * error**2, rel=1e-4)
        assert found["loss"] == pytest.approx(found["noise_mse"] + 0.1 * found["preserve"], rel=1e-5)
    assert terms(kind, outside=1.0, lambda_preserve=0.0)["loss"] == pytest.approx(0.5)


def test_preserving_is_asked_only_where_the_clean_estimate_means_something() -> None:
    both, one = terms("epsilon", outside=1.0), terms("epsilon", outside=1.0, counted=torch.tensor([True, False]))
    assert one["preserve"] == pytest.approx(0.1 / 0.9 / 2, rel=1e-4) and one["noise_mse"] == both["noise_mse"]
    whole = background_error(torch.ones(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), torch.ones(1, 1, 4, 4))
    assert whole.item() == 0.0


def test_the_loss_is_that_of_the_denoisers_own_prediction(bases: dict[str, Path]) -> None:
    objective, rows = fit(bases["sdxl"], caption_dropout=0.0), np.arange(3)
    model, batch = objective.build().eval(), objective.examples.batch(rows)
    noise = RowNoise(0, 0, rows)
    noise.uniform(1, 1)
    times, eps = noise.integers(1000), noise.normal(4, 16, 16)
    denoiser = InpaintDenoiser.load(bases["sdxl"])
    level = denoiser.alphas_cumprod[times].reshape(-1, 1, 1, 1)
    noisy = level.sqrt() * batch["latents"] + (1 - level).sqrt() * eps
    empty = denoiser.condition([""])
    made = denoiser.predict(noisy, times, batch["condition"], torch.ones(3), empty, batch["context"]).conditional
    with torch.no_grad():
        found = objective.loss(model, batch, RowNoise(0, 0, rows))
    torch.testing.assert_close(found["noise_mse"], (made - eps).square().mean(), rtol=1e-4, atol=1e-5)
    estimate = clean_estimate("epsilon", noisy, made, level.flatten())
    kept = background_error(estimate, batch["latents"], batch["context"][:, :1]) * (times < 400)
    torch.testing.assert_close(found["preserve"], kept.mean(), rtol=1e-3, atol=1e-5)


def test_a_dropped_caption_is_the_empty_prompts(bases: dict[str, Path]) -> None:
    rows = np.arange(3)
    objective, dropping = fit(bases["sdxl"], caption_dropout=0.0), fit(bases["sdxl"], caption_dropout=1.0)
    model, batch = objective.build().eval(), objective.examples.batch(rows)
    bare = batch | {"condition": torch.zeros_like(batch["condition"])}  # as SDXL's empty prompt is
    with torch.no_grad():
        found = dropping.loss(model, batch, RowNoise(0, 0, rows))["loss"]
        wanted = objective.loss(model, bare, RowNoise(0, 0, rows))["loss"]
        kept = objective.loss(model, batch, RowNoise(0, 0, rows))["loss"]
    torch.testing.assert_close(found, wanted)
    assert found != kept


# ---- rows and presets


def rows_of(masks: Sequence[bytes | None], base: Path) -> EncodedRows:
    return encode(InpaintEncoder(base, 32, 0.0), [pair(k)[0] for k in range(len(masks))], masks)


def test_rows_that_cannot_be_fitted_are_counted_by_reason(bases: dict[str, Path], tmp_path: Path) -> None:
    speck = np.zeros((32, 32), bool)
    speck[9, 9] = True  # no cell of the latents begins there
    masks = [None, encode_mask(np.zeros((32, 32), bool)), encode_mask(speck), encode_mask(np.ones((32, 32), bool))]
    rows = rows_of([pair(0)[1], *masks, pair(5)[1]] + [pair(6)[1]] * 4, bases["sd"])
    assert rows.dropped == {"no_mask": 1, "empty_mask": 2, "full_mask": 1}
    assert rows.index.tolist() == [0, 5, 6, 7, 8, 9]
    shapes = {name: values.shape for name, values in rows.buckets[0].items()}
    assert shapes == {"latents": (6, 4, 16, 16), "context": (6, 5, 16, 16)}
    loud = shutil.copytree(bases["sd"], tmp_path / "loud")
    config = json.loads((loud / "vae/config.json").read_text()) | {"scaling_factor": 1e9}
    (loud / "vae/config.json").write_text(json.dumps(config))
    assert rows_of([pair(0)[1]] * 2, loud).dropped == {"non_finite_latents": 2}


def test_captions_are_embedded_once_for_all_fits(bases: dict[str, Path], tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "run"))
    assert fit(bases["sdxl"], cache=store).texts.computed == 5 + 1  # with the empty prompt
    assert fit(bases["sdxl"], cache=store).texts.computed == 0


def test_the_presets_count_what_sdxl_inpainting_costs() -> None:
    from diffusers import UNet2DConditionModel

    from factory.fits.presets import _SDXL_INPAINTING

    for name, rank in (("diffaug", 16), ("budget", 4)):
        found = describe("inpaint", name)
        assert found["rank"] == rank and found["trainable_parameters"] == 1_451_520 * rank
        assert found["modules"] == 560 and not any("whole" in target for target in found["targets"])
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(_SDXL_INPAINTING)
    assert round(sum(value.numel() for value in unet.parameters()) / 1e6, 1) == 2567.5


def test_a_base_that_is_widened_counts_its_convolution(bases: dict[str, Path]) -> None:
    plain, wide = describe("inpaint", "budget", bases["sd"]), describe("inpaint", "budget", bases["widened"])
    assert wide["trainable_parameters"] - plain["trainable_parameters"] == 9 * 16 * 9 + 16
    assert wide["targets"][-1] == "conv_in (whole)"


def test_the_recipe_knows_the_presets_that_there_are() -> None:
    names = get_args(get_args(InpaintSection.model_fields["preset"].annotation)[0])
    assert set(names) == set(PRESETS["inpaint"])


def test_a_widened_base_is_loaded_with_nine_channels(bases: dict[str, Path]) -> None:
    for kind in KINDS:
        unet, widened = load_unet(bases[kind])
        assert unet.config.in_channels == 9 and widened == (kind == "widened")
    assert build_pipeline(**KINDS["widened"]).unet.config.in_channels == 4
