"""Tiny Stable Diffusion 2 directories of the real classes, without a hub: latents of 4 channels at half the side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_flux import clip_tokenizer

SIDE = 16  # px


def build_pipeline(seed: int = 0, prediction_type: str = "v_prediction", vae: Any = None, **scheduler: Any) -> Any:
    """A fresh plain `StableDiffusionPipeline` of SD2's layout; zero terminal SNR where it predicts v."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    words = clip_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        hidden_act="gelu", bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=(2, 4), use_linear_projection=True, norm_num_groups=8,
    )  # fmt: skip
    codec = vae or AutoencoderKL(
        block_out_channels=(16, 16), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=8, latent_channels=4, scaling_factor=0.5,
    )  # fmt: skip
    levels = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    known = {
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    ends = {"rescale_betas_zero_snr": prediction_type == "v_prediction"}
    parts = {"unet": unet, "vae": codec, "text_encoder": CLIPTextModel(clip)}
    for module in parts.values():
        module.eval()
    pipeline = StableDiffusionPipeline(
        **parts, tokenizer=words, scheduler=DDIMScheduler(**{**levels, **known, **ends, **scheduler}),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(directory: Path, **options: Any) -> Path:
    build_pipeline(**options).save_pretrained(directory, safe_serialization=True)
    return directory
