"""The joint generator's two ablations, behind the same protocol: what joint denoising of two latents is worth.

`Pixel4Denoiser` gives the VAE a fourth pixel channel, the mask, and leaves the U-Net plain: one set of four latent
channels holds both, and the decoder tells them apart. The directory is one that `StableDiffusionPipeline` draws RGBA
from unchanged. Its mask is a reading of the image's latents, and so is the gate's, since the latents that the gate
segments carry the mask: agreement says less here than for joint latents.

`CascadedDenoiser` draws the image first and then, given the finished image, its mask: the same widened U-Net, called
with empty mask latents for the image and with clean image latents for the mask.

Letters: B samples, h and w latent sides, H and W pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Self

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from factory.models.codec import decoded, scaled_modes
from factory.models.denoiser import Prediction, classifier_free_guidance, clean_estimate
from factory.models.joint import JointDenoiser, widened
from factory.models.latents import mask_to_vae_input
from factory.models.solvers import schedule
from factory.models.starter import LATENT_CHANNELS
from factory.models.weights import CASCADE_FILE

RGB, RGBM = 3, 4  # pixel channels without and with the mask


def load_joint(directory: str | Path, adapter: str | Path | None = None) -> JointDenoiser:
    """The joint denoiser of a directory and an adapter over it, of the arm that they were fitted as."""
    layers = [Path(layer) for layer in (adapter, directory) if layer is not None]
    if any((layer / CASCADE_FILE).is_file() for layer in layers):
        return CascadedDenoiser.load(directory, adapter)
    configs = [layer / "vae" / "config.json" for layer in layers]
    config = next((path for path in configs if path.is_file()), None)
    if config is not None and json.loads(config.read_text()).get("in_channels") == RGBM:
        return Pixel4Denoiser.load(directory, adapter)
    return JointDenoiser.load(directory, adapter)


def widen_vae(vae: AutoencoderKL, mask_area: float) -> AutoencoderKL:
    """The same VAE with a fourth pixel channel in and out, in place.

    New weights are zero: latents and image are then the base's to the last bit. The mask's logit begins at that of
    mask_area, the share of pixels that are lesion, so that its loss begins at what is known without looking.
    """
    channels = getattr(vae.config, "in_channels", None), getattr(vae.config, "out_channels", None)
    if not isinstance(vae, AutoencoderKL) or channels != (RGB, RGB):
        raise ValueError(
            f"vae must be an AutoencoderKL of 3 channels for the encoding pixel4, got {type(vae).__name__} of "
            f"{channels[0]}; use another base, or the encoding latent8."
        )
    encoder, decoder = vae.encoder, vae.decoder
    encoder.conv_in = widened(encoder.conv_in, into=RGBM, out_of=encoder.conv_in.out_channels)
    decoder.conv_out = widened(decoder.conv_out, into=decoder.conv_out.in_channels, out_of=RGBM)
    share = min(max(mask_area, 1e-3), 1 - 1e-3)
    with torch.no_grad():
        decoder.conv_out.bias[RGB] = math.log(share / (1 - share))
    vae.register_to_config(in_channels=RGBM, out_channels=RGBM)
    return vae


@dataclass
class Pixel4Denoiser(JointDenoiser):
    """Four latent channels of a VAE of four pixel channels; the fourth is the mask's logit, so that a pipeline's own
    reading of it, half of it plus a half, is cut at the same place."""

    widens: ClassVar[bool] = False

    def _fit_channels(self) -> None:
        found = self.unet.config.in_channels, self.vae.config.in_channels
        if found != (LATENT_CHANNELS, RGBM):
            raise ValueError(
                f"the encoding pixel4 must have a plain U-Net of 4 channels and a VAE of 4, got {found[0]} and "
                f"{found[1]}; use a text-to-image base."
            )

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return LATENT_CHANNELS, *super().latent_shape(width, height)[1:]

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] and (B, 1, H, W) in {0, 1} -> latents (B, 4, h, w)."""
        return self.scaled_latents(image, mask)

    @torch.no_grad()
    def scaled_latents(self, image: Tensor, mask: Tensor) -> Tensor:
        """What `encode` gives: a base's VAE is not whitened."""
        both = torch.cat([image, mask_to_vae_input(mask)[:, :1].to(image)], dim=1)  # (B, 4, H, W)
        return scaled_modes(self.vae, both)

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, 4, h, w), of an image without a lesion."""
        return self.scaled_latents(image, torch.zeros_like(image[:, :1]))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, 4, h, w) -> image (B, 3, H, W) in [-1, 1], mask probability (B, 1, H, W), by one decode."""
        pixels = decoded(self.vae, latents)
        return pixels[:, :RGB].clamp(-1, 1), pixels[:, RGB:].sigmoid()

    def decoded_image(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) as pixels (B, 3, H, W), not clamped; gradients pass."""
        return decoded(self.vae, latents)[:, :RGB]

    def mask(self, latents: Tensor) -> Tensor:
        """Mask probability (B, 1, H, W): there is no cheaper way to it than the whole decoder."""
        return self.decode(latents)[1]

    def image_latents(self, latents: Tensor) -> Tensor:
        """All of them (B, 4, h, w); `vae_digest` names this space."""
        return latents


@dataclass
class CascadedDenoiser(JointDenoiser):
    """The image, and then its mask in `mask_steps` further calls, each of the image's clean latents and the mask's.

    While the image is drawn, the mask's half is kept as the noise that it began with, so the mask too is a function of
    the job's seed. The prompt has done its work in the image: the mask is drawn under the empty one, without guidance.
    A gate that compares masks at a checkpoint pays for the further calls there too.
    """

    mask_steps: int = 20

    @classmethod
    def load(cls, directory: str | Path, adapter: str | Path | None = None) -> Self:
        """As `JointDenoiser.load`; the number of steps comes from the adapter's or the directory's own file."""
        loaded = super().load(directory, adapter)
        layers = [Path(layer) for layer in (adapter, directory) if layer is not None]
        known = next(layer / CASCADE_FILE for layer in layers if (layer / CASCADE_FILE).is_file())
        loaded.mask_steps = int(json.loads(known.read_text())["mask_steps"])
        return loaded

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """As `JointDenoiser.save`, and the number of steps."""
        super().save(directory, dtype)
        save_cascade(Path(directory), self.mask_steps)

    @cached_property
    def digest(self) -> str:
        """As of the joint generator, and of the number of steps."""
        return hashlib.sha256(f"{super().digest} {self.mask_steps}".encode()).hexdigest()

    @torch.no_grad()
    def predict(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor, guidance: Tensor, unconditional: Tensor
    ) -> Prediction:
        """The image's half by the U-Net with empty mask latents; the mask's half such that its noise stays."""
        image, waiting = latents.split(LATENT_CHANNELS, dim=1)
        found = classifier_free_guidance(self._of_image, image, timesteps, condition, guidance, unconditional)
        kept = self._wait(waiting, timesteps)
        return Prediction(*(torch.cat([half, kept], dim=1) for half in found))

    def _of_image(self, image: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        both = torch.cat([image, torch.zeros_like(image)], dim=1)
        return self._network(both, timesteps, condition)[:, :LATENT_CHANNELS]

    def _wait(self, waiting: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction whose clean estimate and noise are one and the same, so that no solver moves it: with
        z = (sqrt(a) + sqrt(1 - a)) n it is n for `epsilon` and (sqrt(a) - sqrt(1 - a)) n for `v_prediction`."""
        alpha_bar = self.alphas_cumprod[timesteps].reshape(-1, 1, 1, 1)
        signal, spread = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        noise = waiting / (signal + spread)
        return noise if self.prediction_type == "epsilon" else (signal - spread) * noise

    @torch.no_grad()
    def mask(self, latents: Tensor) -> Tensor:
        """Mask probability (B, 1, H, W) of (B, 8, h, w): clean image latents and the noise that waited."""
        image, noise = latents.split(LATENT_CHANNELS, dim=1)
        return super().mask(torch.cat([image, self.mask_latents(image, noise)], dim=1))

    @torch.no_grad()
    def mask_latents(self, image: Tensor, noise: Tensor) -> Tensor:
        """Clean mask latents (B, 4, h, w) of clean image latents, by DDIM; noise as `predict` keeps it."""
        levels = self.alphas_cumprod
        table = schedule(self.prediction_type, levels.double().cpu().numpy(), self.mask_steps, "ddim")
        empty = self._empty.expand(len(image), -1, -1).to(image.device)
        latents = noise * (levels[-1].sqrt() + (1 - levels[-1]).sqrt())  # as it was drawn
        for timestep, keep, new in zip(table.timesteps.astype(int).tolist(), table.keep, table.new, strict=True):
            timesteps = torch.full((len(image),), timestep, device=image.device)
            said = self._network(torch.cat([image, latents], dim=1), timesteps, empty)[:, LATENT_CHANNELS:]
            clean = clean_estimate(self.prediction_type, latents, said, levels[timesteps])
            latents = float(keep) * latents + float(new) * clean
        return latents

    @cached_property
    def _empty(self) -> Tensor:
        return self.condition([""])  # (1, L, D)


def save_cascade(directory: Path, mask_steps: int) -> None:
    """Write the file by which weights are known to draw the mask after the image."""
    (directory / CASCADE_FILE).write_text(json.dumps({"mask_steps": mask_steps}) + "\n")
