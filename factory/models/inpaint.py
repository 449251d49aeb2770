"""DiffAug's generator (arXiv 2508.17844): a lesion drawn into a planned mask on an image of normal skin.

An inpainting U-Net of Stable Diffusion or SDXL reads nine channels, in diffusers' order: four of the noisy latents, one
of the mask, four of the image without what the mask covers (grey there). All parts are diffusers' and transformers' own
classes, and the arithmetic around them is that of their inpainting pipelines at strength 1, so that the sampler and the
pipelines draw the same image from the same noise. Three things are particular to the family:

- mask and masked image are a row's context, set when it enters its slot; the mask was planned and is not sampled.
- A base with four channels, or a joint one with eight, is taken too: the image's half of it, with new columns for the
  context that are zero, so that until it is fitted it draws what the base draws.
- With SDXL `condition` is one tensor: its first token is the pooled vector of the second text encoder, the others are
  the states of both, padded with zeros to the wider of the two. Sizes are those of the image, and nothing is cropped.

Letters: B samples, h and w latent sides, L tokens, D token width, H and W pixels.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from factory.models import codec
from factory.models.codec import STATS_FILE, Codec
from factory.models.denoiser import Prediction, classifier_free_guidance
from factory.models.latents import LatentStats
from factory.models.loading import checked_directory, load_part
from factory.models.lora import fuse, load_adapter
from factory.models.scheduled import Scheduled
from factory.models.starter import LATENT_CHANNELS, checked_scheduler
from factory.models.weights import generator_digest

PARTS: tuple[str, ...] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
XL_PARTS = (*PARTS, "text_encoder_2", "tokenizer_2")
CONTEXT_CHANNELS = 1 + LATENT_CHANNELS  # mask, then the masked image
CHANNELS = LATENT_CHANNELS + CONTEXT_CHANNELS
WHOLE = ("conv_in",)  # trained whole where it was widened
_PIPELINE_LOG = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_inpaint"


def widen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The image's half of a U-Net with nine channels in and four out, in place.

    Of `conv_in` the columns of the first four channels stay, of `conv_out` their rows; the columns of mask and masked
    image are zero, so that the prediction is that of the base (of a joint one: with no mask latents) for any context.
    """
    found = (unet.config.in_channels, unet.config.out_channels)
    if found not in ((LATENT_CHANNELS,) * 2, (2 * LATENT_CHANNELS,) * 2):
        raise ValueError(
            f"unet must have 9 channels in and 4 out, or 4 or 8 of both to be widened, got {found[0]} in and "
            f"{found[1]} out; use an inpainting (9), a text-to-image (4) or a joint base (8)."
        )
    unet.conv_in = _image_part(unet.conv_in, into=CHANNELS, out_of=unet.conv_in.out_channels)
    if unet.config.out_channels != LATENT_CHANNELS:
        unet.conv_out = _image_part(unet.conv_out, into=unet.conv_out.in_channels, out_of=LATENT_CHANNELS)
    unet.register_to_config(in_channels=CHANNELS, out_channels=LATENT_CHANNELS)
    return unet


@torch.no_grad()
def _image_part(conv: nn.Conv2d, into: int, out_of: int) -> nn.Conv2d:
    """A convolution with so many channels in and out: the image's weights, and zero for those that are new."""
    made = nn.Conv2d(into, out_of, conv.kernel_size, conv.stride, conv.padding)  # type: ignore[arg-type]
    made = made.to(conv.weight.device, conv.weight.dtype)
    assert made.bias is not None and conv.bias is not None
    kept = conv.in_channels if into == conv.in_channels else LATENT_CHANNELS
    made.weight.zero_()
    made.weight[:, :kept] = conv.weight[:out_of, :kept]
    made.bias.copy_(conv.bias[:out_of])
    return made


@dataclass
class InpaintDenoiser(Scheduled):
    """The inpaint family of `Denoiser`.

    text_encoder_2, tokenizer_2: SDXL's, None for Stable Diffusion. stats: the whitening of a base's image latents.
    zero_empty: SDXL's empty prompt is zeros, as the pipeline's `force_zeros_for_empty_prompt` says. dilation: how far
    the mask that the network sees reaches beyond the planned one, as a share of the shorter side.
    """

    unet: UNet2DConditionModel
    vae: Codec
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    stats: LatentStats = field(default_factory=LatentStats)
    zero_empty: bool = True
    dilation: float = 0.0
    family: str = "inpaint"
    mask_source: str | None = "planned"
    context_channels: int = CONTEXT_CHANNELS

    def __post_init__(self) -> None:
        checked_scheduler(self.scheduler)
        self.widened = (self.unet.config.in_channels, self.unet.config.out_channels) != (CHANNELS, LATENT_CHANNELS)
        if self.widened:
            widen(self.unet)
        self.xl = is_xl(self.unet.config)
        if self.xl:
            _check_pooled_width(self.unet, self.text_encoder_2)
        self.factor: int = codec.factor_of(self.vae)
        for module in self._modules().values():
            module.eval()

    @classmethod
    def load(
        cls, directory: str | Path, adapter: str | Path | None = None, *, dtype: torch.dtype = torch.float32
    ) -> InpaintDenoiser:
        """From a Stable Diffusion or SDXL directory as diffusers writes it (9 channels in; 4 or 8 are widened here),
        and an adapter directory over it, merged into the weights. Nothing is fetched.

        dtype: of U-Net and text encoders; the VAE stays float32, where half precision is known to overflow.
        """
        base = checked_directory(directory, ("unet",), "Stable Diffusion inpainting")
        xl = is_xl(json.loads((base / "unet" / "config.json").read_text()))
        checked_directory(base, XL_PARTS if xl else PARTS, "SDXL inpainting" if xl else "Stable Diffusion inpainting")
        index = _index(base)
        unet, widened = load_unet(base, dtype)
        if adapter is not None:
            fuse(load_adapter(unet, adapter, WHOLE))
        second: dict[str, Any] = {}
        if xl:
            second["text_encoder_2"] = load_part(CLIPTextModelWithProjection, base / "text_encoder_2", dtype)
            second["tokenizer_2"] = CLIPTokenizer.from_pretrained(base / "tokenizer_2", local_files_only=True)
        loaded = cls(
            unet=unet,
            vae=codec.load_codec(base / "vae"),
            text_encoder=load_part(CLIPTextModel, base / "text_encoder", dtype),
            tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer", local_files_only=True),
            scheduler=_scheduler(base / "scheduler"),
            stats=load_stats(base),
            zero_empty=bool(index.get("force_zeros_for_empty_prompt", True)),
            dilation=_fitted_dilation(adapter),
            **second,
        )
        loaded.widened = widened
        loaded.digest = generator_digest(base, adapter)
        return loaded

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> InpaintDenoiser:
        """The same denoiser on another device, U-Net and text encoders in `dtype`; the VAE stays float32. Its digests
        stay those of the weights it was loaded from."""
        _ = self.digest, self.vae_digest
        for name, module in self._modules().items():
            module.to(device, torch.float32 if name == "vae" else dtype)
        for known in ("alphas_cumprod", "_pipeline"):
            self.__dict__.pop(known, None)
        return self

    def _modules(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return parts if self.text_encoder_2 is None else {**parts, "text_encoder_2": self.text_encoder_2}

    @cached_property
    def _pipeline(self) -> StableDiffusionXLInpaintPipeline:
        """The library's pipeline over SDXL's parts: it reads prompts."""
        # It warns of every prompt that is longer than CLIP's 77 tokens, as captions are.
        logging.getLogger(_PIPELINE_LOG).setLevel(logging.ERROR)
        return StableDiffusionXLInpaintPipeline(
            **{name: getattr(self, name) for name in XL_PARTS}, add_watermarker=False
        )

    @cached_property
    def digest(self) -> str:
        """Of the files it was loaded from, or of its tensors if it was made in memory."""
        config = [self.stats.image_mean, self.stats.image_std, self.prediction_type, self.zero_empty, self.dilation]
        return self._tensors_digest(config)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        if width % self.factor or height % self.factor:
            raise ValueError(f"size must be a multiple of {self.factor}, got {width}x{height}; round it.")
        return LATENT_CHANNELS, height // self.factor, width // self.factor

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, 4, h, w); the mask is left out, for it is not drawn."""
        return self.encode_image(image)

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> whitened latents (B, 4, h, w), the mode of the VAE's distribution."""
        return self.stats.whiten(codec.scaled_modes(self.vae, image))

    def context(self, image: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] and (B, 1, H, W) in {0, 1} -> (B, 5, h, w): see `context_of`."""
        return context_of(self.vae, self.stats, self.dilation, image, mask)

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Tensor:
        """Prompts -> (B, L, D) float32, of SDXL (B, 1 + L, D) with the pooled vector first."""
        if not self.xl:
            return codec.clip_states(self.tokenizer, self.text_encoder, prompts)
        found = codec.in_prompt_batches(self._xl_states, prompts)
        empty = torch.tensor([self.zero_empty and not prompt for prompt in prompts], device=found.device)
        return found.masked_fill(empty[:, None, None], 0.0)

    def _xl_states(self, prompts: list[str]) -> Tensor:
        states, _, pooled, _ = self._pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
        width = max(states.shape[-1], pooled.shape[-1])
        return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in (pooled[:, None], states)], dim=1)

    @torch.no_grad()
    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        condition: Tensor,
        guidance: Tensor,
        unconditional: Tensor,
        context: Tensor | None = None,
    ) -> Prediction:
        """One forward of twice the batch (Eq. 8); latents (B, 4, h, w), context (B, 5, h, w), results in float32."""
        if context is None:
            raise ValueError("context must be given to an inpainting denoiser, got none; make it with `context`.")
        both = torch.cat([context, context])

        def network(latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
            return predicted(self.unet, latents, timesteps, condition, both, self.factor)

        return classifier_free_guidance(network, latents, timesteps, condition, guidance, unconditional)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, 4, h, w) -> image (B, 3, H, W) in [-1, 1], and NaN (B, 1, H, W): the mask is in the plan."""
        return codec.decoded(self.vae, self.stats.unwhiten(latents)).clamp(-1, 1), self.mask(latents)

    def mask(self, latents: Tensor) -> Tensor:
        """NaN everywhere, (B, 1, H, W): none is sampled."""
        height, width = (side * self.factor for side in latents.shape[-2:])
        return latents.new_full((len(latents), 1, height, width), math.nan)

    def image_latents(self, latents: Tensor) -> Tensor:
        """All of them; `vae_digest` names this space."""
        return latents


def predicted(unet: Any, latents: Tensor, timesteps: Tensor, condition: Tensor, context: Tensor, factor: int) -> Tensor:
    """The network's prediction, (B, 4, h, w) float32. Gradients pass.

    latents (B, 4, h, w), timesteps (B,), condition (B, L, D) as `InpaintDenoiser.condition` lays it out, context
    (B, 5, h, w); factor: of the VAE, for SDXL reads the image's size in pixels.
    """
    dtype = unet.dtype
    inputs, states, added = torch.cat([latents, context], dim=1).to(dtype), condition.to(dtype), None
    if is_xl(unet.config):
        height, width = (side * factor for side in latents.shape[-2:])
        ids = torch.tensor([height, width, 0, 0, height, width], device=latents.device, dtype=dtype)
        pooled = states[:, 0, : _pooled_width(unet)]
        added = {"text_embeds": pooled, "time_ids": ids.expand(len(latents), -1)}
        states = states[:, 1:, : unet.config.cross_attention_dim]
    return unet(inputs, timesteps, states, added_cond_kwargs=added, return_dict=False)[0].float()


def dilated(mask: Tensor, share: float) -> Tensor:
    """A mask (B, 1, H, W) grown by a square, by a share of the shorter side, rounded to pixels."""
    reach = round(share * min(mask.shape[-2:]))
    return F.max_pool2d(mask, 2 * reach + 1, stride=1, padding=reach) if reach else mask


def is_xl(config: Any) -> bool:
    """Whether a U-Net's config is SDXL's: it reads a pooled vector and sizes beside the text's states."""
    return bool(config.get("addition_embed_type") == "text_time")


def context_of(vae: codec.Codec, stats: LatentStats, dilation: float, image: Tensor, mask: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] and (B, 1, H, W) in {0, 1} -> (B, 5, h, w): the mask, dilated by a share of the side and
    a cell being its upper left pixel as in the pipelines, and the latents of the image with grey where the mask is."""
    mask, factor = dilated(mask.float(), dilation), codec.factor_of(vae)
    cells = F.interpolate(mask, size=tuple(side // factor for side in mask.shape[-2:]))
    masked = stats.whiten(codec.scaled_modes(vae, image * (mask < 0.5)))
    return torch.cat([cells.to(masked), masked], dim=1)


def load_unet(base: Path, dtype: torch.dtype = torch.float32) -> tuple[UNet2DConditionModel, bool]:
    """The U-Net of a directory with nine channels in, and whether it had to be widened."""
    unet = load_part(UNet2DConditionModel, base / "unet", dtype)
    widened = (unet.config.in_channels, unet.config.out_channels) != (CHANNELS, LATENT_CHANNELS)
    return (widen(unet) if widened else unet), widened


def load_stats(base: Path) -> LatentStats:
    """The whitening of a base's latents; none for a published base."""
    return LatentStats.load(base / STATS_FILE) if (base / STATS_FILE).is_file() else LatentStats()


def _scheduler(folder: Path) -> DDIMScheduler:
    name = json.loads((folder / "scheduler_config.json").read_text()).get("_class_name", "")
    if name.startswith("FlowMatch"):
        raise ValueError(
            f"scheduler must be one of a U-Net that predicts epsilon or v, got {name} in {folder}; name a base whose "
            "scheduler has betas, such as DDIM or Euler."
        )
    return codec.load_scheduler(folder)


def _pooled_width(unet: Any) -> int:
    config = unet.config
    return int(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)


def _check_pooled_width(unet: Any, text_encoder_2: CLIPTextModelWithProjection | None) -> None:
    found = None if text_encoder_2 is None else text_encoder_2.config.projection_dim
    if found != _pooled_width(unet):
        raise ValueError(
            f"unet must read six sizes and the pooled vector of text_encoder_2, {_pooled_width(unet)} wide, got a "
            f"vector of {found}; use an SDXL base that asks for no aesthetics score."
        )


def _index(base: Path) -> dict[str, Any]:
    path = base / "model_index.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if found.get("requires_aesthetics_score"):
        raise ValueError(
            f"requires_aesthetics_score must be false, got true in {path}; name an SDXL base and not its refiner."
        )
    return found


def _fitted_dilation(adapter: str | Path | None) -> float:
    """By how much the masks were dilated that an adapter was fitted with, by its card; 0 without one."""
    card = None if adapter is None else Path(adapter) / "card.json"
    known = json.loads(card.read_text()) if card is not None and card.is_file() else {}
    return float(known.get("dilation", 0.0))
