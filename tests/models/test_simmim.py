"""SimMIM: an exact mask, a loss on masked pixels alone, an encoder that timm loads, the same section and fit as MAE."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from factory import images, phantom
from factory.fits.card import read_card
from factory.fits.examples import ImageExamples
from factory.fits.loop import train
from factory.fits.mae import MaeObjective
from factory.models.mae import patchify, unpatchify
from factory.models.simmim import SimMIM
from factory.recipe import MaeSection

SECTION = MaeSection(
    objective="simmim", encoder="test_vit", image_size=32, patch_size=8, mask_ratio=0.6, steps=30, batch_size=8,
    warmup_steps=2, checkpoint_every=15,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> SimMIM:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return SimMIM("test_vit", 32, 8).eval()


def test_the_loss_is_the_absolute_error_of_masked_pixels_which_nothing_sees(model: SimMIM) -> None:
    generator = torch.Generator().manual_seed(1)
    pixels, noise = torch.randn(2, 3, 32, 32, generator=generator), torch.rand(2, 16, generator=generator)
    loss, predicted, mask = model(pixels, 0.6, noise)
    assert mask.sum(1).tolist() == [9.0, 9.0]  # int(16 * 0.6)
    by_hand = [(predicted[b, k] - patchify(pixels, 8)[b, k]).abs().mean() for b, k in mask.nonzero().tolist()]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    other = unpatchify(patchify(pixels, 8) + 100 * mask.unsqueeze(-1), 8)
    torch.testing.assert_close(model(other, 0.6, noise)[1], predicted)


def test_nothing_masked_is_the_plain_encoder(model: SimMIM) -> None:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    _, predicted, mask = model(pixels, 0.0, torch.rand(2, 16))
    assert mask.sum() == 0
    torch.testing.assert_close(predicted, model.head(model.encoder.forward_features(pixels)[:, 1:]))


def _objective() -> MaeObjective:
    return MaeObjective(SECTION, ImageExamples([images.encode_png(phantom.draw(3, k, 32).image) for k in range(8)], 32))


def test_its_loss_falls_and_its_fit_resumes_to_the_same_bits(tmp_path: Path) -> None:
    half = SECTION.model_copy(update={"steps": 15})
    train(_objective(), half, tmp_path / "stopped")
    stopped = train(_objective(), SECTION, tmp_path / "stopped").state_dict()
    whole = train(_objective(), SECTION, tmp_path / "whole").state_dict()
    assert all(torch.equal(stopped[name], whole[name]) for name in whole)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]


def test_its_encoder_is_a_timm_directory_like_maes(tmp_path: Path) -> None:
    import timm

    objective = _objective()
    model = objective.build().eval()
    objective.save(model, tmp_path)
    pixels = torch.rand(2, 3, 32, 32)
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(plain(pixels), model.model.encoder(pixels))
    again = objective.load(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert read_card(tmp_path)["pretraining"] == "simmim"


@pytest.mark.parametrize(("size", "words"), [(4, "at least a patch, got 4 and patch_size 8"), (36, "got 36 and 8")])
def test_images_that_patches_do_not_tile_are_refused(size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SimMIM("test_vit", size, 8)
