"""Known mistakes of published trainers, each as a test that this project does not make it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, safe_open, save_file
from tiny_flux import LENGTH, moved, save_pipeline
from torch import Tensor

from factory import phantom
from factory.fits.flux import FitFluxLora, ScaledExamples
from factory.fits.joint import FitLora
from factory.fits.loop import train
from factory.fits.objective import RowNoise, batch_rows
from factory.images import encode_mask, encode_png
from factory.models import kohya
from factory.models.flux import FluxDenoiser
from factory.models.joint import JointDenoiser, build_starter, joint_loss
from factory.models.loading import load_part
from factory.models.lora import ADAPTER_FILE
from factory.recipe import FluxSection, LoraSection

COUNT = 6
PROMPTS = [f"lesion number {number}" for number in range(COUNT)]
SECTION = LoraSection(steps=1, batch_size=3, rank=2, learning_rate=1e-3, warmup_steps=0, caption_dropout=0.0)


def drawn(number: int, size: int) -> Any:
    return phantom.draw(3, number, size)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    build_starter(
        ["a lesion"], vocab_size=520, model_max_length=8, head_width=16,
        vae={"block_out_channels": (8, 8, 8), "layers_per_block": (0, 1, 1)},
        unet={"block_out_channels": (16, 16), "num_plain_blocks": 1, "num_heads": 2, "norm_num_groups": 4},
    ).save(folder / "joint")  # fmt: skip
    save_pipeline(folder / "flux")
    return {"joint": folder / "joint", "flux": folder / "flux"}


def flux_fit(base: Path, dtype: str = "float32", **change: Any) -> FitFluxLora:
    images = [encode_png(drawn(number, 64 if number % 2 else 32).image) for number in range(COUNT)]
    own = FluxSection(preset=None, scales=[32, 64], max_sequence_length=LENGTH, base_dtype=dtype)  # type: ignore[arg-type]
    section = SECTION.model_copy(update={"family": "flux", "flux": own, **change})
    return FitFluxLora(base, images, PROMPTS, section, 32)


def joint_fit(base: Path, **change: Any) -> FitLora:
    pairs = [drawn(number, 32) for number in range(COUNT)]
    images, masks = [encode_png(pair.image) for pair in pairs], [encode_mask(pair.mask) for pair in pairs]
    return FitLora(base, images, masks, PROMPTS, SECTION.model_copy(update=change), 32)


FITS: dict[str, Callable[..., Any]] = {"joint": joint_fit, "flux": flux_fit}


def as_pixels(number: int, size: int) -> Tensor:
    return torch.from_numpy(drawn(number, size).image)[None].permute(0, 3, 1, 2).float() / 127.5 - 1


def test_trap_1_cached_latents_and_captions_stay_together_in_any_order(bases: dict[str, Path]) -> None:
    # A published trainer fills its cache from one shuffled pass and reads it by the step of another.
    joint, objective = JointDenoiser.load(bases["joint"]), joint_fit(bases["joint"])
    joint.stats = objective.denoiser.stats  # a plain base's come from the corpus
    for step in range(3):
        rows = batch_rows(objective.examples, 5, step, 3)
        batch = objective.examples.batch(rows)
        for place, row in enumerate(rows.tolist()):
            mask = torch.from_numpy(drawn(row, 32).mask)[None, None].float()
            found = batch["latents"][place]
            torch.testing.assert_close(found, joint.encode(as_pixels(row, 32), mask)[0], rtol=0, atol=4e-3)
            torch.testing.assert_close(batch["condition"][place], joint.condition([PROMPTS[row]])[0])
    flux, scaled = FluxDenoiser.load(bases["flux"], max_sequence_length=LENGTH), flux_fit(bases["flux"])
    numbers = [0, 2, 4, 1, 3, 5]  # bucket after bucket: the small ones, then the large ones
    seen = set()
    for step in range(4):
        rows = batch_rows(scaled.examples, 5, step, 3)
        batch = scaled.examples.batch(rows)
        for place, number in enumerate(numbers[row] for row in rows.tolist()):
            wanted = flux.encode_image(as_pixels(number, 64 if number % 2 else 32))[0]
            torch.testing.assert_close(batch["latents"][place], wanted, rtol=0, atol=4e-3)
            torch.testing.assert_close(
                batch["condition"][place], flux.condition([PROMPTS[number]])[0], rtol=0, atol=1e-5
            )
            seen.add(number)
    assert seen == set(range(COUNT))


@pytest.mark.parametrize("family", list(FITS))
def test_trap_2_gradient_clipping_clips(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    # A published trainer hands its clipping an iterator that the optimiser has used up.
    import json

    objective = FITS[family](bases[family], clip_norm=1e-3)
    model = train(objective, objective.section, tmp_path)
    gradients = [value.grad for value in model.parameters() if value.requires_grad]
    assert gradients and all(gradient is not None for gradient in gradients)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["grad_norm"] > 2e-3  # as it was
    assert norm.item() == pytest.approx(1e-3, rel=1e-2)


def test_trap_3_alpha_is_the_rank_for_readers_of_metadata_and_for_those_that_ignore_it(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    # Without metadata diffusers takes alpha for the rank, ComfyUI reads `.alpha` alone, and both at once are refused.
    objective = flux_fit(bases["flux"])
    model = moved(objective.build())
    objective.save(model, tmp_path / "with")
    state = load_file(tmp_path / "with" / ADAPTER_FILE)
    assert not [key for key in state if "alpha" in key]
    with safe_open(tmp_path / "with" / ADAPTER_FILE, "pt") as stored:
        assert '"transformer.lora_alpha": 2' in str(stored.metadata()) and '"transformer.r": 2' in str(
            stored.metadata()
        )
    (tmp_path / "without").mkdir()
    save_file(state, tmp_path / "without" / ADAPTER_FILE)
    kohya.write(tmp_path / "comfy.safetensors", {k.removeprefix("transformer."): v for k, v in state.items()}, model)
    assert [key for key in load_file(tmp_path / "comfy.safetensors") if key.endswith(".alpha")]
    found = []
    for source in (tmp_path / "with", tmp_path / "without"):
        pipeline = FluxPipeline.from_pretrained(bases["flux"])
        pipeline.load_lora_weights(source)
        pipeline.fuse_lora()
        found.append(pipeline.transformer.get_submodule("transformer_blocks.0.attn.to_q").base_layer.weight)
    plain = load_part(FluxTransformer2DModel, bases["flux"] / "transformer").transformer_blocks[0].attn.to_q.weight
    change = [state[f"transformer.transformer_blocks.0.attn.to_q.lora_{side}.weight"] for side in "BA"]
    for weight in found:
        torch.testing.assert_close(weight, plain + change[0] @ change[1], rtol=0, atol=1e-5)


def test_trap_5_the_terminal_step_trains_at_zero_snr(bases: dict[str, Path]) -> None:
    # Min-SNR weighting gives it weight zero in current trainers; here no step is weighted away.
    joint = JointDenoiser.load(bases["joint"])
    assert joint.alphas_cumprod[-1] == 0
    noise, last = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 999])
    model = joint.unet.requires_grad_(True)
    terms = joint_loss(
        model, joint.mask_head, joint.scheduler, latents=0.5 * noise.flip(0), noise=noise, timesteps=last,
        condition=joint.condition(["a", "b"]), mask=torch.ones(2, 1, 32, 32), mask_weight=1.0, head_weight=0.1,
    )  # fmt: skip
    terms["loss"].backward()
    assert terms["loss"] > 0.1 and sum(float(v.grad.abs().sum()) for v in model.parameters() if v.grad is not None) > 0


def test_trap_5_every_noise_level_of_the_flow_has_the_same_weight(bases: dict[str, Path]) -> None:
    objective, rows = flux_fit(bases["flux"]), np.arange(2)
    model, batch = objective.build(), objective.examples.batch(rows)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()  # a network that says nothing, so the loss is that of its target
        found = objective.loss(model, batch, RowNoise(0, 0, rows))["loss"]
    noise = RowNoise(0, 0, rows)
    noise.uniform(1, 1), noise.normal()
    wanted = (noise.normal(*batch["latents"].shape[1:]) - batch["latents"]).square().mean()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("family", ["joint", "flux"])
def test_trap_6_what_trains_is_float32_whatever_the_base_is_stored_in(
    family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    # Published trainers go by a flag of the command line, and leave a LoRA in bfloat16 or fail to unscale it.
    objective = flux_fit(bases["flux"], "bfloat16") if family == "flux" else joint_fit(bases["joint"])
    model = train(objective, objective.section, tmp_path)
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    frozen = {value.dtype for value in model.parameters() if not value.requires_grad}
    assert frozen == {torch.bfloat16 if family == "flux" else torch.float32}
    moved = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in moved)
    assert any(value.abs().max() > 0 for value in moved)


def test_trap_8_a_bucket_smaller_than_the_batch_is_fitted_and_does_not_stop_the_fit(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    objective = flux_fit(bases["flux"], batch_size=8, steps=2)
    train(objective, objective.section, tmp_path)
    one = ScaledExamples([torch.zeros(1, 4, 8, 8)], torch.zeros(1, 3, 2), np.zeros(1, np.int64))
    assert batch_rows(one, 0, 0, 4).tolist() == [0, 0, 0, 0]
    rows = np.concatenate([batch_rows(objective.examples, 0, step, 8) for step in range(2)])
    assert set(rows.tolist()) == set(range(COUNT))
