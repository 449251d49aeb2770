"""The inpaint family: what the library's pipelines draw, any base widened, its context in the sampler's slots."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from tiny_sdxl import build_pipeline, save_pipeline, unet
from torch import Tensor

from factory.models.families import load_denoiser, vae_digest_of
from factory.models.inpaint import InpaintDenoiser, dilated, predicted, widen
from factory.models.joint import JointDenoiser
from factory.models.lora import ATTENTION, add_lora, save_lora
from factory.models.sampler import SampleJob, Sampler, Verdict, initial_noise, slot_invariant
from factory.models.weights import family_of, generator_digest

Make = Callable[..., JointDenoiser]
LIBRARY = {True: StableDiffusionXLInpaintPipeline, False: StableDiffusionInpaintPipeline}
PROMPT = "a melanoma with an irregular border"


def picture(size: int = 32) -> tuple[Tensor, Tensor]:
    """An image (1, 3, H, W) in [-1, 1] and a mask (1, 1, H, W) whose edges cut latent cells."""
    rng = torch.Generator().manual_seed(1)
    image = torch.rand(1, 3, size, size, generator=rng) * 2 - 1
    mask = torch.zeros(1, 1, size, size)
    mask[..., 5:22, 9:26] = 1.0
    return image, mask


def job(denoiser: InpaintDenoiser, name: str = "x", guidance: float = 7.5, steps: int = 4, seed: int = 5) -> SampleJob:
    image, mask = picture()
    condition, context = denoiser.condition([PROMPT])[0], denoiser.context(image, mask)[0]
    return SampleJob(name, seed, condition, guidance, steps, context=context, mask=mask[0])


def draw(denoiser: InpaintDenoiser, *jobs: SampleJob, **options: Any) -> dict[str, Any]:
    sampler = Sampler(denoiser, width=32, height=32, **{"slots": 2, "decode": "all", **options})
    return {sampled.sample_id: sampled for sampled in sampler.run(jobs or [job(denoiser)])}


def drawn_by(pipeline: Any, guidance: float = 7.5, steps: int = 4, seed: int = 5, **more: Any) -> Tensor:
    """The library's image (3, H, W) in [-1, 1] from the same noise, at strength 1."""
    image, mask = picture()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPT, image=image, mask_image=mask, height=32, width=32, strength=1.0, num_inference_steps=steps,
        guidance_scale=guidance, latents=initial_noise(seed, (1, 4, 16, 16)), output_type="pt", **more,
    ).images[0] * 2 - 1  # fmt: skip


# ---- the library's own pipelines


@pytest.mark.parametrize("xl", [True, False], ids=["sdxl", "sd"])
@pytest.mark.parametrize("config", [{}, {"prediction_type": "v_prediction"}], ids=["epsilon", "v"])
def test_the_sampler_draws_what_the_librarys_pipeline_draws(xl: bool, config: dict[str, Any], tmp_path: Path) -> None:
    base = save_pipeline(tmp_path, xl=xl, **config)
    found = draw(InpaintDenoiser.load(base))["x"].image
    pipeline = LIBRARY[xl].from_pretrained(base)
    torch.testing.assert_close(found, drawn_by(pipeline), rtol=0, atol=1e-4)
    assert (drawn_by(pipeline) - drawn_by(pipeline, guidance=1.0)).abs().max() > 1e-3  # that guidance is seen


@pytest.mark.parametrize("zero_empty", [True, False])
def test_sdxls_empty_prompt_is_what_its_pipeline_says(tmp_path: Path, zero_empty: bool) -> None:
    base = save_pipeline(tmp_path, zero_empty=zero_empty)
    denoiser = InpaintDenoiser.load(base)
    empty = denoiser.condition([""])
    assert empty.shape == (1, 1 + 77, 56) and bool((empty == 0).all()) == zero_empty
    found = draw(denoiser)["x"].image
    torch.testing.assert_close(
        found, drawn_by(StableDiffusionXLInpaintPipeline.from_pretrained(base)), rtol=0, atol=1e-4
    )


def test_a_prompt_is_packed_with_its_pooled_vector_first() -> None:
    pipeline = build_pipeline()
    denoiser = in_memory(pipeline)
    packed = denoiser.condition([PROMPT, "a nevus"])
    states, _, pooled, _ = pipeline.encode_prompt(["a nevus"], do_classifier_free_guidance=False)
    assert packed.shape == (2, 1 + 77, 56) and not packed[:, 0, 20:].any()
    torch.testing.assert_close(packed[1:, 0, :20], pooled, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed[1:, 1:], states, rtol=0, atol=1e-5)


def in_memory(pipeline: Any, **fields: Any) -> InpaintDenoiser:
    names = ("unet", "vae", "text_encoder", "tokenizer", "scheduler", "text_encoder_2", "tokenizer_2")
    parts = {name: getattr(pipeline, name) for name in names if hasattr(pipeline, name)}
    return InpaintDenoiser(**parts, **fields)


def test_the_context_is_the_mask_and_the_image_with_grey_where_the_mask_is() -> None:
    denoiser = in_memory(build_pipeline(xl=False))
    image, mask = picture()
    context = denoiser.context(image, mask)
    assert context.shape == (1, 5, 16, 16)
    assert torch.equal(context[:, :1], mask[..., ::2, ::2])
    grey = torch.where(mask > 0, torch.zeros(()), image)
    assert torch.equal(context[:, 1:], denoiser.encode_image(grey))


def test_a_mask_is_dilated_by_a_share_of_the_side() -> None:
    mask = torch.zeros(1, 1, 20, 40)
    mask[..., 10, 20] = 1.0
    grown = dilated(mask, 0.1)  # two pixels of twenty
    assert grown.sum() == 25 and grown[0, 0, 8:13, 18:23].all()
    assert dilated(mask, 0.0) is mask


# ---- any base


@pytest.mark.parametrize("xl", [True, False], ids=["sdxl", "sd"])
def test_a_widened_base_predicts_what_the_base_does_for_any_context(xl: bool) -> None:
    torch.manual_seed(3)
    base = unet(4, xl).eval()
    rng = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 4, 8, 8, generator=rng), 100 * torch.randn(2, 5, 8, 8, generator=rng)
    condition, times = torch.randn(2, 13, 56 if xl else 24, generator=rng), torch.tensor([999, 3])
    extra = None
    if xl:
        sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]]).expand(2, -1)
        extra = {"text_embeds": condition[:, 0, :20], "time_ids": sizes}
    with torch.no_grad():
        wanted = base(latents, times, condition[:, 1:] if xl else condition, added_cond_kwargs=extra).sample
        found = predicted(widen(base), latents, times, condition, context, factor=2)
    assert torch.equal(found, wanted)
    assert (base.config.in_channels, base.config.out_channels) == (9, 4)


def test_of_a_joint_base_the_images_half_is_kept(tiny: JointDenoiser, tmp_path: Path) -> None:
    tiny.save(tmp_path)
    joint, found = JointDenoiser.load(tmp_path), InpaintDenoiser.load(tmp_path)
    rng = torch.Generator().manual_seed(0)
    latents, context = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 5, 8, 8, generator=rng)
    text, empty = joint.condition(["a nevus", "melanoma"]), joint.condition([""])
    times, guidance = torch.tensor([999, 40]), torch.tensor([2.0, 1.0])
    both = torch.cat([latents, torch.zeros_like(latents)], dim=1)
    wanted = joint.predict(both, times, text, guidance, empty).guided[:, :4]
    assert torch.equal(found.predict(latents, times, text, guidance, empty, context).guided, wanted)
    assert found.widened and found.prediction_type == "v_prediction" and found.mask_source == "planned"
    assert found.vae_digest == joint.vae_digest == vae_digest_of(tmp_path, None, "inpaint")
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(found.encode(image, torch.ones(1, 1, 16, 16)), joint.encode_image(image))
    assert torch.equal(found.decode(latents)[0], joint.decode(both)[0])


def test_the_shipped_starter_is_a_base_of_this_family_by_name_alone() -> None:
    from factory.models.weights import STARTER

    assert family_of(STARTER) == "joint"
    denoiser = load_denoiser(STARTER, None, "inpaint")
    assert (denoiser.family, denoiser.factor, denoiser.latent_shape(128, 96)) == ("inpaint", 4, (4, 24, 32))
    assert denoiser.digest == generator_digest(STARTER)


def test_a_unet_of_another_shape_is_not_widened() -> None:
    with pytest.raises(ValueError, match="unet must have 9 channels in and 4 out, or 4 or 8 of both .* got 5 in and 5"):
        widen(unet(5, xl=False))


def test_wrong_directories_are_refused(tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "xl")
    assert family_of(base) == "inpaint"
    with pytest.raises(ValueError, match="must hold a base of joint for the family joint, got one of inpaint"):
        load_denoiser(base, None, "joint")
    scheduler = base / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    for change, sentence in [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "scheduler must be one of noise levels \(DDIMScheduler\) for a network of the family inpaint",
        ),
        ({"prediction_type": "sample"}, "prediction_type must be epsilon or v_prediction"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr must be False when prediction_type is epsilon"),
    ]:
        scheduler.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=sentence):
            InpaintDenoiser.load(base)
    scheduler.write_text(json.dumps(config))
    index = base / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"requires_aesthetics_score": True}))
    with pytest.raises(ValueError, match="requires_aesthetics_score must be false, got true"):
        InpaintDenoiser.load(base)
    shutil.rmtree(base / "text_encoder_2")
    with pytest.raises(ValueError, match=r"must be a SDXL inpainting directory .* without text_encoder_2; save"):
        InpaintDenoiser.load(base)
    with pytest.raises(ValueError, match=r"must be a Stable Diffusion inpainting directory .* without unet; save"):
        InpaintDenoiser.load(tmp_path)


def test_a_pooled_vector_of_another_width_is_refused() -> None:
    pipeline = build_pipeline()
    pipeline.unet = unet(projection_class_embeddings_input_dim=6 * 8 + 24)
    with pytest.raises(ValueError, match="pooled vector of text_encoder_2, 24 wide, got a vector of 20; use an SDXL"):
        in_memory(pipeline)


def test_an_adapter_is_merged_with_its_convolution_and_its_dilation(tmp_path: Path) -> None:
    base = save_pipeline(tmp_path / "base", xl=False, channels=4)
    tuned = InpaintDenoiser.load(base)
    add_lora(tuned.unet, 2, ATTENTION, ("conv_in",))
    rng = torch.Generator().manual_seed(9)
    for parameter in tuned.unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)
    save_lora(tmp_path / "lora", tuned.unet, ("conv_in",))
    (tmp_path / "lora" / "card.json").write_text('{"dilation": 0.25}')
    plain, merged = InpaintDenoiser.load(base), InpaintDenoiser.load(base, tmp_path / "lora")
    assert (plain.dilation, merged.dilation, merged.widened) == (0.0, 0.25, True)
    assert torch.equal(merged.unet.conv_in.weight, tuned.unet.conv_in.weight) and merged.digest != plain.digest
    merged.dilation = 0.0
    tuned_image, plain_image = draw(tuned)["x"].image, draw(plain)["x"].image
    torch.testing.assert_close(draw(merged)["x"].image, tuned_image, rtol=0, atol=1e-4)
    assert (tuned_image - plain_image).abs().max() > 1e-3


def test_digests_stay_those_of_the_weights_when_precision_is_lowered() -> None:
    one, other = in_memory(build_pipeline()), in_memory(build_pipeline()).to("cpu", torch.bfloat16)
    assert one.digest == other.digest != in_memory(build_pipeline(1)).digest
    assert one.vae_digest == other.vae_digest and one.digest != in_memory(build_pipeline(), dilation=0.1).digest


# ---- context and planned masks in the sampler


class Keeps:
    """A gate that accepts and remembers the masks it was shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[str], Tensor | None]] = []

    def submit(self, ids: list[str], image_latents: Tensor, masks: Tensor | None, stage: str) -> list[Verdict]:
        self.seen.append((stage, ids, masks))
        return [Verdict("accepted") for _ in ids]

    def result(self, ticket: list[Verdict]) -> list[Verdict]:
        return ticket


def test_the_gate_is_handed_the_planned_mask_at_checkpoints_and_at_the_end() -> None:
    denoiser, gate = in_memory(build_pipeline(xl=False)), Keeps()
    jobs = [job(denoiser, "a"), SampleJob(**{**vars(job(denoiser, "b")), "mask": torch.ones(1, 32, 32)})]
    draw(denoiser, *jobs, gate=gate, checkpoints=(0.5,))
    assert [stage for stage, _, _ in gate.seen] == ["checkpoint", "final"]
    for _, ids, masks in gate.seen:
        assert ids == ["a", "b"] and masks is not None
        assert torch.equal(masks, torch.stack([jobs[0].mask, jobs[1].mask]))  # type: ignore[list-item]


def test_a_sample_is_byte_equal_whatever_slot_and_neighbours_it_has() -> None:
    denoiser = in_memory(build_pipeline(xl=False))
    image, mask = picture()
    others = [
        SampleJob(f"{k}", k, denoiser.condition(["a nevus"])[0], 2.0, 2 + k, context=denoiser.context(-image, mask)[0])
        for k in range(4)
    ]
    alone = draw(denoiser)["x"]
    found = draw(denoiser, *others[:3], job(denoiser), others[3])
    assert torch.equal(found["x"].latents, alone.latents) and torch.equal(found["x"].image, alone.image)
    assert slot_invariant(denoiser, width=32, height=32, slots=3)


def test_what_is_drawn_follows_the_context() -> None:
    denoiser = in_memory(build_pipeline(xl=False))
    image, mask = picture()
    other = SampleJob(**{**vars(job(denoiser)), "sample_id": "y", "context": denoiser.context(image, 1 - mask)[0]})
    found = draw(denoiser, job(denoiser), other)
    assert (found["x"].latents - found["y"].latents).abs().max() > 1e-3
    assert np.isnan(found["x"].mask.numpy()).all()


def test_a_context_is_given_exactly_where_it_is_read(tiny: JointDenoiser) -> None:
    denoiser = in_memory(build_pipeline(xl=False))
    bare = SampleJob("bare", 1, denoiser.condition([""])[0], 1.0, 2)
    with pytest.raises(ValueError, match="context must be given to a generator of family inpaint, got none in bare"):
        draw(denoiser, bare)
    with pytest.raises(ValueError, match="context must be given to an inpainting denoiser, got none"):
        denoiser.predict(
            torch.zeros(1, 4, 8, 8), torch.tensor([1]), bare.condition[None], torch.ones(1), bare.condition[None]
        )
    with pytest.raises(ValueError, match="mask must be given with every job of a generator that draws into one"):
        draw(denoiser, SampleJob(**{**vars(job(denoiser)), "mask": None}), gate=Keeps())
    with pytest.raises(ValueError, match="context must be left out for a generator of family joint, got one in x"):
        job_of_joint = SampleJob("x", 1, tiny.condition([""])[0], 1.0, 2, context=torch.zeros(5, 8, 8))
        list(Sampler(tiny, width=16, height=16, slots=1).run([job_of_joint]))
