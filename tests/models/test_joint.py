"""The joint generator: surgery, codec, files, adapters, loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from factory.models.joint import (
    JointDenoiser,
    LatentStats,
    MaskHead,
    build_scheduler,
    build_unet,
    build_vae,
    joint_loss,
    mask_to_vae_input,
    train_tokenizer,
    widen,
)
from factory.models.lora import add_lora, fuse, load_adapter, save_lora
from factory.models.weights import generator_digest, weight_files

Make = Callable[..., JointDenoiser]
UNET: dict[str, Any] = {"block_out_channels": (16, 16), "num_plain_blocks": 1, "num_heads": 2, "norm_num_groups": 4}


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _predict(denoiser: JointDenoiser, seed: int = 3) -> Tensor:
    empty, prompted = denoiser.condition([""]), denoiser.condition(["a nevus", "melanoma"])
    return denoiser.predict(
        _noise(2, 8, 8, 8, seed=seed), torch.tensor([999, 40]), prompted, torch.tensor([2.0, 1.0]), empty
    ).guided


def _plain_unet() -> UNet2DConditionModel:
    torch.manual_seed(1)
    return build_unet(**UNET, cross_attention_dim=16, channels=4).eval()


def _trained_adapter(unet: UNet2DConditionModel, rank: int = 4) -> UNet2DConditionModel:
    """LoRA whose every tensor has moved: fresh, half of it is zero and proves nothing."""
    add_lora(unet, rank)
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return unet.eval()


# ---- surgery


def test_a_widened_unet_draws_the_image_of_its_base_to_the_last_bit_whatever_the_mask_is() -> None:
    base = _plain_unet()
    image, text, time = _noise(2, 4, 8, 8), _noise(2, 12, 16), torch.tensor([999, 3])
    before = base(image, time, text).sample
    wide = widen(base)
    after = wide(torch.cat([image, 100 * _noise(2, 4, 8, 8, seed=5)], dim=1), time, text).sample
    assert torch.equal(after[:, :4], before)
    assert torch.equal(after[:, 4:], torch.zeros(2, 4, 8, 8))
    assert (wide.config.in_channels, wide.config.out_channels) == (8, 8)


def test_a_widened_unet_learns_its_mask_from_the_first_step() -> None:
    # The target has unit variance and the mask's prediction is zero: its loss is one, and nothing is a dead saddle.
    wide, scheduler = widen(_plain_unet()), build_scheduler("epsilon")
    terms = joint_loss(
        wide, None, scheduler, latents=_noise(64, 8, 8, 8), noise=_noise(64, 8, 8, 8, seed=1),
        timesteps=torch.full((64,), 500), condition=_noise(64, 12, 16), mask=torch.zeros(64, 1, 16, 16),
        mask_weight=1.0, head_weight=0.0,
    )  # fmt: skip
    terms["loss"].backward()
    assert terms["mask_mse"].item() == pytest.approx(1.0, abs=0.03)
    assert wide.conv_out.weight.grad[4:].abs().sum() > 0.1


def test_a_unet_that_is_not_plain_is_not_widened() -> None:
    with pytest.raises(ValueError, match="unet must have 4 channels in and out to be widened, got 9 in and 9 out"):
        widen(build_unet(**UNET, cross_attention_dim=16, channels=9))


# ---- codec


def test_image_and_mask_are_encoded_apart_and_whitened(tiny: JointDenoiser) -> None:
    image, mask = _noise(3, 3, 32, 16).clamp(-1, 1), (_noise(3, 1, 32, 16) > 0).float()
    tiny.stats = LatentStats((0.5,) * 4, (2.0,) * 4, (-1.0,) * 4, (0.25,) * 4)
    latents = tiny.encode(image, mask)
    with torch.no_grad():
        of_image = tiny.vae.encode(image).latent
        of_mask = tiny.vae.encode(mask.repeat(1, 3, 1, 1) * 2 - 1).latent
    assert latents.shape == (3, *tiny.latent_shape(16, 32)) == (3, 8, 16, 8)
    torch.testing.assert_close(latents[:, :4], (of_image - 0.5) / 2)
    torch.testing.assert_close(latents[:, 4:], (of_mask + 1) / 0.25, rtol=1e-4, atol=1e-4)
    assert torch.equal(tiny.image_latents(latents), latents[:, :4])


def test_an_image_alone_has_the_latents_that_it_has_beside_a_mask(tiny: JointDenoiser) -> None:
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    both = tiny.encode(image, torch.ones(2, 1, 16, 16))
    assert torch.allclose(tiny.encode_image(image), both[:, :4], atol=1e-5)


def test_measured_statistics_give_unit_variance_per_channel_and_can_be_undone(tiny: JointDenoiser) -> None:
    scaled = _noise(16, 8, 4, 4) * torch.arange(1.0, 9).reshape(1, 8, 1, 1) + 3
    stats = LatentStats.measure(scaled, whiten_image=True)
    white = stats.whiten(scaled)
    torch.testing.assert_close(white.mean(dim=(0, 2, 3)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(white.std(dim=(0, 2, 3)), torch.ones(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(stats.unwhiten(white), scaled)
    assert torch.equal(LatentStats.measure(scaled, whiten_image=False).whiten(scaled)[:, :4], scaled[:, :4])


def test_a_mask_becomes_a_picture_of_minus_one_and_one() -> None:
    picture = mask_to_vae_input(torch.tensor([[[[0, 1]]]]))
    assert picture.tolist() == [[[[-1.0, 1.0]], [[-1.0, 1.0]], [[-1.0, 1.0]]]]


def test_the_head_and_the_vae_both_give_a_mask_probability_at_image_size(tiny: JointDenoiser) -> None:
    latents = _noise(2, 8, 8, 12)
    image, mask = tiny.decode(latents)
    assert image.shape == (2, 3, 16, 24) and mask.shape == (2, 1, 16, 24)
    assert image.abs().max() <= 1 and 0 <= mask.min() <= mask.max() <= 1
    torch.testing.assert_close(mask, tiny.mask_head(latents[:, 4:]).sigmoid())  # type: ignore[misc]
    tiny.mask_head = None
    with torch.no_grad():
        picture = tiny.vae.decode(latents[:, 4:]).sample
    assert torch.equal(tiny.mask(latents) > 0.5, picture.mean(dim=1, keepdim=True) > 0)


def test_sizes_that_latents_cannot_have_are_refused(tiny: JointDenoiser) -> None:
    with pytest.raises(ValueError, match="size must be a multiple of 2, got 33x32"):
        tiny.latent_shape(33, 32)


def test_a_prompt_is_embedded_the_same_whatever_prompts_come_with_it(tiny: JointDenoiser) -> None:
    many = tiny.condition([f"nevus {index}" for index in range(11)] + ["melanoma"])
    assert many.shape == (12, 12, 16)
    assert torch.equal(tiny.condition(["melanoma"])[0], many[11])
    assert tiny.condition(["a word " * 50]).shape == (1, 12, 16)


def test_the_tokenizer_learns_the_words_of_its_captions_and_can_say_everything() -> None:
    tokenizer = train_tokenizer(["melanoma with irregular border"] * 9, vocab_size=600)
    assert len(tokenizer("Melanoma border").input_ids) == 4  # start, two words, end
    assert tokenizer.decode(tokenizer("naïve 漢 #7").input_ids, skip_special_tokens=True) == "naïve 漢 # 7"
    with pytest.raises(ValueError, match="vocab_size must be at least 514, got 100"):
        train_tokenizer(["x"], vocab_size=100)


# ---- schedule


def test_zero_terminal_snr_is_refused_on_a_base_that_predicts_noise() -> None:
    assert build_scheduler().alphas_cumprod[-1].item() == 0.0
    with pytest.raises(ValueError, match="rescale_betas_zero_snr must be False when prediction_type is epsilon"):
        build_scheduler("epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"prediction_type must be epsilon or v_prediction .* got 'sample'"):
        build_scheduler("sample")


# ---- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_denoiser_comes_back_as_it_was(tiny: JointDenoiser, tmp_path: Path, dtype: torch.dtype) -> None:
    tiny.stats = LatentStats(mask_mean=(0.1, 0.2, 0.3, 0.4))
    for module in (tiny.unet, tiny.vae, tiny.text_encoder):
        module.to(dtype).float()  # values that half precision can hold
    tiny.save(tmp_path, dtype=dtype)
    back = JointDenoiser.load(tmp_path)
    assert load_file(tmp_path / "unet/diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == dtype
    assert back.unet.dtype == torch.float32 and not back.unet.training
    assert torch.equal(_predict(back), _predict(tiny))
    for found, wanted in zip(back.decode(_noise(1, 8, 8, 8)), tiny.decode(_noise(1, 8, 8, 8)), strict=True):
        assert torch.equal(found, wanted)
    assert back.stats == tiny.stats and back.vae_digest == tiny.vae_digest


def test_the_directory_is_one_that_diffusers_loads_and_samples_from(tiny: JointDenoiser, tmp_path: Path) -> None:
    tiny.save(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(0)
    latents = pipeline("a nevus", 16, 16, num_inference_steps=2, output_type="latent", generator=rng).images
    assert latents.shape == (1, 8, 8, 8) and torch.isfinite(latents).all()


def _plain_directory(parts: JointDenoiser, unet: UNet2DConditionModel, vae: Any, folder: Path) -> Path:
    """A text-to-image base as its publishers write it: no mask head, no statistics."""
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, unet=unet, safety_checker=None,
        scheduler=build_scheduler("epsilon"), feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def _kl() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, scaling_factor=0.25, shift_factor=0.5)


def _taesd() -> AutoencoderTiny:
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    return AutoencoderTiny(**sizes, **blocks, upsampling_scaling_factor=2)


@pytest.mark.parametrize(
    ("build", "latents_of"),
    [
        (_kl, lambda vae, image: (vae.encode(image).latent_dist.mode() - 0.5) * 0.25),
        (_taesd, lambda vae, image: vae.encode(image).latents),
        (lambda: build_vae(block_out_channels=(8, 8), layers_per_block=(0, 1)), lambda v, i: v.encode(i).latent),
    ],
    ids=["AutoencoderKL", "AutoencoderTiny", "AutoencoderDC"],
)
def test_every_kind_of_codec_is_loaded_encoded_with_and_decoded_with(
    make_tiny: Make, tmp_path: Path, build: Callable[[], Any], latents_of: Callable[[Any, Tensor], Tensor]
) -> None:
    torch.manual_seed(4)
    vae, parts = build().eval(), make_tiny()
    loaded = JointDenoiser.load(_plain_directory(parts, _plain_unet(), vae, tmp_path / "base"))
    assert type(loaded.vae) is type(vae) and loaded.factor == 2
    assert loaded.latent_shape(24, 16) == (8, 8, 12)
    image, mask = _noise(2, 3, 16, 24).clamp(-1, 1), torch.ones(2, 1, 16, 24)
    latents = loaded.encode(image, mask)
    with torch.no_grad():  # one by one: at another batch size equal to rounding only
        torch.testing.assert_close(latents[1:, :4], latents_of(vae, image[1:]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(latents[:1, 4:], latents_of(vae, torch.ones(1, 3, 16, 24)), rtol=1e-4, atol=1e-5)
    drawn, found = loaded.decode(latents)
    assert drawn.shape == (2, 3, 16, 24) and found.shape == (2, 1, 16, 24)
    assert drawn.abs().max() <= 1 and 0 <= found.min() <= found.max() <= 1
    loaded.save(tmp_path / "joint")
    again = JointDenoiser.load(tmp_path / "joint")
    assert again.vae_digest == loaded.vae_digest and torch.equal(again.decode(latents)[0], drawn)


def test_a_codec_of_no_known_kind_is_refused(make_tiny: Make, tmp_path: Path) -> None:
    make_tiny().save(tmp_path)
    config = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps({**config, "_class_name": "VQModel"}))
    with pytest.raises(ValueError, match="vae must be one of AutoencoderKL, AutoencoderDC, AutoencoderTiny, got VQMod"):
        JointDenoiser.load(tmp_path)


def test_a_plain_stable_diffusion_directory_is_widened_and_draws_the_same_image(
    make_tiny: Make, tmp_path: Path
) -> None:
    parts, plain = make_tiny(), _plain_unet()
    loaded = JointDenoiser.load(_plain_directory(parts, plain, _kl(), tmp_path))
    latents, text, time = _noise(1, 8, 8, 8), loaded.condition(["a nevus"]), torch.tensor([300])
    found = loaded.predict(latents, time, text, torch.ones(1), loaded.condition([""])).conditional
    with torch.no_grad():
        wanted = plain(latents[:, :4], time, text).sample  # at batch 1, so equal to rounding
    torch.testing.assert_close(found[:, :4], wanted, rtol=0, atol=1e-6)
    assert loaded.prediction_type == "epsilon" and loaded.mask_head is None
    assert loaded.mask(latents).shape == (1, 1, 16, 16)


def test_half_precision_variants_are_found_and_pickled_weights_are_not_loaded(
    tiny: JointDenoiser, tmp_path: Path
) -> None:
    tiny.save(tmp_path)
    weights = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert weight_files(tmp_path / "unet")[1] == "fp16"
    assert torch.equal(_predict(JointDenoiser.load(tmp_path)), _predict(tiny))
    (tmp_path / "unet/diffusion_pytorch_model.fp16.safetensors").unlink()
    (tmp_path / "unet/diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"must be safetensors, got .*model\.bin, which is pickled .*`factory convert"):
        JointDenoiser.load(tmp_path)
    (tmp_path / "unet/diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="unet must hold safetensors, got none; save the pipeline"):
        JointDenoiser.load(tmp_path)
    shutil.rmtree(tmp_path / "unet")
    with pytest.raises(ValueError, match=r"must be a Stable Diffusion directory .* without unet; save"):
        JointDenoiser.load(tmp_path)


def test_the_digest_names_the_files_and_follows_a_change_in_any_that_counts(
    tiny: JointDenoiser, tmp_path: Path
) -> None:
    tiny.save(tmp_path)
    first = JointDenoiser.load(tmp_path)
    assert first.digest == generator_digest(tmp_path) and len(first.digest) == 64
    (tmp_path / "README.md").write_text("words")
    assert generator_digest(tmp_path) == first.digest
    stats = json.loads((tmp_path / "latent_stats.json").read_text())
    (tmp_path / "latent_stats.json").write_text(json.dumps({**stats, "mask_std": [2.0] * 4}))
    second = JointDenoiser.load(tmp_path)
    assert second.digest != first.digest and second.vae_digest == first.vae_digest
    (tmp_path / "latent_stats.json").write_text(json.dumps({**stats, "image_std": [2.0] * 4}))
    assert JointDenoiser.load(tmp_path).vae_digest != first.vae_digest


def test_a_denoiser_in_memory_is_digested_by_its_tensors(make_tiny: Make) -> None:
    assert make_tiny(0).digest == make_tiny(0).digest != make_tiny(1).digest
    assert make_tiny(0).vae_digest != make_tiny(1).vae_digest


def test_digests_stay_those_of_the_weights_when_precision_is_lowered(make_tiny: Make) -> None:
    assert make_tiny().to("cpu", torch.bfloat16).digest == make_tiny().digest


# ---- adapters


def test_an_adapter_comes_back_to_the_last_bit(tiny: JointDenoiser, make_tiny: Make, tmp_path: Path) -> None:
    save_lora(tmp_path, _trained_adapter(tiny.unet))
    fresh = make_tiny()
    untouched = _predict(fresh)
    load_adapter(fresh.unet, tmp_path)
    assert torch.equal(_predict(fresh), _predict(tiny))
    assert not torch.allclose(_predict(fresh), untouched, atol=1e-2)


def test_a_merged_adapter_is_the_same_network_to_rounding(tiny: JointDenoiser) -> None:
    apart = _predict(JointDenoiser(**{**_parts(tiny), "unet": _trained_adapter(tiny.unet)}))
    torch.testing.assert_close(
        _predict(JointDenoiser(**{**_parts(tiny), "unet": fuse(tiny.unet)})), apart, rtol=0, atol=2e-5
    )
    assert not any("lora" in name for name in tiny.unet.state_dict())


def _parts(denoiser: JointDenoiser) -> dict[str, Any]:
    names = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "mask_head", "stats")
    return {name: getattr(denoiser, name) for name in names}


def test_the_pipelines_own_loader_takes_the_adapter(make_tiny: Make, tmp_path: Path) -> None:
    base, tuned = make_tiny(), make_tiny()
    base.save(tmp_path / "base")
    save_lora(tmp_path / "lora", _trained_adapter(tuned.unet))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base", local_files_only=True)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    dual = load_file(tmp_path / "lora/dual_io.safetensors")
    pipeline.unet.load_state_dict(dual, strict=False)
    assert sorted(dual) == ["conv_in.bias", "conv_in.weight", "conv_out.bias", "conv_out.weight"]
    found = JointDenoiser(**{**_parts(base), "unet": pipeline.unet})
    torch.testing.assert_close(_predict(found), _predict(tuned), rtol=0, atol=1e-6)


def test_only_the_named_layers_and_both_convolutions_train(tiny: JointDenoiser) -> None:
    add_lora(tiny.unet, rank=2)
    trained = {name for name, parameter in tiny.unet.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora" not in name} == {
        "conv_in.weight", "conv_in.bias", "conv_out.weight", "conv_out.bias",
    }  # fmt: skip
    layers = {name.split(".lora_")[0].rsplit("blocks.", 1)[-1] for name in trained if "lora" in name}
    for target in ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"):
        assert any(layer.endswith(target) for layer in layers), target


def test_an_adapter_directory_loads_over_its_base_with_its_own_statistics(make_tiny: Make, tmp_path: Path) -> None:
    base, tuned = make_tiny(), make_tiny()
    base.save(tmp_path / "base")
    save_lora(tmp_path / "lora", _trained_adapter(tuned.unet))
    LatentStats(mask_mean=(9.0,) * 4).save(tmp_path / "lora/latent_stats.json")
    loaded = JointDenoiser.load(tmp_path / "base", adapter=tmp_path / "lora")
    torch.testing.assert_close(_predict(loaded), _predict(tuned), rtol=0, atol=2e-5)
    assert loaded.stats.mask_mean == (9.0,) * 4
    assert (
        loaded.digest == generator_digest(tmp_path / "base", tmp_path / "lora") != generator_digest(tmp_path / "base")
    )
    assert loaded.vae_digest == base.vae_digest


def test_saving_a_denoiser_with_an_adapter_merges_it(tiny: JointDenoiser, tmp_path: Path) -> None:
    _trained_adapter(tiny.unet)
    wanted = _predict(tiny)
    tiny.save(tmp_path)
    torch.testing.assert_close(_predict(JointDenoiser.load(tmp_path)), wanted, rtol=0, atol=2e-5)
    assert torch.equal(_predict(tiny), wanted)


def test_an_adapter_that_is_none_or_of_another_base_is_refused(tiny: JointDenoiser, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter must be a directory with pytorch_lora_weights\.safetensors"):
        load_adapter(tiny.unet, tmp_path)
    save_lora(tmp_path, add_lora(tiny.unet, 2))
    wrong = {**load_file(tmp_path / "dual_io.safetensors"), "conv_in.weight": torch.zeros(16, 4, 3, 3)}
    save_file(wrong, tmp_path / "dual_io.safetensors")
    with pytest.raises(ValueError, match=r"must hold conv_in\.weight of shape \(16, 8, 3, 3\), got \(16, 4, 3, 3\)"):
        load_adapter(tiny.unet, tmp_path)


def test_the_same_adapter_is_saved_as_the_same_bytes(tiny: JointDenoiser, tmp_path: Path) -> None:
    _trained_adapter(tiny.unet)
    stored = set()
    for _ in range(8):  # the library's own order of metadata is a coin toss
        save_lora(tmp_path, tiny.unet)
        names = ("pytorch_lora_weights.safetensors", "dual_io.safetensors")
        stored.add(tuple((tmp_path / name).read_bytes() for name in names))
    assert len(stored) == 1


# ---- loss


def test_a_network_that_knows_the_answer_has_no_loss_in_either_form(tiny: JointDenoiser) -> None:
    latents, noise, times = _noise(4, 8, 8, 8), _noise(4, 8, 8, 8, seed=1), torch.tensor([0, 300, 900, 999])
    for kind in ("epsilon", "v_prediction"):
        scheduler = build_scheduler(kind)
        a = scheduler.alphas_cumprod[times].reshape(4, 1, 1, 1)
        answer = noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * latents
        terms = joint_loss(
            lambda z, t, c, return_dict, answer=answer: (answer,), None, scheduler,  # type: ignore[arg-type]
            latents=latents, noise=noise, timesteps=times, condition=noise, mask=noise,
            mask_weight=1.0, head_weight=0.0,
        )  # fmt: skip
        assert terms["loss"].item() < 1e-10
        assert set(terms) == {"loss", "image_mse", "mask_mse"}


def test_the_loss_is_the_weighted_sum_of_its_terms_and_the_head_fades_with_alpha_bar(tiny: JointDenoiser) -> None:
    def terms(time: int, mask_weight: float = 0.5, head_weight: float = 0.2) -> dict[str, Tensor]:
        return joint_loss(
            tiny.unet, tiny.mask_head, tiny.scheduler, latents=_noise(2, 8, 8, 8), noise=_noise(2, 8, 8, 8, seed=1),
            timesteps=torch.full((2,), time), condition=tiny.condition(["a", "b"]), mask=torch.ones(2, 1, 16, 16),
            mask_weight=mask_weight, head_weight=head_weight,
        )  # fmt: skip

    early = terms(10)
    total = early["image_mse"] + 0.5 * early["mask_mse"] + 0.2 * early["head"]
    assert early["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    assert early["head"].item() > 0.1
    assert terms(999)["head"].item() == 0.0
    assert "head" not in terms(10, head_weight=0.0)


def test_a_mask_head_keeps_its_size_and_comes_back_from_disk(tmp_path: Path) -> None:
    head = MaskHead(factor=4).eval()
    assert 50_000 <= sum(parameter.numel() for parameter in head.parameters()) <= 100_000
    head.save(tmp_path)
    assert torch.equal(MaskHead.load(tmp_path)(_noise(1, 4, 5, 5)), head(_noise(1, 4, 5, 5)))
    with pytest.raises(ValueError, match="factor must be a power of two, got 3"):
        MaskHead(factor=3)
