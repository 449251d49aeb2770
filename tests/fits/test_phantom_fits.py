"""The starter's fits on a few phantoms: what they see is right, and each learns something in a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from factory import phantom
from factory.fits.gate import FitGate
from factory.fits.joint import FitMaskHead, FitStarter, LatentExamples, encode_pairs, tokens_of
from factory.fits.loop import train
from factory.fits.objective import RowNoise
from factory.fits.segmenter import FitSegmenter, PhantomPairs, turned
from factory.fits.vae import FitVae, PhantomCrops
from factory.models.estimator import load_estimator
from factory.models.joint import JointDenoiser, build_starter
from factory.recipe import FitSection, GateFitSection

TINY_VAE = {"block_out_channels": (8, 8, 8), "layers_per_block": (0, 1, 1)}
TINY_UNET = {"block_out_channels": (16, 16), "num_plain_blocks": 1, "num_heads": 2, "norm_num_groups": 4}


def tiny() -> JointDenoiser:
    torch.manual_seed(0)
    return build_starter(["a lesion"], vocab_size=520, model_max_length=8, vae=TINY_VAE, unet=TINY_UNET, head_width=16)


def phantoms(index: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = phantom.draw(3, index, 32)
    return drawn.image, drawn.mask


@pytest.fixture(scope="module")
def examples() -> LatentExamples:
    denoiser = tiny()
    latents, masks = encode_pairs(denoiser, 10, phantoms, 32)
    return LatentExamples(latents, masks, tokens_of(denoiser, ["a lesion"] * 10))


def losses(directory: Path) -> list[float]:
    import json

    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_crops_are_a_function_of_seed_and_index_alone():
    alone = PhantomCrops(1, 10, size=64, crop=32).batch(np.array([7]))["image"]
    among = PhantomCrops(1, 10, size=64, crop=32).batch(np.array([2, 7]))["image"]
    assert alone.shape == (2, 3, 32, 32)
    assert torch.equal(alone, among[2:])
    assert alone.min() >= -1
    assert alone.max() <= 1


def test_the_vae_learns_to_reconstruct(tmp_path: Path):
    objective = FitVae(1, 1000, size=64, **TINY_VAE)
    objective.examples.crop = 32
    section = FitSection(steps=30, batch_size=2, learning_rate=3e-3, warmup_steps=2)
    train(objective, section, tmp_path, log_every=10)
    found = losses(tmp_path)
    assert found[-1] < 0.7 * found[0]


def test_latents_and_masks_of_a_row_belong_to_the_same_phantom(examples: LatentExamples):
    batch = examples.batch(np.array([4]))
    image, mask = phantoms(4)
    assert np.array_equal(batch["mask"][0, 0].numpy() > 0.5, mask)
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = tiny().scaled_latents(pixels, torch.from_numpy(mask)[None, None].float())
    assert torch.allclose(batch["latents"], expected, atol=2e-3)  # kept in half precision


def test_the_joint_fit_lowers_its_loss_and_writes_a_loadable_directory(examples: LatentExamples, tmp_path: Path):
    objective = FitStarter(tiny, examples)
    section = FitSection(steps=40, batch_size=8, learning_rate=3e-3, warmup_steps=2)
    model = train(objective, section, tmp_path / "fit", log_every=10)
    found = losses(tmp_path / "fit")
    assert found[-1] < found[0]
    objective.save(model, tmp_path / "weights")
    assert JointDenoiser.load(tmp_path / "weights").prediction_type == "v_prediction"


def test_the_mask_head_reads_masks_from_their_latents(examples: LatentExamples, tmp_path: Path):
    objective = FitMaskHead(tiny, examples)
    train(objective, FitSection(steps=40, batch_size=8, learning_rate=5e-3, warmup_steps=2), tmp_path, log_every=10)
    found = losses(tmp_path)
    assert found[-1] < 0.8 * found[0]


def test_the_gate_is_fitted_on_latents_of_its_generators_vae(tmp_path: Path):
    tiny().save(tmp_path / "weights")
    section = GateFitSection(steps=4, batch_size=4, phantoms=6, warmup_steps=1, estimator_pairs=20)
    objective = FitGate(tmp_path / "weights", section, 32)
    model = train(objective, section, tmp_path / "fit")
    objective.save(model, tmp_path / "gate")
    objective.load(tmp_path / "gate")
    estimator = load_estimator(tmp_path / "gate")
    assert estimator is not None and 0 < estimator.expected(np.full((1, 5), 0.5))[0] < 1
    none = FitGate(tmp_path / "weights", section.model_copy(update={"estimator_pairs": 0}), 32)
    none.save(model, tmp_path / "without")
    assert load_estimator(tmp_path / "without") is None
    objective.vae_digest = "another"
    with pytest.raises(ValueError, match="another"):
        objective.load(tmp_path / "gate")


def test_an_image_and_its_mask_are_turned_alike():
    picture = torch.arange(2 * 16.0).reshape(2, 1, 4, 4)
    image, mask = turned(picture.expand(-1, 3, -1, -1), picture, RowNoise(0, 0, np.arange(2)))
    assert torch.equal(image[:, :1], mask)
    assert not torch.equal(mask, picture)


def test_a_pixel_segmenter_finds_phantoms_better_after_a_few_steps(tmp_path: Path):
    objective = FitSegmenter(PhantomPairs(1, 100, size=32, drawn=32), width=8, depth=2)
    train(objective, FitSection(steps=40, batch_size=8, learning_rate=5e-3, warmup_steps=2), tmp_path, log_every=10)
    found = losses(tmp_path)
    assert found[-1] < 0.9 * found[0]
