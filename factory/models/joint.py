"""SkinDualGen's joint generator (arXiv 2507.19970): image and mask latents denoised together.

A Stable Diffusion U-Net whose `conv_in` and `conv_out` have eight channels, four of the image and four of its mask.
Both come from the same frozen VAE (the mask as a grey picture) and share one timestep, so the mask is sampled with
the image and not segmented afterwards. The paper's public text does not give the encoding; this is the `latent8`
reading of it. All parts are diffusers' and transformers' own classes, and the directory is a diffusers directory.

Letters: B samples, C = 8 latent channels, h and w latent sides, L tokens, D token width, H and W pixels.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from factory.models import codec
from factory.models.codec import STATS_FILE, Codec, clip_states, decoded, scaled_modes
from factory.models.denoiser import Prediction, classifier_free_guidance
from factory.models.joint_loss import joint_loss
from factory.models.latents import LatentStats, MaskHead, mask_to_vae_input
from factory.models.loading import checked_directory, load_part
from factory.models.lora import check_fitted_for, fuse, load_adapter
from factory.models.scheduled import Scheduled
from factory.models.starter import (
    LATENT_CHANNELS,
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    checked_scheduler,
    train_tokenizer,
)
from factory.models.weights import generator_digest

__all__ = [
    "JointDenoiser", "LatentStats", "MaskHead", "build_scheduler", "build_starter", "build_text_encoder",
    "build_unet", "build_vae", "joint_loss", "mask_to_vae_input", "train_tokenizer", "widen", "widened",
]  # fmt: skip

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def widen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same U-Net with four more channels in and out, in place.

    New weights are zero: the image's prediction is then the base's to the last bit, and the mask's starts at zero, so
    its loss starts near one and both parts have gradients from the first step. (`from_pretrained` with
    `ignore_mismatched_sizes` leaves uninitialised memory there instead.)
    """
    if (unet.config.in_channels, unet.config.out_channels) != (LATENT_CHANNELS, LATENT_CHANNELS):
        raise ValueError(
            f"unet must have 4 channels in and out to be widened, got {unet.config.in_channels} in and "
            f"{unet.config.out_channels} out; use a text-to-image base (4) or a joint one (8)."
        )
    unet.conv_in = widened(unet.conv_in, into=2 * LATENT_CHANNELS, out_of=unet.conv_in.out_channels)
    unet.conv_out = widened(unet.conv_out, into=unet.conv_out.in_channels, out_of=2 * LATENT_CHANNELS)
    unet.register_to_config(in_channels=2 * LATENT_CHANNELS, out_channels=2 * LATENT_CHANNELS)
    return unet


@torch.no_grad()
def widened(conv: nn.Conv2d, into: int, out_of: int) -> nn.Conv2d:
    """The convolution with more channels in and out, whose weights are zero."""
    wide = nn.Conv2d(into, out_of, conv.kernel_size, conv.stride, conv.padding)  # type: ignore[arg-type]
    wide = wide.to(conv.weight.device, conv.weight.dtype)
    assert wide.bias is not None and conv.bias is not None
    wide.weight.zero_()
    wide.bias.zero_()
    wide.weight[: conv.out_channels, : conv.in_channels] = conv.weight
    wide.bias[: conv.out_channels] = conv.bias
    return wide


@dataclass
class JointDenoiser(Scheduled):
    """The joint family of `Denoiser`: a widened U-Net with its codec, its text encoder and its mask head.

    Without a mask head the VAE decodes the mask, at the price of a second decode.
    """

    unet: UNet2DConditionModel
    vae: Codec
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler
    mask_head: MaskHead | None = None
    stats: LatentStats = field(default_factory=LatentStats)
    family: str = "joint"
    mask_source: str | None = "joint"
    widens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checked_scheduler(self.scheduler)
        self._fit_channels()
        self.factor: int = codec.factor_of(self.vae)
        for module in self._modules().values():
            module.eval()

    def _fit_channels(self) -> None:
        """A plain U-Net is widened to image and mask."""
        if self.vae.config.in_channels != 3:
            raise ValueError(
                f"vae must have 3 pixel channels, got {self.vae.config.in_channels}; its weights were fitted with "
                "fit.lora.joint.encoding pixel4, so keep to it or name another base."
            )
        if self.unet.config.in_channels != 2 * LATENT_CHANNELS:
            widen(self.unet)

    @classmethod
    def load(cls, directory: str | Path, adapter: str | Path | None = None) -> Self:
        """From a Stable Diffusion directory as diffusers writes it, plain (4 channels, widened here) or joint (8),
        and an adapter directory over it, merged into the weights. Everything is float32 and nothing is fetched.

        An adapter's own `vae/`, `mask_head/` and `latent_stats.json` take the place of the base's.
        """
        loaded = cls(**cls.parts(directory, adapter))
        loaded.digest = generator_digest(directory, adapter)
        return loaded

    @classmethod
    def parts(cls, directory: str | Path, adapter: str | Path | None = None) -> dict[str, Any]:
        """What `load` makes a denoiser of, by the names of its fields."""
        base = checked_directory(directory, PARTS, "Stable Diffusion")
        unet = load_part(UNet2DConditionModel, base / "unet")
        if cls.widens and unet.config.in_channels == LATENT_CHANNELS:
            widen(unet)
        layers = [base] if adapter is None else [Path(adapter), base]
        scheduler = codec.load_scheduler(base / "scheduler")
        if adapter is not None:
            check_fitted_for(Path(adapter), scheduler.config.prediction_type)
            fuse(load_adapter(unet, adapter))
        head, stats, vae = (_first(layers, name) for name in ("mask_head", STATS_FILE, "vae"))
        assert vae is not None  # the base has one
        return {
            "unet": unet, "vae": codec.load_codec(vae),
            "text_encoder": load_part(CLIPTextModel, base / "text_encoder"),
            "tokenizer": CLIPTokenizer.from_pretrained(base / "tokenizer", local_files_only=True),
            "scheduler": scheduler,
            "mask_head": MaskHead.load(head) if head else None,
            "stats": LatentStats.load(stats) if stats else LatentStats(),
        }  # fmt: skip

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a diffusers pipeline directory (`StableDiffusionPipeline` loads it; use `output_type="latent"`) with
        the mask head and the statistics beside its parts. `dtype` is that of the stored U-Net, VAE and text encoder.
        """
        folder = Path(directory)
        stored = {name: _copied(module, dtype) for name, module in self._modules().items() if name != "mask_head"}
        pipeline = StableDiffusionPipeline(
            **stored, tokenizer=self.tokenizer, scheduler=self.scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.save_pretrained(folder, safe_serialization=True)
        for config in folder.glob("*/config.json"):  # diffusers notes where a part was once loaded from
            known = json.loads(config.read_text())
            config.write_text(json.dumps({k: v for k, v in known.items() if k != "_name_or_path"}, indent=2) + "\n")
        if self.mask_head is not None:
            self.mask_head.save(folder / "mask_head")
        self.stats.save(folder / STATS_FILE)

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """The same denoiser on another device, U-Net and text encoder in `dtype`; codec and head stay float32, where
        half precision is known to overflow. Its digests stay those of the weights it was loaded from."""
        _ = self.digest, self.vae_digest
        for name, module in self._modules().items():
            module.to(device, dtype if name in ("unet", "text_encoder") else torch.float32)
        self.__dict__.pop("alphas_cumprod", None)
        return self

    def _modules(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return parts if self.mask_head is None else {**parts, "mask_head": self.mask_head}

    @cached_property
    def digest(self) -> str:
        """Of the files it was loaded from, or of its tensors if it was made in memory."""
        return self._tensors_digest([asdict(self.stats), self.prediction_type])

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        if width % self.factor or height % self.factor:
            raise ValueError(f"size must be a multiple of {self.factor}, got {width}x{height}; round it.")
        return 2 * LATENT_CHANNELS, height // self.factor, width // self.factor

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] and (B, 1, H, W) in {0, 1} -> whitened latents (B, 8, h, w)."""
        return self.stats.whiten(self.scaled_latents(image, mask))

    @torch.no_grad()
    def scaled_latents(self, image: Tensor, mask: Tensor) -> Tensor:
        """Latents before whitening: the modes (no sampling) of image and mask, by the VAE's scaling factor."""
        both = torch.cat([image, mask_to_vae_input(mask).to(image)])  # (2B, 3, H, W)
        return torch.cat(scaled_modes(self.vae, both).chunk(2), dim=1)

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> whitened image latents (B, 4, h, w): the first half of what `encode` gives."""
        return self.stats.whiten(scaled_modes(self.vae, image))

    def condition(self, prompts: list[str]) -> Tensor:
        """Last hidden states (B, L, D) of prompts padded or cut to the tokenizer's `model_max_length`."""
        return clip_states(self.tokenizer, self.text_encoder, prompts)

    @torch.no_grad()
    def predict(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor, guidance: Tensor, unconditional: Tensor
    ) -> Prediction:
        """One forward of twice the batch (Eq. 8); latents (B, 8, h, w), timesteps (B,), results in float32."""
        return classifier_free_guidance(self._network, latents, timesteps, condition, guidance, unconditional)

    def _network(self, latents: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        dtype = self.unet.dtype
        return self.unet(latents.to(dtype), timesteps, condition.to(dtype), return_dict=False)[0].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, 8, h, w) -> image (B, 3, H, W) in [-1, 1], mask probability (B, 1, H, W)."""
        return self.decoded_image(latents).clamp(-1, 1), self.mask(latents)

    def decoded_image(self, latents: Tensor) -> Tensor:
        """The image's latents of (B, 8, h, w) as pixels (B, 3, H, W), not clamped; gradients pass."""
        return decoded(self.vae, self.stats.unwhiten(latents)[:, :LATENT_CHANNELS])

    @torch.no_grad()
    def mask(self, latents: Tensor) -> Tensor:
        """Mask probability (B, 1, H, W): by the head, or by the VAE as the mean of its three channels."""
        if self.mask_head is not None:
            return self.mask_head(latents[:, LATENT_CHANNELS:]).sigmoid()
        picture = decoded(self.vae, self.stats.unwhiten(latents)[:, LATENT_CHANNELS:])
        return ((picture.mean(dim=1, keepdim=True) + 1) / 2).clamp(0, 1)

    def image_latents(self, latents: Tensor) -> Tensor:
        """The image's half, (B, 4, h, w), whitened; `vae_digest` names this space."""
        return latents[:, :LATENT_CHANNELS]


def build_starter(
    captions: Iterable[str],
    *,
    vocab_size: int = 1024,
    model_max_length: int = 48,
    vae: Codec | dict[str, Any] | None = None,
    unet: dict[str, Any] | None = None,
    text_encoder: dict[str, Any] | None = None,
    head_width: int = 48,
    scheduler: dict[str, Any] | None = None,
) -> JointDenoiser:
    """A fresh joint denoiser of the starter's sizes (`factory.models.starter`), each part's arguments in a dict; `vae`
    may be one that is already fitted. Weights come from torch's global seed."""
    tokenizer = train_tokenizer(captions, vocab_size, model_max_length)
    text = build_text_encoder(tokenizer, **(text_encoder or {}))
    built = vae if isinstance(vae, Codec) else build_vae(**(vae or {}))
    return JointDenoiser(
        unet=build_unet(**{"cross_attention_dim": text.config.hidden_size, **(unet or {})}),
        vae=built,
        text_encoder=text,
        tokenizer=tokenizer,
        scheduler=build_scheduler(**(scheduler or {})),
        mask_head=MaskHead(factor=codec.factor_of(built), width=head_width),
    )


def _first(layers: list[Path], name: str) -> Path | None:
    return next((layer / name for layer in layers if (layer / name).exists()), None)


def _copied(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy to store: in `dtype`, with an adapter merged."""
    copied = copy.deepcopy(module)
    if getattr(copied, "peft_config", None):
        fuse(copied)
    return copied.to(dtype)
