"""Weights of noise levels in a diffusion loss."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_WEIGHT = 0.1


def snr_weights(prediction_type: str, alpha_bar: Tensor, gamma: float | None) -> Tensor:
    """Min-SNR weights (Hang et al., arXiv 2303.09556) of rows' losses, (B,); ones for gamma None.

    min(SNR, gamma) on the clean estimate's error, so divided by SNR for `epsilon` and by SNR + 1 for `v_prediction`.
    Where noise prevails it is never below MIN_WEIGHT: at zero SNR the plain rule is zero, and the first step of
    sampling would never be fitted. alpha_bar (B,) is the timestep's. A `flow` has no such weights: its logit-normal
    times are weights already.
    """
    if gamma is None:
        return torch.ones_like(alpha_bar)
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"min_snr_gamma must be left out for a base that predicts {prediction_type}; its noise levels are drawn "
            "where they matter."
        )
    noise = 1 - alpha_bar
    snr = alpha_bar / noise.clamp_min(1e-8)
    over = snr if prediction_type == "epsilon" else snr + 1
    weights = snr.clamp_max(gamma) / over.clamp_min(1e-8)
    return torch.where(snr < gamma, weights.clamp_min(MIN_WEIGHT), weights)
