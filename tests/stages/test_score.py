"""The gate's judgement: a sample's scores are its own, and a call costs what its samples cost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from factory.models.estimator import IouEstimator, save_estimator
from factory.models.segmenter import LatentSegmenter, save_segmenter
from factory.quality.overlap import agreement, hausdorff95
from factory.quality.shape_prior import FILE as SHAPES_FILE
from factory.quality.shape_prior import ShapePrior
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


def test_it_judges_by_the_expected_iou_where_that_was_fitted_and_by_the_overlap_where_it_is_asked_to(
    score: ScoreSamples, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    latents, masks = rng.standard_normal((3, 4, 16, 16)).astype(np.float32), rng.random((3, 32, 32)) < 0.5
    plain = score(latents, masks)
    assert [row["scores"]["iou"] for row in plain] == [row["scores"]["score_overlap"] for row in plain]
    save_segmenter(score.segmenter, tmp_path, VAE)
    torch.manual_seed(1)
    save_estimator(IouEstimator(), tmp_path)
    asked = GateSection(min_area=0, max_area=1, min_solidity=0, min_iou=0.45, shift_tolerance=0)
    fitted = ScoreSamples(tmp_path, VAE, asked)
    found = fitted(latents, masks)
    wanted = fitted.estimator.expected(agreement(fitted.segment(latents), masks))
    assert np.array_equal([row["scores"]["iou"] for row in found], wanted)
    assert [row["scores"]["score_overlap"] for row in found] == [row["scores"]["score_overlap"] for row in plain]
    assert [row["outcome"] == "accepted" for row in found] == [expected >= 0.45 for expected in wanted]
    early = fitted(latents, masks, "checkpoint")
    assert np.array_equal([row["scores"]["score_latent_iou"] for row in early], wanted)
    assert not {"iou", "score_overlap"} & set(early[0]["scores"])
    fitted.section = asked.model_copy(update={"calibrated": False})
    assert [row["scores"]["iou"] for row in fitted(latents, masks)] == [row["scores"]["iou"] for row in plain]
    nothing = fitted(latents, None)[0]["scores"]
    assert nothing["iou"] is None and nothing["score_overlap"] is None


def test_boundary_and_shape_of_a_finished_sample_are_scores(score: ScoreSamples, tmp_path: Path) -> None:
    latents, mask = np.zeros((1, 4, 16, 16), np.float32), np.zeros((1, 32, 32), bool)
    mask[0, 8:20, 10:22] = True
    assert score(latents, mask)[0]["scores"]["score_shape"] is None  # its weights know no shapes
    drawn = [np.roll(mask[0], (k % 5, k // 5), (0, 1)) for k in range(40)]
    save_segmenter(score.segmenter, tmp_path, VAE)
    prior = ShapePrior.fit(drawn, [None] * 40)
    prior.save(tmp_path / SHAPES_FILE)
    fitted = ScoreSamples(tmp_path, VAE, GateSection())
    scores = fitted(latents, mask)[0]["scores"]
    found = fitted.segment(latents)[0] > 0.5
    assert scores["score_hausdorff_px"] == hausdorff95(mask[0], found)
    assert scores["score_shape"] == pytest.approx(prior.mahalanobis(mask[0])) and scores["score_shape"] < 6
    long = np.zeros_like(mask)
    long[0, 15:18] = True
    assert fitted(latents, long)[0]["scores"]["score_shape"] > 2 * scores["score_shape"]
    assert fitted(latents, np.zeros_like(mask))[0]["scores"]["score_shape"] is None
    assert not {"score_shape", "score_hausdorff_px"} & set(fitted(latents, mask, "checkpoint")[0]["scores"])
