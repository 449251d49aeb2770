"""What every generator family is to the sampler, and the arithmetic that they share.

Noising is z_t = sqrt(a) z0 + sqrt(1 - a) eps for `epsilon` and `v_prediction` (a: alpha bar of the timestep) and
z_t = (1 - s) z0 + s eps for `flow` (s: the noise level in [0, 1]). Eq. 8 (guidance) and Eq. 11 (the clean estimate)
are DiffAug's (arXiv 2508.17844); the v form is Salimans and Ho's (arXiv 2202.00512).

Letters: B samples, C latent channels, h and w latent sides, L tokens, D token width, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow"]
PREDICTION_TYPES: tuple[str, ...] = ("epsilon", "v_prediction", "flow")


class Prediction(NamedTuple):
    """One denoiser call, (B, C, h, w) each. The solver steps with `guided`; the gate reads `conditional`."""

    guided: Tensor
    conditional: Tensor


class Denoiser(Protocol):
    """A generator family: a frozen network with its codec and its text encoder.

    `timesteps` are on the network's own scale, one per row: indices below `len(alphas_cumprod)` for `epsilon` and
    `v_prediction`, noise levels times `len(alphas_cumprod)` for `flow`.
    """

    @property
    def family(self) -> str: ...

    @property
    def prediction_type(self) -> PredictionType: ...

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides what this generator draws."""
        ...

    @property
    def vae_digest(self) -> str:
        """SHA-256 of what maps pixels to image latents; segmenters of latents are keyed by it."""
        ...

    @property
    def factor(self) -> int:
        """Pixels of an image per cell of its latents, along a side."""
        ...

    @property
    def mask_source(self) -> str | None:
        """How a sample comes by its mask: `joint` (sampled with the image), `planned` before it, `segmented`
        afterwards, or None (it has none). A gate compares what was sampled or planned with what its own segmenter
        finds; of the others it judges only the latter."""
        ...

    @property
    def alphas_cumprod(self) -> Tensor:
        """Alpha bar by timestep, (T,) float32."""
        ...

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """The same denoiser, in place, on another device: network and text encoders in `dtype`, while VAE, mask head
        and segmenter stay float32, where half precision is known to overflow. What goes in and comes out is float32 in
        either case. Digests stay those of the weights that were loaded."""
        ...

    def compile(self) -> None:
        """Has torch compile the denoising network for each shape that it will meet (see `compiled`); after `to`."""
        ...

    def shift(self, width: int, height: int) -> float:
        """How far the levels of a `flow` move towards noise at this size in pixels (see `solvers.schedule`)."""
        ...

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of an image of these sides in pixels."""
        ...

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] and (B, 1, H, W) in {0, 1} -> latents of unit scale (B, C, h, w)."""
        ...

    def condition(self, prompts: list[str]) -> Tensor:
        """Prompts -> (B, L, D), with L fixed by the family."""
        ...

    def predict(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor, guidance: Tensor, unconditional: Tensor
    ) -> Prediction:
        """Latents (B, C, h, w), timesteps (B,), condition (B, L, D), guidance (B,), unconditional (1, L, D)."""
        ...

    def clean(self, latents: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """Eq. 11: the estimate of z0 that a prediction implies, (B, C, h, w)."""
        ...

    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latents -> image (B, 3, H, W) in [-1, 1], mask probability (B, 1, H, W)."""
        ...

    def mask(self, latents: Tensor) -> Tensor:
        """Clean latents -> mask probability (B, 1, H, W), by the cheapest way there is.

        A family that draws no mask and has no segmenter of its latents gives NaN everywhere: no mask, not an empty one.
        """
        ...

    def image_latents(self, latents: Tensor) -> Tensor:
        """The part of the latents that the gate's segmenter reads, (B, C', h, w)."""
        ...


@runtime_checkable
class InContext(Protocol):
    """What a denoiser has beside `Denoiser` if it draws into a given image: a context of a row's own, which stays the
    same from its first call to its last. K channels at the latents' size."""

    @property
    def context_channels(self) -> int: ...

    def context(self, image: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] and where to draw into it, (B, 1, H, W) in {0, 1} -> (B, K, h, w)."""
        ...

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        condition: Tensor,
        guidance: Tensor,
        unconditional: Tensor,
        context: Tensor | None = None,
    ) -> Prediction:
        """As `Denoiser.predict`, with context (B, K, h, w)."""
        ...


def clean_estimate(prediction_type: str, z_t: Tensor, prediction: Tensor, alpha_bar: Tensor) -> Tensor:
    """Eq. 11 in its three forms: z0 from z_t (B, ...) and the network's prediction of the same shape.

    `alpha_bar` (B,) is the timestep's alpha bar for `epsilon` and `v_prediction`, and the noise level s in [0, 1] for
    `flow`. At alpha bar 0 the epsilon form has no solution and gives infinities: such schedules need `v_prediction`.
    """
    level = _per_row(alpha_bar, z_t)
    if prediction_type == "epsilon":
        return (z_t - (1 - level).sqrt() * prediction) / level.sqrt()
    if prediction_type == "v_prediction":
        return level.sqrt() * z_t - (1 - level).sqrt() * prediction
    if prediction_type == "flow":
        return z_t - level * prediction
    raise ValueError(
        f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}; "
        "read it from the weights' scheduler/scheduler_config.json."
    )


def log_snr(prediction_type: str, alpha_bar: Tensor) -> Tensor:
    """Log signal-to-noise ratio of a level as `clean_estimate` names it; how levels compare across families."""
    if prediction_type == "flow":
        return 2 * (torch.log1p(-alpha_bar) - torch.log(alpha_bar))
    return torch.log(alpha_bar) - torch.log1p(-alpha_bar)


def classifier_free_guidance(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    latents: Tensor,
    timesteps: Tensor,
    condition: Tensor,
    guidance: Tensor,
    unconditional: Tensor,
) -> Prediction:
    """Eq. 8 with a guidance per row: one call of `network(latents, timesteps, condition)` on twice the batch,
    unconditional half first.

    A row of guidance 1 costs the same and returns its conditional half exactly, so that the shape, and with it the
    last bit of a row's result, never depends on its neighbours.
    """
    both = torch.cat([unconditional.expand_as(condition), condition])  # (2B, L, D)
    output = network(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), both)  # (2B, C, h, w)
    free, conditional = output.chunk(2)
    scale = _per_row(guidance.to(output.dtype), conditional)
    guided = torch.where(scale == 1.0, conditional, free + scale * (conditional - free))
    return Prediction(guided, conditional)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) against (B, C, h, w)."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))
