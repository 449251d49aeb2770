"""The losses of a network that predicts noise or velocity of latents, of the joint family and its plain sister.

Letters: B samples, C latent channels, h and w latent sides, L tokens, D token width, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from diffusers import DDIMScheduler
from torch import Tensor, nn

from factory.models.denoiser import PredictionType, clean_estimate
from factory.models.segmenter import dice_bce_rows
from factory.models.starter import LATENT_CHANNELS


class DecodedLoss(Protocol):
    """Terms on the decoded clean estimate, as `fits/perceptual.py` has them."""

    def __call__(self, estimate: Tensor, latents: Tensor, timesteps: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Weight and value by name; estimate and latents (B, C, h, w), timesteps (B,)."""
        ...


class Noised(NamedTuple):
    """Latents at a noise level, what the network should say of them, and that level: (B, C, h, w) twice, (B,)."""

    noisy: Tensor
    target: Tensor
    alpha_bar: Tensor


def noised(scheduler: DDIMScheduler, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
    """latents and noise (B, C, h, w) at timesteps (B,), for the scheduler's prediction type."""
    alpha_bar = scheduler.alphas_cumprod.to(latents.device)[timesteps]  # (B,)
    signal, spread = (level.reshape(-1, 1, 1, 1) for level in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    target = noise if scheduler.config.prediction_type == "epsilon" else signal * noise - spread * latents
    return Noised(signal * latents + spread * noise, target, alpha_bar)


def joint_loss(
    unet: Callable[..., Any],
    mask_head: nn.Module | None,
    scheduler: DDIMScheduler,
    *,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    condition: Tensor,
    mask: Tensor,
    mask_weight: float,
    head_weight: float,
    weights: Tensor | None = None,
    decoded: DecodedLoss | None = None,
) -> dict[str, Tensor]:
    """The joint objective: MSE of the image's prediction, `mask_weight` times the mask's, and `head_weight` times
    alpha bar times BCE and Dice of the head on the clean mask latents (alpha bar, because that estimate means little
    where noise prevails). Keys: `loss`, `image_mse`, `mask_mse`, and `head` where it counts.

    latents and noise (B, 8, h, w), timesteps (B,) long, condition (B, L, D), mask (B, 1, H, W) in {0, 1}. `unet` may
    be wrapped; the head is frozen, and gradients pass through it. weights (B,): of the rows' two MSEs in the loss
    (`fits/weighting.py`); those that are reported are not weighted. decoded: further terms.
    """
    kind: PredictionType = scheduler.config.prediction_type
    noisy, target, alpha_bar = noised(scheduler, latents, noise, timesteps)
    predicted = unet(noisy, timesteps, condition, return_dict=False)[0].float()  # (B, 8, h, w)
    error = (predicted - target).square()
    of_image, of_mask = error[:, :LATENT_CHANNELS].mean((1, 2, 3)), error[:, LATENT_CHANNELS:].mean((1, 2, 3))  # (B,)
    terms = {"image_mse": of_image.mean(), "mask_mse": of_mask.mean()}
    loss = weighted(of_image + mask_weight * of_mask, weights)
    if (mask_head is not None and head_weight > 0) or decoded is not None:
        estimate = clean_estimate(kind, noisy, predicted, alpha_bar)
    if mask_head is not None and head_weight > 0:
        terms["head"] = head_term(mask_head, estimate[:, LATENT_CHANNELS:], mask, alpha_bar)
        loss = loss + head_weight * terms["head"]
    if decoded is not None:
        loss = loss + add_decoded(terms, decoded(estimate, latents, timesteps))
    return {"loss": loss, **terms}


def latent_loss(
    unet: Callable[..., Any],
    scheduler: DDIMScheduler,
    *,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    condition: Tensor,
    weights: Tensor | None = None,
    decoded: DecodedLoss | None = None,
) -> dict[str, Tensor]:
    """The plain objective: MSE of the prediction on latents (B, C, h, w). Keys: `loss`, `mse`; arguments as of
    `joint_loss`."""
    kind: PredictionType = scheduler.config.prediction_type
    noisy, target, alpha_bar = noised(scheduler, latents, noise, timesteps)
    predicted = unet(noisy, timesteps, condition, return_dict=False)[0].float()
    rows = (predicted - target).square().mean((1, 2, 3))  # (B,)
    terms, loss = {"mse": rows.mean()}, weighted(rows, weights)
    if decoded is not None:
        estimate = clean_estimate(kind, noisy, predicted, alpha_bar)
        loss = loss + add_decoded(terms, decoded(estimate, latents, timesteps))
    return {"loss": loss, **terms}


def weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    """The mean of losses (B,) by their weights (B,)."""
    return rows.mean() if weights is None else (weights * rows).mean()


def head_term(mask_head: nn.Module, mask_latents: Tensor, mask: Tensor, alpha_bar: Tensor) -> Tensor:
    """Alpha bar (B,) times BCE and Dice of the head on clean mask latents (B, 4, h, w), the mean over rows."""
    return (alpha_bar * dice_bce_rows(mask_head(mask_latents), mask)).mean()


def add_decoded(terms: dict[str, Tensor], found: dict[str, tuple[float, Tensor]]) -> Tensor:
    """Put the values among the terms, and return their weighted sum."""
    terms |= {name: value for name, (_, value) in found.items()}
    return sum((weight * value for weight, value in found.values()), start=next(iter(terms.values())).new_zeros(()))
