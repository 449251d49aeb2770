"""Where a generator is computed and in which precision, for all families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny_classes
import tiny_flux
import tiny_sd
import torch
from torch import Tensor

from factory import recipe
from factory.models.families import load_denoiser
from factory.models.flux import FluxDenoiser
from factory.models.inpaint import InpaintDenoiser
from factory.models.placement import Placement, fingerprint, gpu_at_hand, placement
from factory.models.sampler import SampleJob, Sampler, Verdict
from factory.recipe import GateSection, SynthesizeSection
from factory.stages.synthesize import SynthesizeSamples


@pytest.mark.parametrize(
    ("asked", "gpu", "found"),
    [
        ("auto", True, ("cuda", "bfloat16")),
        ("auto", False, ("cpu", "float32")),
        ("float32", True, ("cuda", "float32")),
        ("bfloat16", False, ("cpu", "bfloat16")),
    ],
)
def test_auto_is_half_precision_on_a_gpu_alone(asked: str, gpu: bool, found: tuple[str, str]) -> None:
    assert placement(asked, gpu) == found


def test_only_what_was_always_there_adds_nothing_to_a_fingerprint() -> None:
    assert fingerprint(Placement("cpu", "float32"), None) == {}
    others = [fingerprint(placement(asked, gpu), None) for asked, gpu in
              [("auto", True), ("float32", True), ("bfloat16", False)]]  # fmt: skip
    assert [found["synthesize.dtype"] for found in others] == ["bfloat16 on cuda", "float32 on cuda", "bfloat16 on cpu"]
    assert fingerprint(Placement("cpu", "float32"), "fp8") == {"synthesize.base_dtype": "fp8"}
    assert SynthesizeSection().dtype == "auto" and SynthesizeSection().base_dtype is None


def test_a_gpu_that_torch_does_not_see_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_at_hand(None) is False and gpu_at_hand(False) is False
    with pytest.raises(ValueError, match="torch must see the GPU that its process has, got none in torch .*; install"):
        SynthesizeSamples(tmp_path, None, SynthesizeSection(), GateSection(), None, gpu=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_at_hand(None) is True and gpu_at_hand(False) is False  # an actor without one leaves others' alone


@pytest.fixture
def families(make_tiny: Callable[..., Any], tmp_path: Path) -> dict[str, Any]:
    tiny_flux.save_pipeline(tmp_path / "flux")
    tiny_sd.save_pipeline(tmp_path / "sd")
    return {
        "joint": make_tiny(),
        "flux": FluxDenoiser.load(tmp_path / "flux", max_sequence_length=tiny_flux.LENGTH),
        "inpaint": InpaintDenoiser.load(tmp_path / "sd"),
        "class_conditional": tiny_classes.build_classes("unet"),
    }


NARROW = {"unet", "network", "transformer", "text_encoder", "text_encoder_2"}


def prompt_of(denoiser: Any) -> str:
    return sorted(denoiser.labels)[0] if denoiser.family == "class_conditional" else "a nevus"


@dataclass
class Seen:
    """A gate that accepts everything and keeps what it was shown."""

    dtypes: set[torch.dtype] = field(default_factory=set)

    def submit(self, ids: list[str], image_latents: Tensor, masks: Tensor | None, stage: Any) -> list[Verdict]:
        self.dtypes |= {image_latents.dtype} | ({masks.dtype} if masks is not None else set())
        return [Verdict("accepted")] * len(ids)

    def result(self, ticket: list[Verdict]) -> list[Verdict]:
        return ticket


def draw(denoiser: Any, gate: Seen) -> Any:
    """One sample, and what its latents and noise were kept in."""
    sampler = Sampler(denoiser, width=32, height=32, slots=2, gate=gate, checkpoints=(0.5,))
    state = (sampler._latents, sampler._previous, sampler._condition, sampler._guidance, sampler._context)
    assert {value.dtype for value in state} == {torch.float32}
    planned = {}
    if denoiser.family == "inpaint":
        mask = torch.zeros(1, 32, 32)
        mask[:, 8:24, 8:24] = 1
        planned = {"mask": mask, "context": denoiser.context(torch.zeros(1, 3, 32, 32), mask[None])[0]}
    condition = denoiser.condition([prompt_of(denoiser)])[0]
    (drawn,) = sampler.run([SampleJob("a", 3, condition, 2.0, 4, **planned)])
    assert drawn.latents.dtype == torch.float32 and drawn.image is not None and drawn.image.dtype == torch.float32
    return drawn


@pytest.mark.parametrize("family", ["joint", "flux", "inpaint", "class_conditional"])
def test_half_precision_is_of_network_and_text_encoders_alone_and_draws_nearly_the_same(
    families: dict[str, Any], family: str
) -> None:
    denoiser, gate = families[family], Seen()
    digests, full = (denoiser.digest, denoiser.vae_digest), draw(denoiser, gate)
    assert denoiser.to("cpu", torch.bfloat16) is denoiser
    for name, module in denoiser._modules().items():
        wanted = torch.bfloat16 if name in NARROW else torch.float32
        assert {value.dtype for value in module.parameters()} == {wanted}, name
    assert {"vae"} <= set(denoiser._modules()) and set(denoiser._modules()) & NARROW
    narrow = draw(denoiser, gate)
    assert gate.dtypes == {torch.float32}
    assert (denoiser.digest, denoiser.vae_digest) == digests
    error = (narrow.latents - full.latents).abs().max() / full.latents.std()
    assert 0 < error < 0.1, error
    again = draw(denoiser.to("cpu"), gate)  # its weights have been rounded, so it is near but not the same
    assert (again.latents - full.latents).abs().max() / full.latents.std() < 0.1


def test_a_stage_draws_in_the_precision_that_is_asked_for(tiny_weights: Any) -> None:
    for asked, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        section = recipe.load(None, [f"synthesize.dtype={asked}"]).synthesize
        stage = SynthesizeSamples(tiny_weights.generator, None, section, GateSection(), None, gpu=False)
        assert stage.denoiser.unet.dtype == dtype and stage.denoiser.vae.dtype == torch.float32


def test_a_directory_of_flux_is_read_in_the_precision_that_it_is_drawn_in(tmp_path: Path) -> None:
    tiny_flux.save_pipeline(tmp_path)
    found = load_denoiser(tmp_path, dtype=torch.bfloat16)
    assert isinstance(found, FluxDenoiser)
    assert {found.transformer.dtype, found.text_encoder_2.dtype} == {torch.bfloat16}
    assert found.vae.dtype == torch.float32
