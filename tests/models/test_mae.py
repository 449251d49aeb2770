"""The masked autoencoder: exact mask ratio, loss on masked patches only, an encoder that timm loads."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from factory.models.classifier import build_classifier
from factory.models.mae import (
    MaskedAutoencoder,
    begin_from,
    load_mae,
    patchify,
    random_masking,
    save_mae,
    sincos_positions,
    unpatchify,
)


@pytest.fixture(scope="module")
def mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder("test_vit", 32, 8, decoder_width=32, decoder_depth=1).eval()


def _images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _noise(count: int = 2, length: int = 16) -> torch.Tensor:
    return torch.rand(count, length, generator=torch.Generator().manual_seed(2))


def test_a_patch_holds_the_pixels_of_its_square_row_by_row() -> None:
    image = torch.arange(3 * 4 * 4, dtype=torch.float32).reshape(1, 3, 4, 4)
    patches = patchify(image, 2)
    assert patches.shape == (1, 4, 12)
    # The second patch is the upper right one; its first pixel is at row 0, column 2, in three channels.
    assert patches[0, 1, :3].tolist() == [2.0, 18.0, 34.0]


def test_unpatchify_undoes_patchify() -> None:
    images = _images()
    assert torch.equal(unpatchify(patchify(images, 8), 8), images)


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 4), (0.5, 8), (0.9, 1)])
def test_the_mask_ratio_is_exact_for_every_image(ratio: float, kept: int) -> None:
    tokens = torch.randn(5, 16, 3)
    visible, mask, _ = random_masking(tokens, ratio, _noise(5))
    assert visible.shape == (5, kept, 3)
    assert mask.sum(1).tolist() == [16 - kept] * 5


def test_ids_restore_puts_the_visible_tokens_back_where_the_mask_is_zero() -> None:
    tokens = torch.arange(1.0, 17.0).reshape(1, 16, 1)
    visible, mask, ids_restore = random_masking(tokens, 0.75, _noise(1))
    shuffled = torch.cat([visible, torch.zeros(1, 12, 1)], dim=1)
    restored = shuffled.gather(1, ids_restore.unsqueeze(-1))
    assert torch.equal(restored, tokens * (1 - mask).unsqueeze(-1))


def test_equal_noise_masks_an_image_alike_whatever_its_neighbours() -> None:
    tokens, noise = torch.randn(3, 16, 2), _noise(3)
    _, together, _ = random_masking(tokens, 0.75, noise)
    _, alone, _ = random_masking(tokens[1:2], 0.75, noise[1:2])
    assert torch.equal(together[1:2], alone)


def test_positions_are_sines_and_cosines_of_column_then_row() -> None:
    positions = sincos_positions(3, 8)
    # Cell (row 1, column 2): the first frequency is 1, the second 1 / 10000^(1/2) = 0.01.
    expected = [wave(angle) for cell in (2, 1) for wave in (math.sin, math.cos) for angle in (cell, 0.01 * cell)]
    assert positions[1 * 3 + 2].tolist() == pytest.approx(expected, abs=1e-6)


def test_positions_do_not_train(mae: MaskedAutoencoder) -> None:
    trained = {name for name, p in mae.named_parameters() if p.requires_grad}
    assert not {"encoder.pos_embed", "decoder_pos_embed"} & trained
    assert {"encoder.cls_token", "mask_token", "encoder.patch_embed.proj.weight"} <= trained


def test_the_encoder_sees_only_what_is_visible(mae: MaskedAutoencoder) -> None:
    images, noise = _images(), _noise()
    latent, mask, _ = mae.forward_encoder(images, 0.75, noise)
    assert latent.shape == (2, 1 + 4, mae.encoder.embed_dim)
    changed = patchify(images, 8) + 100 * mask.unsqueeze(-1)  # every masked patch is another one
    other, _, _ = mae.forward_encoder(unpatchify(changed, 8), 0.75, noise)
    assert torch.equal(latent, other)


def test_nothing_masked_is_the_plain_encoder(mae: MaskedAutoencoder) -> None:
    images = _images()
    latent, _, ids_restore = mae.forward_encoder(images, 0.0, _noise())
    patches = latent[:, 1:].gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, latent.shape[2]))
    whole = torch.cat([latent[:, :1], patches], dim=1)
    torch.testing.assert_close(whole, mae.encoder.forward_features(images), atol=1e-5, rtol=1e-4)


def test_a_visible_patch_has_no_say_in_the_loss(mae: MaskedAutoencoder) -> None:
    images = _images()
    _, predicted, mask = mae(images, 0.75, _noise())
    target = patchify(images, 8)
    visible = target + torch.randn_like(target) * (1 - mask).unsqueeze(-1)
    masked = target + torch.randn_like(target) * mask.unsqueeze(-1)
    loss = mae.forward_loss(images, predicted, mask)
    assert mae.forward_loss(unpatchify(visible, 8), predicted, mask) == loss
    assert mae.forward_loss(unpatchify(masked, 8), predicted, mask) != loss


def test_norm_pix_loss_is_the_error_to_the_standardised_patch(mae: MaskedAutoencoder) -> None:
    images = _images(1)
    _, predicted, mask = mae(images, 0.75, _noise(1))
    errors = []
    for index in mask[0].nonzero().flatten().tolist():
        row, column = divmod(index, 4)
        square = images[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].permute(1, 2, 0).flatten()
        standard = (square - square.mean()) / math.sqrt(float(square.var()) + 1e-6)
        errors.append((predicted[0, index] - standard).square().mean().item())
    assert mae.forward_loss(images, predicted, mask).item() == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_gradients_reach_the_encoder_the_decoder_and_the_mask_token(mae: MaskedAutoencoder) -> None:
    mae(_images(), 0.75, _noise())[0].backward()
    for name in ("encoder.patch_embed.proj.weight", "encoder.cls_token", "mask_token", "decoder_pred.weight"):
        gradient = mae.get_parameter(name).grad
        assert gradient is not None and gradient.abs().sum() > 0
    mae.zero_grad()


def test_timm_loads_the_encoder_with_equal_features(mae: MaskedAutoencoder, tmp_path: Path) -> None:
    save_mae(mae, tmp_path)
    by_path = timm.create_model(
        "test_vit", img_size=32, patch_size=8, num_classes=0, checkpoint_path=str(tmp_path / "model.safetensors")
    )
    by_directory = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    expected = mae.encoder(_images())
    for loaded in (by_path, by_directory):
        assert torch.equal(loaded.eval()(_images()), expected)


def test_a_saved_autoencoder_comes_back_whole(mae: MaskedAutoencoder, tmp_path: Path) -> None:
    save_mae(mae, tmp_path)
    other = load_mae(MaskedAutoencoder("test_vit", 32, 8, decoder_width=32, decoder_depth=1).eval(), tmp_path)
    assert torch.equal(other(_images(), 0.75, _noise())[1], mae(_images(), 0.75, _noise())[1])


def _authors(side: int = 4, decoder: int = 32) -> dict[str, torch.Tensor]:
    """A checkpoint as MAE's authors write it: timm's names, and a decoder with a place for the class token."""
    state = timm.create_model("test_vit", img_size=8 * side, patch_size=8, num_classes=3).state_dict()
    theirs = MaskedAutoencoder("test_vit", 8 * side, 8, decoder_width=decoder, decoder_depth=1).state_dict()
    state |= {name: value for name, value in theirs.items() if not name.startswith("encoder.")}
    state["decoder_pos_embed"] = torch.zeros(1, side * side + 1, decoder)
    return {name: torch.randn(value.shape, generator=torch.Generator().manual_seed(7)) for name, value in state.items()}


@pytest.mark.parametrize(("side", "decoder"), [(4, 32), (6, 32), (4, None)])
def test_an_autoencoder_begins_from_its_authors_checkpoint(tmp_path: Path, side: int, decoder: int | None) -> None:
    state = _authors(side=side, decoder=decoder or 32)
    if decoder is None:  # the encoder alone, as they publish it for fine-tuning
        state = {name: value for name, value in state.items() if not name.startswith(("decoder", "mask_token"))}
    save_file(state, tmp_path / "mae.safetensors")
    model = MaskedAutoencoder("test_vit", 32, 8, decoder_width=32, decoder_depth=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    begin_from(model, tmp_path / "mae.safetensors")
    found = model.state_dict()
    assert torch.equal(found["encoder.blocks.3.mlp.fc1.weight"], state["blocks.3.mlp.fc1.weight"])
    assert torch.equal(found["encoder.pos_embed"], state["pos_embed"]) == (side == 4)  # others are interpolated
    assert not torch.equal(found["encoder.pos_embed"], before["encoder.pos_embed"])
    wanted = before if decoder is None else state
    assert torch.equal(found["mask_token"], wanted["mask_token"])
    assert torch.equal(found["decoder_pos_embed"], before["decoder_pos_embed"])


@pytest.mark.parametrize(
    ("name", "patch_size", "words"),
    [
        ("vit_tiny_patch16_224", 8, r"fit\.mae\.weights must hold fit\.mae\.encoder, whose \w+ is .*192.*, got .*64"),
        ("test_vit", 16, r"whose patch_embed\.proj\.weight is \[64, 3, 16, 16\], got \[64, 3, 8, 8\] in"),
        ("test_vit2", 8, r"fit\.mae\.weights must hold fit\.mae\.encoder, whose .*; name the encoder"),
    ],
)
def test_a_checkpoint_of_another_width_or_patch_is_refused_with_the_figure(
    tmp_path: Path, name: str, patch_size: int, words: str
) -> None:
    save_file(_authors(), tmp_path / "mae.safetensors")
    model = MaskedAutoencoder(name, 32, patch_size, decoder_width=32, decoder_depth=1)
    with pytest.raises(ValueError, match=words):
        begin_from(model, tmp_path / "mae.safetensors")


def test_a_decoder_of_another_width_is_refused_with_what_to_set(tmp_path: Path) -> None:
    save_file(_authors(decoder=64), tmp_path / "mae.safetensors")
    model = MaskedAutoencoder("test_vit", 32, 8, decoder_width=32, decoder_depth=1)
    with pytest.raises(ValueError, match=r"got one 64 wide and 1 deep .*; set fit\.mae\.decoder_width=64 fit"):
        begin_from(model, tmp_path / "mae.safetensors")


@pytest.mark.parametrize("name", ["vit_little_patch16_reg4_gap_256", "vit_base_patch16_siglip_224"])
def test_an_encoder_that_pools_otherwise_goes_on_to_fine_tuning(tmp_path: Path, name: str) -> None:
    mae = MaskedAutoencoder(name, 32, 16, decoder_width=32, decoder_depth=1)
    save_mae(mae, tmp_path)
    classifier = build_classifier(name, 3, 32, tmp_path / "model.safetensors").eval()
    by_directory = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    features = mae.encoder.eval().forward_features(_images())
    assert torch.equal(classifier.model.forward_features(_images()), features)
    assert torch.equal(by_directory.forward_features(_images()), features)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("mobilenetv3_small_050", 32, 8, 32), "plain VisionTransformer of timm, got 'mobilenetv3_small_050'"),
        (("test_vit", 4, 8, 32), "image_size must be at least a patch, got 4 and patch_size 8"),
        (("test_vit", 36, 8, 32), "multiple of patch_size, got 36 and 8"),
        (("test_vit", 32, 8, 40), "decoder_width must be a multiple of 32, got 40; use 32"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_by_name(arguments: tuple[str, int, int, int], words: str) -> None:
    encoder, image_size, patch_size, width = arguments
    with pytest.raises(ValueError, match=words):
        MaskedAutoencoder(encoder, image_size, patch_size, decoder_width=width)
