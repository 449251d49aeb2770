"""The gate on pixels: the generator's VAE, the latent segmenter and the policy, in this process.

Every image is encoded and segmented at one fixed batch shape, so that its scores do not depend on its neighbours. On
CPUs that shape is one: sixteen together cost sixteen times as much there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from factory import records
from factory.gateway.gather import Judged
from factory.models.encoder import load_image_encoder
from factory.models.weights import tree_digest
from factory.quality.edges import edge_contrast
from factory.quality.policy import decide, iou_threshold
from factory.recipe import GateSection
from factory.stages.score import ScoreSamples


class ImageGate:
    """generator, adapter, family: whose VAE encodes (see `load_denoiser`); weights: of the segmenter."""

    def __init__(
        self,
        generator: str | Path,
        adapter: str | Path | None,
        family: str | None,
        weights: str | Path,
        section: GateSection,
        num_threads: int = 1,
    ) -> None:
        self.encoder = load_image_encoder(generator, adapter, family)
        self.score = ScoreSamples(weights, self.encoder.vae_digest, section, num_threads, batch=1)
        self._digests = {"vae": self.encoder.vae_digest, "gate": tree_digest(weights)}

    @property
    def multiple(self) -> int:
        """What the sides of an image are multiples of: two latent cells."""
        return 2 * self.encoder.factor

    @property
    def model(self) -> dict[str, str]:
        """Digests of VAE, segmenter and policy."""
        return {**self._digests, "policy": policy_digest(self.score.section)}

    def __call__(self, images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> list[Judged]:
        """images (h, w, 3) uint8 and masks (h, w) bool, of any sides that are multiples of `multiple`."""
        score = copy.copy(self.score)  # one version of the policy for the whole call, whatever comes meanwhile
        model = {**self._digests, "policy": policy_digest(score.section)}
        return [self._judged(image, mask, score, model) for image, mask in zip(images, masks, strict=True)]

    @torch.inference_mode()
    def _judged(self, image: np.ndarray, mask: np.ndarray, score: ScoreSamples, model: dict[str, str]) -> Judged:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1  # (1, 3, h, w)
        latents = self.encoder.encode(pixels).float().cpu().numpy()
        chance = score.segment(latents)
        (judged,) = score.judge(latents, chance, np.asarray(mask)[None])
        known = judged["scores"] | {"score_edge_contrast": edge_contrast(image, mask)}
        outcome, reason = decide(known, score.section)
        scores = {name: _finite(value) for name, value in known.items()}
        iou = scores.pop("iou")
        theta = iou_threshold(scores.get("score_area"), score.section)
        return Judged(outcome, reason, iou, theta, scores, chance[0] > 0.5, model)


def policy_digest(section: GateSection) -> str:
    """32 hex digits that name a version of the policy; where its weights lie is not part of it."""
    return records.digest("policy", section.model_dump_json(exclude={"weights"}))


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN: such a score is null, and the reason is `non_finite`."""
    return value if value is not None and math.isfinite(value) else None
