"""Segmenters of latents and of pixels."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from factory.models.segmenter import (
    LatentSegmenter,
    PixelUNet,
    dice_bce_loss,
    dice_bce_rows,
    load_latent_segmenter,
    load_pixel_unet,
    save_segmenter,
)

DIGEST = "a" * 64


@pytest.mark.parametrize(("factor", "sides"), [(4, (8, 8)), (8, (9, 5)), (1, (4, 4))])
def test_a_latent_segmenter_answers_at_image_resolution_for_any_latent_size(
    factor: int, sides: tuple[int, int]
) -> None:
    logits = LatentSegmenter(factor=factor, width=16)(torch.randn(2, 4, *sides))
    assert logits.shape == (2, 1, sides[0] * factor, sides[1] * factor)


def test_a_factor_that_is_no_power_of_two_is_refused() -> None:
    with pytest.raises(ValueError, match="factor must be a power of two, got 6"):
        LatentSegmenter(factor=6)


def test_the_loss_of_a_half_right_guess_is_what_the_formulas_say() -> None:
    # Four pixels, one true. Logit 0 everywhere: BCE ln 2; Dice (2 * .5 + 1) / (2 + 1 + 1) = .5.
    mask = torch.tensor([1.0, 0, 0, 0]).reshape(1, 1, 2, 2)
    assert dice_bce_loss(torch.zeros(1, 1, 2, 2), mask).item() == pytest.approx(math.log(2) + 0.5, abs=1e-6)


def test_a_right_answer_costs_nothing_even_when_the_mask_is_empty() -> None:
    masks = torch.zeros(2, 1, 4, 4)
    masks[0, 0, 1:3, 1:3] = 1
    assert dice_bce_rows((masks * 2 - 1) * 30, masks).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_a_few_steps_teach_a_segmenter_where_a_bright_disk_is(kind: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    factor = 2 if kind == "latent" else 1
    model = LatentSegmenter(4, factor, 8) if kind == "latent" else PixelUNet(4, 8, 3)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    ys, xs = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    for _ in range(60):
        centre = torch.rand(8, 2, 1, 1) * 8 + 4
        disk = ((ys - centre[:, :1]) ** 2 + (xs - centre[:, 1:]) ** 2 < 12).float()  # (8, 1, 16, 16)
        seen = torch.randn(8, 4, 16, 16) * 0.3 + disk
        mask = disk.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        loss = dice_bce_loss(model(seen), mask)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = (model.eval()(seen) > 0).float()
    assert (2 * (found * mask).sum() / (found.sum() + mask.sum())).item() > 0.85


def test_a_pixel_unet_keeps_the_image_size_and_refuses_sides_it_cannot_halve() -> None:
    model = PixelUNet(width=4, depth=4).eval()
    assert model(torch.zeros(1, 3, 32, 48)).shape == (1, 1, 32, 48)
    with pytest.raises(ValueError, match="image sides must be multiples of 8, got 36x32"):
        model(torch.zeros(1, 3, 32, 36))


def test_segmenters_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    latent, pixel = LatentSegmenter(width=8, factor=2).eval(), PixelUNet(width=4, depth=2).eval()
    save_segmenter(latent, tmp_path / "latent", DIGEST)
    save_segmenter(pixel, tmp_path / "pixel")
    seen = torch.randn(1, 4, 8, 8)
    assert torch.equal(load_latent_segmenter(tmp_path / "latent", DIGEST)(seen), latent(seen))
    assert torch.equal(load_pixel_unet(tmp_path / "pixel")(seen[:, :3]), pixel(seen[:, :3]))
    assert json.loads((tmp_path / "latent" / "config.json").read_text())["vae_digest"] == DIGEST


def test_a_latent_segmenter_is_refused_on_the_latents_of_another_vae(tmp_path: Path) -> None:
    save_segmenter(LatentSegmenter(width=8), tmp_path, DIGEST)
    with pytest.raises(ValueError, match=r"vae_digest must be the one .* \(aaaaaaaaaaaa\), got bbbbbbbbbbbb; fit"):
        load_latent_segmenter(tmp_path, "b" * 64)


def test_what_is_no_segmenter_or_the_wrong_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a directory with config\.json"):
        load_pixel_unet(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="vae_digest must be given for a latent segmenter"):
        save_segmenter(LatentSegmenter(width=8), tmp_path)
    save_segmenter(PixelUNet(width=4, depth=2), tmp_path)
    with pytest.raises(ValueError, match="must be a LatentSegmenter, got PixelUNet"):
        load_latent_segmenter(tmp_path, DIGEST)


def test_weights_with_other_layers_are_refused_with_what_to_do(tmp_path: Path) -> None:
    save_segmenter(LatentSegmenter(width=8), tmp_path, DIGEST)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({f"old.{name}": value for name, value in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"must have the layers of this version's LatentSegmenter, got others; fit it"):
        load_latent_segmenter(tmp_path, DIGEST)
