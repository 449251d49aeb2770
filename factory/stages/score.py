"""The gate's judgement: image latents and the mask that goes with them in, scores and one verdict each out.

Scores are facts and are kept whatever the verdict; the verdict is the policy's (`quality/policy.py`). The segmenter
never sees the mask it is compared with. No Ray here: `runtime/serve.py` puts this class behind a
handle, and `gateway/` that behind HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from factory.models.estimator import load_estimator
from factory.models.sampler import Stage, Verdict, rows_at_once
from factory.models.segmenter import load_latent_segmenter
from factory.quality.overlap import agreement, hausdorff95
from factory.quality.policy import decide, shape_scores
from factory.quality.shape_prior import FILE as SHAPES_FILE
from factory.quality.shape_prior import ShapePrior
from factory.recipe import GateSection

MOST_ROWS = 16  # at once, of small latents


class ScoreSamples:
    """Latent segmenter and policy.

    weights: a directory that `fit gate` wrote; vae_digest: the generator's, refused when the segmenter was fitted
    on another VAE's latents; batch: how many rows of small latents the segmenter reads at once, always
    as many.
    """

    def __init__(
        self, weights: str | Path, vae_digest: str, section: GateSection, num_threads: int = 1, batch: int = MOST_ROWS
    ) -> None:
        torch.set_num_threads(num_threads)
        self.segmenter = load_latent_segmenter(weights, vae_digest).eval()
        self.estimator = load_estimator(weights)
        shapes = Path(weights) / SHAPES_FILE
        self.shapes = ShapePrior.load(shapes) if shapes.is_file() else None
        self.section, self.batch = section, batch

    def __call__(
        self, image_latents: np.ndarray, masks: np.ndarray | None, stage: Stage = "final"
    ) -> list[dict[str, Any]]:
        """image_latents (N, C, h, w) float32, masks (N, H, W) bool -> N of {outcome, reason, scores}.

        Without masks (None) what the segmenter finds is judged by its shape, and there is no overlap to score.
        """
        return self.judge(image_latents, self.segment(image_latents), masks, stage)

    def judge(
        self, image_latents: np.ndarray, probability: np.ndarray, masks: np.ndarray | None, stage: Stage = "final"
    ) -> list[dict[str, Any]]:
        """As `__call__`, of what `segment` found, (N, H, W) float32."""
        overlaps: list[tuple[float, float] | None] = [None] * len(probability)
        if masks is not None:
            overlaps = [*self._overlaps(probability, masks)]
        masks = probability > 0.5 if masks is None else masks
        return [
            self._judge(latents, mask, chance, overlap, stage)
            for latents, mask, chance, overlap in zip(image_latents, masks, probability, overlaps, strict=True)
        ]

    def _overlaps(self, probability: np.ndarray, masks: np.ndarray) -> Iterator[tuple[float, float]]:
        """Of each mask the overlap with what was found, and the IoU that it is judged by."""
        agreements = agreement(probability, masks)
        measured = agreements[:, 0]
        estimator = self.estimator if self.section.calibrated else None
        judged = measured if estimator is None else estimator.expected(agreements)
        return zip(measured.tolist(), judged.tolist(), strict=True)

    @torch.inference_mode()
    def segment(self, image_latents: np.ndarray) -> np.ndarray:
        """Lesion probability per pixel, (N, H, W) float32, computed in padded batches of one shape for a size: a
        sample's scores then do not depend on its neighbours."""
        height, width = image_latents.shape[2:]
        parts, rows = [], rows_at_once(height, width, self.batch)
        for start in range(0, len(image_latents), rows):
            part = image_latents[start : start + rows]
            padded = np.zeros((rows, *part.shape[1:]), np.float32)
            padded[: len(part)] = np.nan_to_num(part)
            parts.append(torch.sigmoid(self.segmenter(torch.from_numpy(padded)))[: len(part), 0].numpy())
        return np.concatenate(parts)

    def _judge(
        self, latents: np.ndarray, mask: np.ndarray, chance: np.ndarray, overlap: tuple[float, float] | None,
        stage: Stage,
    ) -> dict[str, Any]:  # fmt: skip
        measured, judged = (None, None) if overlap is None else overlap
        if not np.isfinite(latents).all():
            judged = float("nan")
        scores: dict[str, Any] = {"score_confidence": float(np.abs(chance * 2 - 1).mean())}
        # An early estimate's overlap is not the sample's.
        scores |= {"iou": judged, "score_overlap": measured} if stage == "final" else {"score_latent_iou": judged}
        scores |= shape_scores(mask)
        if stage == "final":
            scores["score_hausdorff_px"] = None if measured is None else hausdorff95(mask, chance > 0.5)
            scores["score_shape"] = self.shapes.mahalanobis(mask) if self.shapes and mask.any() else None
        outcome, reason = decide(scores, self.section, stage)
        return {"outcome": outcome, "reason": reason, "scores": scores}


class LocalGate:
    """The gate in this process, as the sampler sees it: for one machine, a notebook, a test."""

    def __init__(self, score: ScoreSamples) -> None:
        self.score = score

    def submit(
        self, ids: list[str], image_latents: torch.Tensor, masks: torch.Tensor | None, stage: Stage
    ) -> list[Verdict]:
        return verdicts(self.score(*as_arrays(image_latents, masks), stage))

    def result(self, ticket: list[Verdict]) -> list[Verdict]:
        return ticket


def as_arrays(image_latents: torch.Tensor, masks: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray | None]:
    """What the sampler hands over, as the gate takes it: (n, C, h, w) float32 and (n, H, W) bool or None."""
    return image_latents.float().cpu().numpy(), None if masks is None else (masks[:, 0] > 0.5).cpu().numpy()


def verdicts(judged: list[dict[str, Any]]) -> list[Verdict]:
    """The gate's answers as the sampler's verdicts."""
    return [Verdict(answer["outcome"], answer["reason"], answer["scores"]) for answer in judged]
