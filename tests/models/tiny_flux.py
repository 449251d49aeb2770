"""Tiny FLUX.1 pipelines of the real classes, without a file or a hub: latents of 4 channels at half the side."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch

LENGTH = 16  # T5 tokens


def clip_tokenizer() -> Any:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: k for k, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    letters = [(letter, -3.0) for letter in string.printable.strip()]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def transformer(guidance_embeds: bool = True, **config: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    sizes: dict[str, Any] = {
        "patch_size": 1, "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 24, "axes_dims_rope": (4, 4, 8),
    }  # fmt: skip
    return FluxTransformer2DModel(guidance_embeds=guidance_embeds, **{**sizes, **config})


def build_pipeline(seed: int = 0, guidance_embeds: bool = True, **scheduler: Any) -> Any:
    """A fresh `FluxPipeline` in eval mode; its scheduler shifts by resolution as FLUX.1-dev's does."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    words, pieces = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(words), hidden_size=24, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        projection_dim=24, hidden_act="gelu", bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(4, 8), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=1,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035,
    )  # fmt: skip
    parts = {
        "transformer": transformer(guidance_embeds), "vae": vae, "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(t5),
    }  # fmt: skip
    for module in parts.values():
        module.eval()
    flow = FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, "use_dynamic_shifting": True, **scheduler})
    pipeline = FluxPipeline(**parts, tokenizer=words, tokenizer_2=pieces, scheduler=flow)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def moved(model: Any) -> Any:
    """The model with its fresh adapter moved away from zero, always to the same place."""
    rng = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if ".lora_B" in name:
            value.data = torch.randn(value.shape, generator=rng)
    return model


def save_pipeline(directory: Path, **options: Any) -> Path:
    build_pipeline(**options).save_pretrained(directory, safe_serialization=True)
    return directory
