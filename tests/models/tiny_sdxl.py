"""Tiny inpainting pipelines of the real classes, SDXL's and Stable Diffusion's: latents of 4 channels at half the side.

Their VAE's distribution is as narrow as it can be, so that a drawn latent is its mode to rounding: the pipelines draw
the masked image's latents, and the factory takes the mode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_flux import clip_tokenizer

NARROW = -30.0  # log variance, the least that the VAE's class allows


def unet(channels: int = 9, xl: bool = True, **config: Any) -> Any:
    from diffusers import UNet2DConditionModel

    sizes: dict[str, Any] = {
        "sample_size": 8, "in_channels": channels, "out_channels": min(channels, 8) if channels != 9 else 4,
        "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": (2, 4),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 24,
    }  # fmt: skip
    if xl:
        sizes |= {
            "cross_attention_dim": 56, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
            "transformer_layers_per_block": (1, 2), "projection_class_embeddings_input_dim": 6 * 8 + 20,
        }  # fmt: skip
    return UNet2DConditionModel(**{**sizes, **config})


def vae() -> Any:
    from diffusers import AutoencoderKL

    made = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(4, 8), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=1,
        scaling_factor=0.13025,
    )  # fmt: skip
    with torch.no_grad():
        made.quant_conv.weight[4:] = 0.0
        made.quant_conv.bias[4:] = NARROW
    return made


def build_pipeline(seed: int = 0, xl: bool = True, channels: int = 9, zero_empty: bool = True, **scheduler: Any) -> Any:
    """A fresh inpainting pipeline in eval mode, with a DDIM scheduler of SDXL's levels and trailing steps."""
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    words = clip_tokenizer()
    sizes: dict[str, Any] = {
        "vocab_size": len(words), "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2,
        "hidden_act": "gelu", "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }  # fmt: skip
    levels = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "steps_offset": 1, "timestep_spacing": "trailing",
    }  # fmt: skip
    parts = {
        "unet": unet(channels, xl), "vae": vae(),
        "text_encoder": CLIPTextModel(CLIPTextConfig(hidden_size=24, projection_dim=24, **sizes)),
    }  # fmt: skip
    if xl:
        second = CLIPTextConfig(hidden_size=32, projection_dim=20, **sizes)
        parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
    for module in parts.values():
        module.eval()
    shared = {"tokenizer": words, "scheduler": DDIMScheduler(**{**levels, **scheduler})}
    if xl:
        pipeline: Any = StableDiffusionXLInpaintPipeline(
            **parts, **shared, tokenizer_2=words, add_watermarker=False, force_zeros_for_empty_prompt=zero_empty
        )
    else:
        pipeline = StableDiffusionInpaintPipeline(
            **parts, **shared, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(directory: Path, **options: Any) -> Path:
    build_pipeline(**options).save_pretrained(directory, safe_serialization=True)
    return directory
