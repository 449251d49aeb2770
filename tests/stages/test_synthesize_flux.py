"""Synthesis on a FLUX.1 directory: a generator that samples no mask, judged by what the gate's segmenter finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_flux import LENGTH, moved, save_pipeline

from factory import line, recipe, records
from factory.fits.gate import FitGate
from factory.fits.loop import train
from factory.models import kohya
from factory.models.families import vae_digest_of
from factory.models.flux import FluxDenoiser
from factory.models.flux_lora import ATTENTION, adapter_state, add_lora, save_adapter
from factory.models.sampler import Verdict
from factory.models.segmenter import LatentSegmenter, save_segmenter
from factory.models.weights import generator_digest
from factory.recipe import GateFitSection, GateSection, SynthesizeSection
from factory.stages import plan
from factory.stages.score import LocalGate, ScoreSamples
from factory.stages.synthesize import SynthesizeSamples

SECTION = SynthesizeSection(slots=2, keep_rejected="image")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def gate(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segmenter of this base's latents with random weights."""
    folder = tmp_path_factory.mktemp("gate")
    torch.manual_seed(0)
    save_segmenter(LatentSegmenter(4, factor=2, width=8), folder, FluxDenoiser.load(base).vae_digest)
    return folder


def planned(count: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": f"s{k}", "unit": 0, "index": k, "prompt": f"lesion {k}", "seed": k, "width": 16, "height": 16,
            "guidance": 3.5, "num_inference_steps": 4, "audit": False, "mask": None, "generator": "flux",
        }
        for k in range(count)
    ]  # fmt: skip


class Short(SynthesizeSamples):
    """Reads few tokens, to be quick."""

    segmenter: Path | None = None

    def load_denoiser(self, weights: str | Path, adapter: str | Path | None) -> FluxDenoiser:
        return FluxDenoiser.load(weights, adapter, self.segmenter, max_sequence_length=LENGTH)


class Remembers(LocalGate):
    """The gate, and whether masks were shown to it."""

    def submit(
        self, ids: list[str], image_latents: torch.Tensor, masks: torch.Tensor | None, stage: Any
    ) -> list[Verdict]:
        shown.append(masks)
        return super().submit(ids, image_latents, masks, stage)


shown: list[torch.Tensor | None] = []


@pytest.mark.parametrize("segmented", [False, True])
def test_a_sample_without_a_sampled_mask_has_no_overlap_and_is_judged_by_what_is_found(
    base: Path, gate: Path, segmented: bool
) -> None:
    policy = GateSection(min_area=0.0, max_area=1.0, min_solidity=0.0, checkpoints=[0.25])
    shown.clear()
    Short.segmenter = gate if segmented else None
    judge = Remembers(ScoreSamples(gate, FluxDenoiser.load(base).vae_digest, policy))
    rows = Short(base, None, SECTION, policy, judge)(planned())
    assert shown and set(map(type, shown)) == {type(None)}
    records.rows_to_table("samples", rows)
    for row in rows:
        assert row["outcome"] == "accepted" and row["calls_run"] == 4 and row["image"] is not None
        assert row.get("iou") is None and row.get("score_latent_iou") is None
        assert 0 <= row["score_area"] <= 1
        assert row.get("mask_source") == ("segmented" if segmented else None)
        assert (row.get("mask") is not None) == segmented


def test_its_rules_of_shape_still_reject(base: Path, gate: Path) -> None:
    policy = GateSection(min_area=1.0, max_area=1.0)
    Short.segmenter = None
    rows = Short(
        base, None, SECTION, policy, LocalGate(ScoreSamples(gate, FluxDenoiser.load(base).vae_digest, policy))
    )(planned(1))
    assert (rows[0]["outcome"], rows[0]["reason"]) == ("rejected", "empty_mask")


def test_the_family_of_a_directory_is_read_from_its_parts(base: Path) -> None:
    stage = SynthesizeSamples(base, None, SECTION, GateSection(), None)
    assert stage.denoiser.family == "flux" and stage.denoiser.mask_source is None


def test_scores_without_masks_are_those_of_what_was_found_as_the_mask(base: Path, gate: Path) -> None:
    score = ScoreSamples(gate, FluxDenoiser.load(base).vae_digest, GateSection(min_area=0.0, max_area=1.0))
    latents = np.random.default_rng(0).normal(size=(3, 4, 8, 8)).astype(np.float32)
    without, given = score(latents, None), score(latents, score.segment(latents) > 0.5)
    for one, other in zip(without, given, strict=True):
        assert one["scores"] == other["scores"] | {"iou": None, "score_overlap": None, "score_hausdorff_px": None}


def adapted(base: Path) -> Any:
    """The base's transformer with an adapter that changes it."""
    return moved(add_lora(FluxDenoiser.load(base).transformer, 2, ATTENTION))


def test_a_gate_is_fitted_on_its_vae_and_samples_are_drawn_with_an_adapter_of_either_format(
    base: Path, tmp_path: Path
) -> None:
    fit = FitGate(
        base, GateFitSection(steps=2, batch_size=4, phantoms=6, views=1, warmup_steps=1, estimator_pairs=0), 32
    )
    assert fit.examples.latents.shape == (6, 4, 16, 16)
    fit.save(train(fit, fit.section, tmp_path / "fit"), tmp_path / "gate")
    model = adapted(base)
    save_adapter(tmp_path / "lora", adapter_state(model))
    (tmp_path / "lora" / "card.json").write_text('{"max_sequence_length": 16}')
    assert FluxDenoiser.load(base, tmp_path / "lora").max_sequence_length == 16
    kohya.write(tmp_path / "kohya.safetensors", adapter_state(model), model)
    drawn = {}
    for name in ("none", "lora", "kohya.safetensors"):
        wanted = recipe.load(None, [
            f"synthesize.weights={base}", f"gate.weights={tmp_path / 'gate'}", "plan.generator=flux", "plan.size=32",
            f"synthesize.adapter={name if name == 'none' else tmp_path / name}", "plan.num_inference_steps=3",
            "gate.min_area=0", "gate.max_area=1", "gate.min_solidity=0", "synthesize.slots=2",
        ])  # fmt: skip
        rows = plan.sample_rows(
            count=2,
            diagnosis="nevus",
            skin_type=None,
            asymmetry=None,
            border=None,
            colors=None,
            section=wanted.plan,
            seed=0,
        )
        drawn[name] = line.sample(None, wanted, rows, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        assert {(row["outcome"], row["generator"], row.get("mask"), row.get("iou")) for row in drawn[name]} == {
            ("accepted", "flux", None, None)
        }
    digests = {rows[0]["weights_digest"] for rows in drawn.values()}
    pixels = {rows[0]["image"]["bytes"] for rows in drawn.values()}
    assert len(digests) == 3 and len(pixels) >= 2
    assert drawn["none"][0]["image"]["bytes"] != drawn["lora"][0]["image"]["bytes"]


def test_digests_name_the_vae_and_an_adapter_that_is_one_file(base: Path, tmp_path: Path) -> None:
    assert vae_digest_of(base) == FluxDenoiser.load(base).vae_digest
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    found = {generator_digest(base, tmp_path / f"{name}.safetensors") for name in ("one", "two")}
    assert len(found | {generator_digest(base)}) == 3
