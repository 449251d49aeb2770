"""The class-conditional denoiser: the sampler draws what the library draws, and the class is what decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from tiny_classes import CLASSES, build_classes, plain_scheduler

from factory.models import codec
from factory.models.class_conditional import ClassConditionalDenoiser
from factory.models.class_lora import add_lora, load_adapter, save_adapter
from factory.models.class_networks import NETWORKS, build_network, class_tables, null_class, take_classes
from factory.models.families import check_base, load_denoiser, vae_digest_of
from factory.models.joint import JointDenoiser
from factory.models.sampler import Sampled, SampleJob, Sampler, slot_invariant
from factory.models.weights import STARTER, check_classes, family_of, generator_digest, read_labels

SIDE = 16  # px: latents of 8 x 8


def drawn(denoiser: Any, jobs: list[SampleJob], **options: Any) -> dict[str, Sampled]:
    options = {"slots": 2, "decode_batch": 2, "decode": "all"} | options
    return {found.sample_id: found for found in Sampler(denoiser, width=SIDE, height=SIDE, **options).run(jobs)}


def job(denoiser: Any, name: str, guidance: float = 3.0, steps: int = 5, seed: int = 7) -> SampleJob:
    return SampleJob(name, seed, denoiser.condition([name])[0], guidance, steps)


def pipeline_draws(pipeline: DiTPipeline, number: int, guidance: float, steps: int = 5, seed: int = 7) -> torch.Tensor:
    """(3, H, W) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(seed)
    return pipeline(
        [number], guidance_scale=guidance, generator=rng, num_inference_steps=steps, output_type="pt"
    ).images[0]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("learned_sigma", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_an_exported_dit_draws_in_the_librarys_pipeline_what_the_sampler_draws(
    tmp_path: Path, prediction_type: str, learned_sigma: bool, guidance: float
) -> None:
    denoiser = build_classes("dit", learned_sigma=learned_sigma, prediction_type=prediction_type)
    found = drawn(denoiser, [job(denoiser, "nevus", 1.0, 3, 1), job(denoiser, "melanoma", guidance)])["melanoma"]
    denoiser.save(tmp_path)
    pipeline = DiTPipeline.from_pretrained(tmp_path)
    assert pipeline.get_label_ids(["melanoma"]) == [1] and pipeline.transformer.config.num_embeds_ada_norm == 1000
    wanted = pipeline_draws(pipeline, 1, guidance)
    assert found.image is not None and wanted.std() > 0.01
    torch.testing.assert_close((found.image + 1) / 2, wanted, rtol=0, atol=1e-4)
    again = load_denoiser(tmp_path)
    assert isinstance(again, ClassConditionalDenoiser) and again.null == 1000 and dict(again.labels) == CLASSES
    image = drawn(again, [job(again, "melanoma", guidance)])["melanoma"].image
    torch.testing.assert_close(image, found.image, rtol=0, atol=1e-5)
    assert (pipeline_draws(pipeline, 0, guidance) - wanted).abs().max() > 1e-3  # another class


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_unet_draws_what_the_librarys_scheduler_draws_around_it(prediction_type: str, guidance: float) -> None:
    denoiser = build_classes("unet", prediction_type=prediction_type)
    found = drawn(denoiser, [job(denoiser, "nevus", 1.0, 3, 1), job(denoiser, "melanoma", guidance)])["melanoma"]
    scheduler, latents = plain_scheduler(denoiser), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            conditional = denoiser.network(latents, timestep, class_labels=torch.tensor([1])).sample
            free = denoiser.network(latents, timestep, class_labels=torch.tensor([3])).sample
            guided = free + guidance * (conditional - free)
            latents = scheduler.step(guided, timestep, latents).prev_sample
        torch.testing.assert_close(found.latents, latents[0], rtol=0, atol=1e-4)
        mean, std = (
            torch.tensor(row).reshape(4, 1, 1) for row in (denoiser.stats.image_mean, denoiser.stats.image_std)
        )
        wanted = denoiser.vae.decode(latents * std + mean).sample[0].clamp(-1, 1)
    torch.testing.assert_close(found.image, wanted, rtol=0, atol=1e-4)
    assert wanted.std() > 0.01


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_class_changes_the_sample_and_guidance_one_is_the_conditional_alone(kind: str) -> None:
    denoiser = build_classes(kind)
    one, other = (drawn(denoiser, [job(denoiser, name)])[name].latents for name in ("nevus", "melanoma"))
    assert (one - other).abs().max() > 1e-2
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    condition, free = denoiser.condition(["nevus", "melanoma"]), denoiser.condition([""])
    assert condition.shape == (2, 1, 1) and condition.flatten().tolist() == [0, 1] and free.item() == 3
    at_one = denoiser.predict(latents, timesteps, condition, torch.ones(2), free)
    assert torch.equal(at_one.guided, at_one.conditional)
    bare = denoiser.predict(latents, timesteps, free.expand(2, 1, 1), torch.full((2,), 4.0), free)
    torch.testing.assert_close(bare.guided, bare.conditional, rtol=0, atol=1e-5)  # the null class guided by itself
    assert (at_one.conditional - bare.conditional).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_directory_draws_what_the_denoiser_in_memory_draws(tmp_path: Path, kind: str) -> None:
    denoiser = build_classes(kind)
    denoiser.save(tmp_path)
    loaded = load_denoiser(tmp_path, family="class_conditional")
    assert family_of(tmp_path) == loaded.family == "class_conditional" and loaded.mask_source is None
    one, other = (drawn(each, [job(each, "melanoma")])["melanoma"] for each in (denoiser, loaded))
    torch.testing.assert_close(one.image, other.image, rtol=0, atol=1e-5)
    assert other.mask is not None and other.mask.shape == (1, SIDE, SIDE) and other.mask.isnan().all()
    assert loaded.vae_digest == denoiser.vae_digest == vae_digest_of(tmp_path)
    assert loaded.digest == generator_digest(tmp_path) != denoiser.digest


@pytest.mark.parametrize(("kind", "file"), [("unet", "labels.json"), ("dit", "model_index.json")])
def test_the_class_names_are_part_of_the_digest(tmp_path: Path, kind: str, file: str) -> None:
    build_classes(kind).save(tmp_path)
    before = generator_digest(tmp_path)
    (tmp_path / file).write_text((tmp_path / file).read_text().replace("nevus", "vascular"))
    assert generator_digest(tmp_path) != before


def test_the_shipped_vae_is_the_same_space_for_both_families() -> None:
    starter = JointDenoiser.load(STARTER)
    vae = codec.load_codec(STARTER / "vae")
    assert codec.vae_digest(vae, starter.stats) == starter.vae_digest  # so the shipped gate judges both
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = starter.stats.whiten(codec.scaled_modes(vae, image))
    torch.testing.assert_close(latents, starter.encode_image(image), rtol=0, atol=1e-5)
    found = codec.decoded(vae, starter.stats.unwhiten(latents)).clamp(-1, 1)
    both = torch.cat([latents, torch.zeros_like(latents)], dim=1)
    torch.testing.assert_close(found, starter.decode(both)[0], rtol=0, atol=1e-5)


def test_a_batch_of_different_classes_equals_single_ones() -> None:
    denoiser = build_classes("unet")
    jobs = [job(denoiser, "nevus", 3.0, 3, seed=1), job(denoiser, "melanoma", 1.0, 5, seed=2)]
    together = drawn(denoiser, jobs)
    for single in jobs:
        assert torch.equal(drawn(denoiser, [single])[single.sample_id].latents, together[single.sample_id].latents)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_the_probe_of_slots_takes_a_generator_by_class(kind: str) -> None:
    assert slot_invariant(build_classes(kind), width=SIDE, height=SIDE, slots=3, decode_batch=2)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_classes_can_be_taken_in_another_order_and_more_than_once(kind: str) -> None:
    denoiser = build_classes(kind)
    before = [table.weight.clone() for table in class_tables(denoiser.network)]
    take_classes(denoiser.network, [2, 0, 0, 1, 3])
    assert null_class(denoiser.network) == 4 and len(before) == (1 if kind == "unet" else 2)
    for table, old in zip(class_tables(denoiser.network), before, strict=True):
        assert torch.equal(table.weight, old[[2, 0, 0, 1, 3]]) and table.weight.requires_grad


def test_a_fresh_dit_begins_with_a_prediction_of_zero_and_blocks_that_change_nothing() -> None:
    torch.manual_seed(0)
    kind, config = NETWORKS["dermae_dit_b"]
    small = config | {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    fresh = build_network(kind, small, 3, 4, 8).eval()
    with torch.no_grad():
        found = fresh(torch.randn(2, 4, 8, 8), torch.tensor([5, 500]), class_labels=torch.tensor([0, 3])).sample
    assert found.shape == (2, 4, 8, 8) and (found == 0).all()
    assert not any(block.norm1.linear.weight.any() for block in fresh.transformer_blocks)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_lora_in_a_directory_is_merged_into_the_network(tmp_path: Path, kind: str) -> None:
    build_classes(kind).save(tmp_path / "base")
    tuned = ClassConditionalDenoiser.load(tmp_path / "base")
    add_lora(tuned.network, 2)
    trained = [name for name, value in tuned.network.named_parameters() if value.requires_grad]
    assert trained and all(".lora_" in name for name in trained)
    rng = torch.Generator().manual_seed(0)
    for name in trained:
        value = tuned.network.get_parameter(name)
        value.data = 0.3 * torch.randn(value.shape, generator=rng)  # so small that rounding is not blown up
    save_adapter(tmp_path / "lora", tuned.network)
    plain, merged = load_denoiser(tmp_path / "base"), load_denoiser(tmp_path / "base", tmp_path / "lora")
    wanted, found, without = (drawn(each, [job(each, "nevus")])["nevus"].latents for each in (tuned, merged, plain))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (found - without).abs().max() > 1e-2 and merged.digest != plain.digest
    assert not any("lora" in name for name, _ in merged.network.named_parameters())


def test_a_lora_of_another_base_is_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path, add_lora(build_classes("dit").network, 2))
    with pytest.raises(ValueError, match=r"in .* must hold transformer.*lora_A.* of shape None, got .*; use the base"):
        load_adapter(build_classes("unet").network, tmp_path)
    with pytest.raises(ValueError, match="adapter must be a directory with pytorch_lora_weights.safetensors, got"):
        load_adapter(build_classes("unet").network, tmp_path / "none")


def test_an_unknown_class_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="class must be a known word, got 'melanma'; did you mean 'melanoma'?"):
        build_classes().condition(["nevus", "melanma"])


def test_a_plan_of_classes_that_the_generator_has_not_learnt_is_refused(tmp_path: Path) -> None:
    build_classes().save(tmp_path)
    check_classes(tmp_path, ["nevus", "melanoma"])
    with pytest.raises(ValueError, match=r"of the generator \(nevus, melanoma, seb.*\), got vascular; fit them"):
        check_classes(tmp_path, ["nevus", "vascular"])


def test_directories_of_other_families_and_without_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold a UNet2DModel or a DiT .* got joint in .*; fit one with"):
        ClassConditionalDenoiser.load(STARTER)
    with pytest.raises(ValueError, match="must hold a base of class_conditional for the family .* got one of joint"):
        check_base(STARTER, "class_conditional")
    build_classes().save(tmp_path)
    with pytest.raises(ValueError, match="must hold a base of joint for the family joint, got one of class_cond"):
        load_denoiser(tmp_path, family="joint")
    (tmp_path / "labels.json").write_text('{"3": "nevus"}')
    with pytest.raises(ValueError, match="labels must be names of classes 0 to 2, got 'nevus' for 3; the last row"):
        load_denoiser(tmp_path)
    (tmp_path / "labels.json").unlink()
    with pytest.raises(ValueError, match="weights must name their classes in id2label of model_index.json or in"):
        load_denoiser(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"id2label": {"0": "tench, Tinca tinca", "1": "goldfish"}}))
    assert read_labels(tmp_path) == {"tench": 0, "Tinca tinca": 0, "goldfish": 1}


def test_networks_and_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from diffusers import UNet2DModel
    from tiny_classes import UNET

    plain = UNet2DModel(in_channels=4, out_channels=4, **UNET)
    with pytest.raises(ValueError, match="unet must have a table of classes, got a U-Net without num_class_embeds"):
        null_class(plain)
    dit, unet = build_classes("dit"), build_classes("unet")
    with pytest.raises(ValueError, match="size must be 16x16, which this DiT was fitted at, got 32x32; set it"):
        dit.latent_shape(32, 32)
    with pytest.raises(ValueError, match="size must be a multiple of 4, got 18x16; round it"):
        unet.latent_shape(18, 16)
    assert unet.latent_shape(32, 16) == (4, 8, 16)
    with pytest.raises(ValueError, match="a DiT must have at most 1000 classes for its pipeline, got 1001; use"):
        take_classes(dit.network, [0] * 1002)
        dit.save(tmp_path)
    dit = build_classes("dit")
    dit.stats = unet.stats
    with pytest.raises(ValueError, match="latent_stats.json must be left out for a DiT, .* got statistics; scale"):
        dit.save(tmp_path)
    with pytest.raises(ValueError, match="must have the network's 4 channels, got 4 and 3; use the VAE that"):
        ClassConditionalDenoiser(unet.network, unet.vae, unet.scheduler, CLASSES, codec.image_stats(channels=3))
    build_classes().save(tmp_path / "other")
    config = tmp_path / "other" / "vae" / "config.json"
    config.write_text(config.read_text().replace("AutoencoderDC", "VQModel"))
    with pytest.raises(ValueError, match="vae must be one of AutoencoderKL, .*, AutoencoderTiny, got VQModel"):
        load_denoiser(tmp_path / "other")


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
def test_every_codec_goes_to_latents_and_back_by_its_own_scaling(name: str) -> None:
    from tiny_classes import kl_vae

    torch.manual_seed(0)
    if name == "AutoencoderKL":
        vae = kl_vae().eval()
    else:
        vae = codec.CODECS[name](
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), scaling_factor=0.5, shift_factor=0.25,
        ).eval()  # fmt: skip
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = codec.scaled_modes(vae, image)
    with torch.no_grad():
        raw = vae.encode(image).latent_dist.mode() if name == "AutoencoderKL" else vae.encode(image).latents
        shift = 0.0 if name == "AutoencoderKL" else codec.shift_of(vae)
        torch.testing.assert_close(latents, (raw - shift) * vae.config.scaling_factor)
        torch.testing.assert_close(codec.decoded(vae, latents), vae.decode(raw).sample, rtol=0, atol=1e-5)
    stats = codec.image_stats(latents)
    white = stats.whiten(latents)
    torch.testing.assert_close(white.std(dim=(0, 2, 3)), torch.ones(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(stats.unwhiten(white), latents)
    assert codec.factor_of(vae) == 2
