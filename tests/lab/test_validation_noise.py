"""From how much noise a gate can judge: levels of every family, cells that are used again, honest refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_flux

from factory.lab import validation_noise as experiment
from factory.lab.validation_noise import level_of, validation_noise
from factory.models.families import load_denoiser
from factory.models.flux import FluxDenoiser
from factory.models.weights import STARTER
from factory.recipe import GateSection
from factory.stages.score import ScoreSamples
from factory.storage import open_store


def test_a_level_is_the_same_noise_in_every_family(tmp_path: Path) -> None:
    tiny_flux.save_pipeline(tmp_path)
    flow = FluxDenoiser.load(tmp_path, max_sequence_length=tiny_flux.LENGTH)
    wanted = -2 * math.log(0.572)  # DiffAug's t = 200: a noise of 0.572 to a signal of 1
    found = level_of(flow, wanted)
    assert found.alpha_bar == pytest.approx(0.364, abs=1e-3)
    assert found.timestep == pytest.approx(364, abs=1)
    steps = load_denoiser(STARTER)
    level = level_of(steps, wanted)
    assert level.timestep == int(level.timestep) and level.log_snr == pytest.approx(wanted, abs=0.05)
    assert math.sqrt((1 - level.alpha_bar) / level.alpha_bar) == pytest.approx(0.572, abs=0.02)
    assert level_of(steps, -1000.0).timestep >= 998 and level_of(steps, 1000.0).timestep == 0


def test_noise_takes_what_the_gate_could_tell(tmp_path: Path) -> None:
    denoiser = load_denoiser(STARTER)
    score = ScoreSamples(STARTER / "gate", denoiser.vae_digest, GateSection())
    given = (open_store(str(tmp_path)), denoiser, score, [6.0, -8.0], 24, 128)
    little, much = validation_noise(*given, gate_digest="g", progress=lambda line: None)["rows"]
    assert little["latents"]["auc"][0] > 0.85 > 0.7 > much["latents"]["auc"][0]


def test_every_level_is_measured_once(tiny_weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = load_denoiser(tiny_weights.generator)
    score = ScoreSamples(tiny_weights.gate, denoiser.vae_digest, GateSection(min_area=0, max_area=1, min_solidity=0))
    store, said, asked = open_store(str(tmp_path)), [], []
    measured = experiment._measured
    monkeypatch.setattr(experiment, "_measured", lambda *given: asked.append(given) or measured(*given))
    given = (store, denoiser, score, [-2.0, 4.0], 12, 32)
    found = validation_noise(*given, gate_digest="g", progress=said.append)
    assert [row["log_snr"] > 0 for row in found["rows"]] == [True, False] and len(asked) == 2 == len(said)
    for row in found["rows"]:
        assert row["same_verdict"]["trials"] == 12 and row["latents"]["recall"]["trials"] in range(4, 12)
        assert 0 <= row["latents"]["auc"][0] <= 1 and row["timestep"] in range(1000)
    assert found["rows"][0] != found["rows"][1] and "the same verdict in" in said[0]
    assert validation_noise(*given, gate_digest="g", progress=said.append) == found and len(asked) == 2
    validation_noise(*given, gate_digest="another", progress=said.append)
    assert len(asked) == 4


def test_the_estimate_of_little_noise_is_what_was_encoded_and_its_noise_is_the_pairs_own(tiny_weights: Any) -> None:
    import torch

    denoiser = load_denoiser(tiny_weights.generator)
    images, masks = torch.rand(3, 3, 32, 32) * 2 - 1, (torch.rand(3, 1, 32, 32) > 0.5).float()
    level = level_of(denoiser, 100.0)
    with torch.inference_mode():
        close = experiment._estimate(denoiser, images, masks, level, 5)
        alone = experiment._estimate(denoiser, images[1:2], masks[1:2], level, 6)
    clean = denoiser.encode(images, masks)
    assert np.abs(close - clean).max() < np.abs(clean).max() / 2
    assert torch.allclose(close[1:2], alone, atol=1e-5)


def test_a_generator_without_masks_of_its_own_is_refused(tmp_path: Path) -> None:
    tiny_flux.save_pipeline(tmp_path)
    flow = FluxDenoiser.load(tmp_path, max_sequence_length=tiny_flux.LENGTH)
    with pytest.raises(ValueError, match="plan.generator must draw masks or into them, got flux, .*; choose joint"):
        validation_noise(open_store(str(tmp_path)), flow, None, [1.0], 4, 32, gate_digest="g")  # type: ignore[arg-type]
