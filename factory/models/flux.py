"""DermaFlux's generator (arXiv 2603.16392): FLUX.1 from any diffusers directory, a rectified flow on packed latents.

All parts are diffusers' and transformers' own classes, and the arithmetic around them is `FluxPipeline`'s, so that the
sampler and the pipeline draw the same image from the same noise. Three things are particular to the family:

- `condition` is one tensor: its first token is CLIP's pooled vector, the others are T5's states, both padded with
  zeros to the wider of the two.
- A guidance-distilled model (FLUX.1-dev) reads guidance as an embedding, in one forward; others are guided by Eq. 8.
- FLUX draws no mask. A latent segmenter that was fitted on its VAE gives one; without it masks are NaN: there is none.

Letters: B samples, C latent channels (16), h and w latent sides, L tokens, D token width, H and W pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from factory.models.compiled import compile_network
from factory.models.denoiser import Prediction, PredictionType, classifier_free_guidance, clean_estimate
from factory.models.flux_lora import fuse, load_adapter
from factory.models.kept_prompts import KeptPrompts
from factory.models.loading import checked_directory, load_part, module_digest
from factory.models.quantise import is_quantised, load_base
from factory.models.segmenter import LatentSegmenter, load_latent_segmenter
from factory.models.weights import generator_digest

PARTS = (
    "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
)  # fmt: skip
MAX_SEQUENCE_LENGTH = 512  # T5 tokens, the pipeline's default and its most
PROMPT_BATCH = 8  # prompts are encoded at one shape, so that an embedding never depends on its neighbours
# What a scheduler may do to its levels beside the shift, and what the sampler does not do.
_UNKNOWN = ("invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclass
class FluxDenoiser:
    """The flux family of `Denoiser`.

    text_encoder, text_encoder_2: both None where `prompts` has what they would give. segmenter: of the VAE's latents,
    gives masks; None: there are none. max_sequence_length: T5 tokens of a prompt, so L is one more; a LoRA draws best
    at the length that it was fitted at.
    """

    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel | None
    text_encoder_2: T5EncoderModel | None
    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast
    scheduler: FlowMatchEulerDiscreteScheduler
    segmenter: LatentSegmenter | None = None
    prompts: KeptPrompts | None = None
    max_sequence_length: int = MAX_SEQUENCE_LENGTH
    family: str = "flux"
    prediction_type: PredictionType = "flow"

    def __post_init__(self) -> None:
        checked_scheduler(self.scheduler)
        if not 1 <= self.max_sequence_length <= MAX_SEQUENCE_LENGTH:
            raise ValueError(
                f"max_sequence_length must be from 1 to {MAX_SEQUENCE_LENGTH}, got {self.max_sequence_length}; "
                "choose the length that the model was fitted at."
            )
        self.factor: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        for module in self._modules().values():
            module.eval()

    @classmethod
    def load(
        cls,
        directory: str | Path,
        adapter: str | Path | None = None,
        segmenter: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        base_dtype: str | None = None,
        max_sequence_length: int | None = None,
        encoders_only: bool = False,
        prompts: KeptPrompts | None = None,
    ) -> FluxDenoiser:
        """From a FLUX.1 directory as diffusers writes it, and a LoRA over it, merged into the weights: a directory with
        `pytorch_lora_weights.safetensors`, or a file of it or of kohya's trainer. Nothing is fetched.

        segmenter: a directory that `save_segmenter` wrote. max_sequence_length: None is the length that the adapter's
        card says it was fitted at, else 512. dtype: of the transformer and the text encoders; the VAE
        stays float32, where half precision is known to overflow. base_dtype: `nf4` or `fp8` of the transformer alone,
        beside which an adapter stays unmerged (see `quantise`). encoders_only: the transformer's weights are not read
        (it is on the meta device), for what only encodes images and prompts. prompts: read instead of the text
        encoders, which are then left out.
        """
        base = checked_directory(directory, PARTS, "FLUX.1")
        length = _fitted_length(adapter) if max_sequence_length is None else max_sequence_length
        if encoders_only:
            transformer = _empty_transformer(base / "transformer")
        elif base_dtype is not None:
            transformer = load_base(base / "transformer", base_dtype, "synthesize.base_dtype")
        else:
            transformer = load_part(FluxTransformer2DModel, base / "transformer", dtype)
        if adapter is not None:
            load_adapter(transformer, adapter)
            if base_dtype is None:
                fuse(transformer)
        loaded = cls(
            transformer=transformer,
            vae=load_part(AutoencoderKL, base / "vae"),
            text_encoder=None if prompts else load_part(CLIPTextModel, base / "text_encoder", dtype),
            text_encoder_2=None if prompts else load_part(T5EncoderModel, base / "text_encoder_2", dtype),
            tokenizer=CLIPTokenizer.from_pretrained(base / "tokenizer", local_files_only=True),
            tokenizer_2=T5TokenizerFast.from_pretrained(base / "tokenizer_2", local_files_only=True),
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(base / "scheduler", local_files_only=True),
            prompts=prompts,
            max_sequence_length=length,
        )
        if segmenter is not None:
            loaded.segmenter = load_latent_segmenter(segmenter, loaded.vae_digest)
        files = [generator_digest(base, adapter), str(length)]
        loaded.digest = _digest([*files, *([module_digest(loaded.segmenter)] if loaded.segmenter else [])])
        return loaded

    def to(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> FluxDenoiser:
        """The same denoiser on another device, transformer and text encoders in `dtype`; VAE and segmenter stay
        float32. Its digests stay those of the weights it was loaded from. A quantised transformer is moved alone, and
        one without weights stays where it is."""
        _ = self.digest, self.vae_digest
        for name, module in self._modules().items():
            if name == "transformer" and is_quantised(module):
                module.to(device)
            elif name != "transformer" or module.device.type != "meta":
                module.to(device, torch.float32 if name in ("vae", "segmenter") else dtype)
        for known in ("alphas_cumprod", "_pipeline"):
            self.__dict__.pop(known, None)
        return self

    def compile(self) -> None:
        """See `compile_network`."""
        compile_network(self.transformer)

    def _modules(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module | None] = {
            "transformer": self.transformer, "vae": self.vae, "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2, "segmenter": self.segmenter,
        }  # fmt: skip
        return {name: module for name, module in parts.items() if module is not None}

    @cached_property
    def _pipeline(self) -> FluxPipeline:
        """The library's pipeline over these parts: it reads prompts."""
        # It warns of every prompt that is longer than CLIP's 77 tokens, as captions are; T5 reads the whole.
        logging.getLogger("diffusers.pipelines.flux.pipeline_flux").setLevel(logging.ERROR)
        return FluxPipeline(**{name: getattr(self, name) for name in PARTS} | {"transformer": None})

    @property
    def mask_source(self) -> str | None:
        """`segmented`, or None without a segmenter."""
        return None if self.segmenter is None else "segmented"

    @property
    def guidance_distilled(self) -> bool:
        """Whether guidance is an input of the network (FLUX.1-dev) and not two forwards."""
        return bool(self.transformer.config.guidance_embeds)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(T,) float32: of level s = (t + 1) / T the alpha bar of equal signal-to-noise, (1 - s)^2 / ((1 - s)^2 + s^2).
        Its length is the scale of the timesteps."""
        steps = int(self.scheduler.config.num_train_timesteps)
        level = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        found = (1 - level).square() / ((1 - level).square() + level.square())
        return found.float().to(self.vae.device)

    @cached_property
    def digest(self) -> str:
        """Of the files it was loaded from, or of its tensors if it was made in memory."""
        config = [self.max_sequence_length, self.guidance_distilled, dict(self.scheduler.config)]
        modules = [f"{name} {module_digest(module)}" for name, module in self._modules().items()]
        return _digest([json.dumps(config, default=str, sort_keys=True), *modules])

    @cached_property
    def vae_digest(self) -> str:
        """See `vae_digest`."""
        return vae_digest(self.vae)

    @property
    def _scaling(self) -> tuple[float, float]:
        return scaling(self.vae)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        step = 2 * self.factor  # two latent cells make a token
        if width % step or height % step:
            raise ValueError(f"size must be a multiple of {step}, got {width}x{height}; round it.")
        return self.transformer.config.in_channels // 4, height // self.factor, width // self.factor

    def shift(self, width: int, height: int) -> float:
        """e^mu of the image's tokens where the scheduler shifts by resolution (1.65 at 256 tokens, 3.16 at 4,096 for
        FLUX.1-dev), else the scheduler's own constant."""
        return resolution_shift(self.scheduler, (width // (2 * self.factor)) * (height // (2 * self.factor)))

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latents (B, C, h, w); the mask is left out, for FLUX has none."""
        return self.encode_image(image)

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), the mode of the VAE's distribution."""
        scale, offset = self._scaling
        found = self.vae.encode(image.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return (found - offset) * scale

    @torch.no_grad()
    def condition(self, prompts: list[str]) -> Tensor:
        """Prompts -> (B, 1 + max_sequence_length, D) float32: CLIP's pooled vector as the first token, then T5's
        states, padded with zeros to D, the wider of the two."""
        if self.prompts is not None:
            return self.prompts.read(prompts).to(self.vae.device)
        found = [self._condition(prompts[i : i + PROMPT_BATCH]) for i in range(0, len(prompts), PROMPT_BATCH)]
        return torch.cat(found)

    def _condition(self, prompts: list[str]) -> Tensor:
        padded = prompts + [""] * (PROMPT_BATCH - len(prompts))
        states, pooled, _ = self._pipeline.encode_prompt(padded, max_sequence_length=self.max_sequence_length)
        width = max(states.shape[-1], pooled.shape[-1])
        rows = [F.pad(part.float(), (0, width - part.shape[-1])) for part in (pooled[:, None], states)]
        return torch.cat(rows, dim=1)[: len(prompts)]  # (B, 1 + L, D)

    @torch.no_grad()
    def predict(
        self, latents: Tensor, timesteps: Tensor, condition: Tensor, guidance: Tensor, unconditional: Tensor
    ) -> Prediction:
        """Velocities (B, C, h, w) float32. A distilled model has no prediction without its guidance, so both fields are
        the same; others run one forward of twice the batch (Eq. 8)."""
        levels = timesteps / len(self.alphas_cumprod)
        if self.guidance_distilled:
            found = velocity(self.transformer, latents, levels, condition, guidance)
            return Prediction(found, found)

        def network(latents: Tensor, levels: Tensor, condition: Tensor) -> Tensor:
            return velocity(self.transformer, latents, levels, condition)

        return classifier_free_guidance(network, latents, levels, condition, guidance, unconditional)

    def clean(self, latents: Tensor, timesteps: Tensor, prediction: Tensor) -> Tensor:
        """Eq. 11 of a flow, z - s v, (B, C, h, w)."""
        return clean_estimate("flow", latents, prediction, timesteps / len(self.alphas_cumprod))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) -> image (B, 3, H, W) in [-1, 1], mask probability (B, 1, H, W) or NaN."""
        scale, offset = self._scaling
        image = self.vae.decode((latents / scale + offset).to(self.vae.dtype), return_dict=False)[0]
        return image.float().clamp(-1, 1), self.mask(latents)

    @torch.no_grad()
    def mask(self, latents: Tensor) -> Tensor:
        """Lesion probability (B, 1, H, W) by the segmenter; NaN everywhere without one."""
        if self.segmenter is not None:
            return self.segmenter(latents).sigmoid()
        height, width = (side * self.factor for side in latents.shape[-2:])
        return latents.new_full((len(latents), 1, height, width), math.nan)

    def image_latents(self, latents: Tensor) -> Tensor:
        """All of them; `vae_digest` names this space."""
        return latents


def _empty_transformer(folder: Path) -> FluxTransformer2DModel:
    """The transformer of a folder by its config, without weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(folder, local_files_only=True))


def scaling(vae: AutoencoderKL) -> tuple[float, float]:
    """Factor and shift of a VAE's latents: what is denoised is (z - shift) * factor."""
    return vae.config.scaling_factor, vae.config.shift_factor or 0.0


def vae_digest(vae: AutoencoderKL) -> str:
    """Of a VAE's values in float32, its scaling and its shift: the same however it was stored."""
    return _digest([json.dumps(scaling(vae)), module_digest(vae)])


def velocity(
    transformer: Any, latents: Tensor, levels: Tensor, condition: Tensor, guidance: Tensor | None = None
) -> Tensor:
    """The network's velocity eps - z0, (B, C, h, w) float32.

    latents (B, C, h, w), noise levels (B,) in [0, 1], condition (B, 1 + L, D) as `FluxDenoiser.condition` lays it out,
    guidance (B,) for a guidance-distilled model. Gradients pass.
    """
    config, (batch, channels, height, width) = transformer.config, latents.shape
    dtype, device = transformer.dtype, latents.device
    condition = condition.to(device, dtype)
    pooled = condition[:, 0, : config.pooled_projection_dim]  # (B, D')
    states = condition[:, 1:, : config.joint_attention_dim]  # (B, L, D'')
    found = transformer(
        hidden_states=FluxPipeline._pack_latents(latents.to(dtype), batch, channels, height, width),  # (B, hw/4, 4C)
        timestep=(levels * 1000).to(dtype) / 1000,  # rounded where the pipeline rounds it
        guidance=None if guidance is None else guidance.to(device, torch.float32),
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=torch.zeros(states.shape[1], 3, device=device, dtype=dtype),
        img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, device, dtype),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(found, height, width, vae_scale_factor=1).float()


def resolution_shift(scheduler: FlowMatchEulerDiscreteScheduler, num_tokens: int) -> float:
    """The factor by which a scheduler's config moves noise levels for an image of so many tokens:
    s' = shift s / (1 + (shift - 1) s), with shift = e^mu for `exponential` and mu for `linear` time shifts."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return float(config.shift)
    mu = calculate_shift(
        num_tokens, config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift
    )
    return math.exp(mu) if config.time_shift_type == "exponential" else float(mu)


def checked_scheduler(scheduler: FlowMatchEulerDiscreteScheduler) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler, if the sampler can follow its levels."""
    asked = [name for name in _UNKNOWN if scheduler.config.get(name)]
    if asked:
        raise ValueError(
            f"scheduler must leave its levels to the resolution shift, got {asked[0]}={scheduler.config[asked[0]]}; "
            f"set {asked[0]} to null in scheduler/scheduler_config.json."
        )
    return scheduler


def embedding_shape(directory: str | Path, adapter: str | Path | None) -> tuple[int, int]:
    """(1 + L, D) of `condition`, without reading a weight."""
    base = checked_directory(directory, PARTS, "FLUX.1")
    configs = [json.loads((base / part / "config.json").read_text()) for part in ("text_encoder", "text_encoder_2")]
    return 1 + _fitted_length(adapter), max(configs[0]["hidden_size"], configs[1]["d_model"])


def _fitted_length(adapter: str | Path | None) -> int:
    """The T5 tokens that an adapter's card says it was fitted with; the pipeline's default without one."""
    card = None if adapter is None else Path(adapter) / "card.json"
    known = json.loads(card.read_text()) if card is not None and card.is_file() else {}
    return int(known.get("max_sequence_length", MAX_SEQUENCE_LENGTH))


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
