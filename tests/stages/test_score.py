"""The gate's judgement: a sample's scores are its own, and a call costs what its samples cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from factory.models.segmenter import LatentSegmenter, save_segmenter
from factory.recipe import GateSection
from factory.stages.score import ScoreSamples

VAE = "0" * 64


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory) -> ScoreSamples:
    folder: Path = tmp_path_factory.mktemp("gate")
    torch.manual_seed(0)
    save_segmenter(LatentSegmenter(factor=2, width=8), folder, VAE)
    return ScoreSamples(folder, VAE, GateSection())


@pytest.mark.parametrize("side", [8, 16, 32])
def test_a_samples_probabilities_are_the_same_bytes_alone_and_among_others(score: ScoreSamples, side: int) -> None:
    latents = np.random.default_rng(side).standard_normal((19, 4, side, side)).astype(np.float32)
    together = score.segment(latents)
    for number in (0, 7, 18):
        assert score.segment(latents[number : number + 1]).tobytes() == together[number].tobytes()


@pytest.mark.parametrize(("side", "samples", "rows"), [(8, 1, 16), (8, 17, 32), (16, 5, 8), (32, 1, 1), (32, 5, 5)])
def test_padding_never_costs_more_than_one_sample_at_the_starters_size(
    score: ScoreSamples, side: int, samples: int, rows: int
) -> None:
    seen: list[int] = []
    hook = score.segmenter.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    score.segment(np.zeros((samples, 4, side, side), np.float32))
    hook.remove()
    assert sum(seen) == rows and len(set(seen)) == 1
    assert (rows - samples) * side**2 < 32 * 32
