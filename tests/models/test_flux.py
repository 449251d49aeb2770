"""The flux denoiser: the sampler draws what the library's pipeline draws, whatever is beside a sample."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_flux import LENGTH, build_pipeline, save_pipeline

from factory.models.denoiser import log_snr
from factory.models.flux import FluxDenoiser, resolution_shift
from factory.models.sampler import Sampled, SampleJob, Sampler
from factory.models.segmenter import LatentSegmenter, save_segmenter

PROMPTS = {"one": "a melanoma", "two": "a nevus on tan skin, blue and gray"}


def denoiser_of(pipeline: Any) -> FluxDenoiser:
    from factory.models.flux import PARTS

    return FluxDenoiser(**{name: getattr(pipeline, name) for name in PARTS}, max_sequence_length=LENGTH)


def drawn(denoiser: FluxDenoiser, jobs: list[SampleJob], width: int, height: int, **options: Any) -> dict[str, Sampled]:
    options = {"slots": 3, "decode_batch": 2, "decode": "all"} | options
    sampler = Sampler(denoiser, width=width, height=height, **options)
    return {sampled.sample_id: sampled for sampled in sampler.run(jobs)}


def job(denoiser: FluxDenoiser, name: str, guidance: float = 3.5, steps: int = 4, seed: int = 7) -> SampleJob:
    return SampleJob(name, seed, denoiser.condition([PROMPTS[name]])[0], guidance, steps)


@pytest.mark.parametrize(("width", "height"), [(16, 16), (32, 24)])
@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_sampler_draws_what_the_librarys_pipeline_draws(
    width: int, height: int, distilled: bool, dynamic: bool
) -> None:
    pipeline = build_pipeline(guidance_embeds=distilled, use_dynamic_shifting=dynamic)
    denoiser = denoiser_of(pipeline)
    found = drawn(denoiser, [job(denoiser, "two", 1.0, 3), job(denoiser, "one", 3.5, 5)], width, height)["one"]
    guided = {"guidance_scale": 3.5} if distilled else {"negative_prompt": "", "true_cfg_scale": 3.5}
    options = {"height": height, "width": width, "num_inference_steps": 5, "max_sequence_length": LENGTH, **guided}
    wanted = pipeline(PROMPTS["one"], generator=torch.Generator().manual_seed(7), output_type="pt", **options).images[
        0
    ]  # in [0, 1]
    assert found.image is not None and found.calls_run == 5
    assert wanted.std() > 0.01
    torch.testing.assert_close((found.image + 1) / 2, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("distilled", [True, False])
def test_a_batch_of_different_samples_equals_single_ones(distilled: bool) -> None:
    denoiser = denoiser_of(build_pipeline(guidance_embeds=distilled))
    jobs = [job(denoiser, "one", 3.5, 3, seed=1), job(denoiser, "two", 1.0, 5, seed=2)]
    together = drawn(denoiser, jobs, 16, 16)
    for single in jobs:
        alone = drawn(denoiser, [single], 16, 16)[single.sample_id]
        assert torch.equal(alone.latents, together[single.sample_id].latents)  # one shape: to the last bit
        torch.testing.assert_close(alone.image, together[single.sample_id].image, rtol=0, atol=0)
        narrow = drawn(denoiser, [single], 16, 16, slots=1)[single.sample_id]
        torch.testing.assert_close(narrow.latents, alone.latents, rtol=0, atol=1e-5)
    assert not torch.allclose(together["one"].latents, together["two"].latents, atol=0.1)


def test_the_shift_is_the_schedulers_at_each_resolution() -> None:
    # FLUX.1-dev: mu .50 at 256 tokens, .63 at 1,024, 1.15 at 4,096.
    dev = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    found = [math.log(resolution_shift(dev, tokens)) for tokens in (256, 1024, 4096)]
    assert found == pytest.approx([0.5, 0.63, 1.15], abs=1e-12)
    assert resolution_shift(FlowMatchEulerDiscreteScheduler(shift=3.0), 256) == 3.0
    linear = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear")
    linear.set_timesteps(sigmas=[0.5], mu=0.63)
    shift = resolution_shift(linear, 1024)
    assert shift * 0.5 / (1 + (shift - 1) * 0.5) == pytest.approx(linear.sigmas[0].item(), abs=1e-6)


def test_the_condition_is_the_pooled_vector_and_then_the_states() -> None:
    pipeline = build_pipeline()
    denoiser = denoiser_of(pipeline)
    found = denoiser.condition(["a nevus"])
    states, pooled, _ = pipeline.encode_prompt(["a nevus"], max_sequence_length=LENGTH)
    assert found.shape == (1, 1 + LENGTH, 32)
    torch.testing.assert_close(found[:, 0, :24], pooled, rtol=0, atol=1e-5)
    assert (found[:, 0, 24:] == 0).all()
    torch.testing.assert_close(found[:, 1:], states, rtol=0, atol=1e-5)
    many = denoiser.condition([f"{k} moles" for k in range(9)] + ["a nevus"])
    assert torch.equal(many[-1], found[0])  # one shape: an embedding never depends on its neighbours


def test_alpha_bars_have_the_signal_to_noise_of_their_levels() -> None:
    denoiser = denoiser_of(build_pipeline())
    level = torch.tensor([0.2, 0.5, 0.9])
    at = denoiser.alphas_cumprod[(level * 1000).round().long() - 1]
    torch.testing.assert_close(log_snr("epsilon", at), log_snr("flow", level), rtol=1e-3, atol=1e-3)


def test_an_image_goes_to_latents_and_back_by_the_vaes_scaling() -> None:
    pipeline = build_pipeline()
    denoiser = denoiser_of(pipeline)
    image = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = denoiser.encode(image, torch.zeros(2, 1, 16, 24))
    assert latents.shape == (2, *denoiser.latent_shape(24, 16))
    with torch.no_grad():
        raw = pipeline.vae.encode(image).latent_dist.mode()
        torch.testing.assert_close(latents, (raw - 0.0609) * 1.5035)
        torch.testing.assert_close(denoiser.decode(latents)[0], pipeline.vae.decode(raw).sample.clamp(-1, 1))


def test_a_mask_comes_from_a_segmenter_of_the_latents_and_is_nan_without_one(tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "base")
    plain = FluxDenoiser.load(base, max_sequence_length=LENGTH)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert plain.mask_source is None
    assert plain.mask(latents).shape == (2, 1, 16, 16) and plain.mask(latents).isnan().all()
    torch.manual_seed(0)
    save_segmenter(LatentSegmenter(4, factor=2, width=8), tmp_path / "segmenter", plain.vae_digest)
    masked = FluxDenoiser.load(base, segmenter=tmp_path / "segmenter", max_sequence_length=LENGTH)
    assert masked.mask_source == "segmented"
    found = masked.decode(latents)[1]
    assert found.shape == (2, 1, 16, 16) and (found >= 0).all() and (found <= 1).all()
    assert masked.digest != plain.digest and masked.vae_digest == plain.vae_digest
    other = save_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="vae_digest must be the one the segmenter"):
        FluxDenoiser.load(other, segmenter=tmp_path / "segmenter", max_sequence_length=LENGTH)


def test_a_directory_draws_what_the_pipeline_in_it_draws(tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "base")
    loaded, memory = FluxDenoiser.load(base, max_sequence_length=LENGTH), denoiser_of(build_pipeline())
    one, other = (drawn(flux, [job(flux, "one")], 16, 16)["one"] for flux in (loaded, memory))
    torch.testing.assert_close(one.image, other.image, rtol=0, atol=1e-6)
    assert loaded.vae_digest == memory.vae_digest
    assert loaded.digest == FluxDenoiser.load(base, max_sequence_length=LENGTH).digest
    assert loaded.digest != FluxDenoiser.load(base, max_sequence_length=LENGTH - 1).digest


def test_half_precision_stays_near_the_pipelines(tmp_path: Path) -> None:
    pipeline = build_pipeline()
    denoiser = denoiser_of(pipeline).to("cpu", torch.bfloat16)
    assert denoiser.vae.dtype == torch.float32
    found = drawn(denoiser, [job(denoiser, "one")], 16, 16)["one"].image
    exact = drawn(denoiser_of(build_pipeline()), [job(denoiser, "one")], 16, 16)["one"].image
    assert found is not None and exact is not None
    assert 0 < np.abs(found.numpy() - exact.numpy()).mean() < 0.05


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    pipeline = build_pipeline()
    denoiser = denoiser_of(pipeline)
    with pytest.raises(ValueError, match="size must be a multiple of 4, got 18x16; round it"):
        denoiser.latent_shape(18, 16)
    with pytest.raises(ValueError, match="max_sequence_length must be from 1 to 512, got 513; choose"):
        FluxDenoiser.load(save_pipeline(tmp_path / "base"), max_sequence_length=513)
    with pytest.raises(ValueError, match=r"scheduler must leave .* got use_karras_sigmas=True; set use_karras_sigmas"):
        denoiser_of(build_pipeline(use_karras_sigmas=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"weights must be a FLUX.1 directory with transformer, .* without transformer"
    ):
        FluxDenoiser.load(tmp_path / "empty")
