"""Losses on the decoded clean estimate: structural similarity and gradients of the image.

They compare with what the VAE makes of the clean latents, so that its own loss of detail is not held against the
network, and no pixels need to be kept. Where noise prevails an estimate says little of the image, so only rows at
or below a share of the timesteps count. Both are off unless the recipe asks for them: a step then decodes twice and
goes back through one decoder. LPIPS (Zhang et al. 2018) is left out: its network's weights are not part of the factory.

Letters: B samples, C channels, h and w latent sides, H and W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from factory.models.joint import JointDenoiser

COUNTING = 0.4  # of the timesteps, from the clean end: 400 of Stable Diffusion's 1000
WINDOW, SIGMA = 11, 1.5  # px
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))


class DecodedTerms:
    """The terms of a batch, means over its rows, of which those at higher timesteps count as zero: `ssim`, which is
    1 - SSIM, and `edge`, each if its weight is above zero."""

    def __init__(self, denoiser: JointDenoiser, ssim_weight: float, edge_weight: float) -> None:
        self.denoiser, self.ssim_weight, self.edge_weight = denoiser, ssim_weight, edge_weight

    def __call__(self, estimate: Tensor, latents: Tensor, timesteps: Tensor) -> dict[str, tuple[float, Tensor]]:
        """estimate, with gradients, and latents (B, C, h, w); timesteps (B,)."""
        rows = timesteps <= COUNTING * len(self.denoiser.scheduler.alphas_cumprod)
        losses = {"ssim": (self.ssim_weight, _one_minus_ssim), "edge": (self.edge_weight, edge_difference)}
        asked = {name: pair for name, pair in losses.items() if pair[0] > 0}
        if not rows.any():
            return {name: (weight, estimate.new_zeros(())) for name, (weight, _) in asked.items()}
        self.denoiser.vae.to(estimate.device)
        found = self.denoiser.decoded_image(estimate[rows])
        with torch.no_grad():
            wanted = self.denoiser.decoded_image(latents[rows])
        return {name: (weight, loss(found, wanted).sum() / len(rows)) for name, (weight, loss) in asked.items()}


def ssim(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity (Wang et al. 2004, doi 10.1109/TIP.2003.819861) of images (B, C, H, W), (B,).

    The standard Gaussian window of 11 px and sigma 1.5, no padding; smaller for images that are smaller than it.
    """
    size = min(WINDOW, *a.shape[-2:])
    at = torch.arange(size, device=a.device, dtype=a.dtype) - (size - 1) / 2
    line = torch.softmax(-at.square() / (2 * SIGMA**2), dim=0)
    window = (line[:, None] * line)[None, None]  # (1, 1, size, size)

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values.flatten(0, 1)[:, None], window)  # (B C, 1, H', W')

    of_a, of_b = mean(a), mean(b)
    var_a, var_b, both = mean(a * a) - of_a**2, mean(b * b) - of_b**2, mean(a * b) - of_a * of_b
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    found = (2 * of_a * of_b + c1) * (2 * both + c2) / ((of_a**2 + of_b**2 + c1) * (var_a + var_b + c2))
    return found.reshape(len(a), -1).mean(1)


def _one_minus_ssim(a: Tensor, b: Tensor) -> Tensor:
    return 1 - ssim(a, b)


def edge_difference(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the Sobel gradients of images (B, C, H, W), (B,)."""
    kernel = torch.tensor(SOBEL, device=a.device, dtype=a.dtype) / 8  # of a ramp of one per pixel it is one
    kernels = torch.stack([kernel, kernel.T])[:, None]  # (2, 1, 3, 3)
    gradients = [F.conv2d(image.flatten(0, 1)[:, None], kernels) for image in (a, b)]
    return (gradients[0] - gradients[1]).abs().reshape(len(a), -1).mean(1)
