"""The starter's networks: small, fresh, and of the same classes as the big ones they stand for.

All sizes are arguments, so that tests build smaller ones still. Defaults: 128 px to latents of 32 x 32 x 4, a U-Net
of 8.5 M parameters, a VAE of 1.4 M, a text encoder of 0.3 M.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DDIMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.autoencoder_dc import ResBlock
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT_CHANNELS = 4
START, END = "<|startoftext|>", "<|endoftext|>"


def build_vae(
    *, block_out_channels: Sequence[int] = (48, 48, 96), layers_per_block: Sequence[int] = (0, 2, 3)
) -> AutoencoderDC:
    """A small fresh VAE: 3 channels to 4, each side divided by 2 ** (levels - 1).

    AutoencoderDC moves pixels into channels and back instead of pooling, and keeps its normalisation inside residual
    branches: at 35 dB and above a reconstruction needs exact positions and intensities. `_near_linear` starts it as
    nearly a linear map, from which it learns several times faster. Whitening by `LatentStats` takes the place of a
    scaling factor.
    """
    none: tuple[tuple[int, ...], ...] = ((),) * len(block_out_channels)
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=LATENT_CHANNELS,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=tuple(block_out_channels),
        decoder_block_out_channels=tuple(block_out_channels),
        encoder_layers_per_block=tuple(layers_per_block),
        decoder_layers_per_block=tuple(layers_per_block),
        encoder_qkv_multiscales=none,
        decoder_qkv_multiscales=none,
        downsample_block_type="pixel_unshuffle",
        upsample_block_type="pixel_shuffle",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=1.0,
    )
    vae.register_to_config(block_out_channels=tuple(block_out_channels))  # where pipelines look for the factor
    return _near_linear(vae)


@torch.no_grad()
def _near_linear(vae: AutoencoderDC, branch: float = 0.3, offset: float = 4.0) -> AutoencoderDC:
    """Residual branches start small; the decoder's last features sit on an offset, so that the norm and the rectifier
    before its last layer pass them on instead of dividing their size out."""
    for module in vae.modules():
        if isinstance(module, ResBlock):
            module.norm.weight.fill_(branch)
    last = [module for block in vae.decoder.up_blocks for module in block if isinstance(module, ResBlock)]
    widths = [module.norm.bias.shape[0] for module in last]
    final = next(
        m
        for m, width in zip(reversed(last), reversed(widths), strict=True)
        if width == vae.decoder.norm_out.weight.shape[0]
    )
    final.norm.bias.fill_(offset)
    vae.decoder.conv_out.conv.weight.mul_(offset)
    return vae


def load_vae(directory: Path) -> AutoencoderDC:
    """The VAE that `save_pretrained` wrote, in eval mode."""
    logging.getLogger("diffusers.configuration_utils").setLevel(logging.ERROR)
    return AutoencoderDC.from_pretrained(directory, local_files_only=True).eval()


def build_unet(
    *,
    sample_size: int = 32,
    block_out_channels: Sequence[int] = (32, 64, 128, 160),
    num_plain_blocks: int = 2,
    layers_per_block: int = 1,
    cross_attention_dim: int = 128,
    num_heads: int = 4,
    norm_num_groups: int = 8,
    channels: int = 2 * LATENT_CHANNELS,
) -> UNet2DConditionModel:
    """A small fresh U-Net; its first `num_plain_blocks` levels have no attention. `sample_size` is a hint to
    pipelines, not a limit."""
    crossed = len(block_out_channels) - num_plain_blocks
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(block_out_channels),
        down_block_types=("DownBlock2D",) * num_plain_blocks + ("CrossAttnDownBlock2D",) * crossed,
        up_block_types=("CrossAttnUpBlock2D",) * crossed + ("UpBlock2D",) * num_plain_blocks,
        layers_per_block=layers_per_block,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=num_heads,  # diffusers' name for the number of heads
        norm_num_groups=norm_num_groups,
        use_linear_projection=True,
    )


def build_text_encoder(
    tokenizer: CLIPTokenizer,
    *,
    hidden_size: int = 128,
    num_layers: int = 2,
    num_heads: int = 4,
    intermediate_size: int = 256,
) -> CLIPTextModel:
    """A small fresh CLIP text encoder over a tokenizer's vocabulary and its `model_max_length` positions."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=hidden_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def train_tokenizer(captions: Iterable[str], vocab_size: int = 1024, model_max_length: int = 48) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges are learnt from captions. All 256 bytes are in it twice (inside a word and at its
    end), so every text can be said and `vocab_size` is at least 514."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [letter + "</w>" for letter in alphabet]
    if vocab_size < len(base) + 2:
        raise ValueError(f"vocab_size must be at least {len(base) + 2}, got {vocab_size}; every byte needs two tokens.")
    blank = CLIPTokenizer(model_max_length=model_max_length).backend_tokenizer
    learner = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=alphabet,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = _merges(learner)[: vocab_size - 2 - len(base)]
    tokens = dict.fromkeys([*base, *("".join(pair) for pair in merges), START, END])
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=model_max_length
    )


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def build_scheduler(prediction_type: str = "v_prediction", **config: Any) -> DDIMScheduler:
    """The starter's noise schedule: Stable Diffusion's, with zero terminal SNR so that no mean (a lesion's area, a
    skin tone) leaks through the last step."""
    zero_snr = prediction_type == "v_prediction"
    defaults = {
        "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "rescale_betas_zero_snr": zero_snr, "timestep_spacing": "trailing", "clip_sample": False,
        "steps_offset": 1,  # without effect on trailing steps; pipelines warn of any other
    }  # fmt: skip
    return checked_scheduler(DDIMScheduler(**{**defaults, **config, "prediction_type": prediction_type}))


def checked_scheduler(scheduler: DDIMScheduler) -> DDIMScheduler:
    """The scheduler, if its prediction type can be used with its schedule."""
    config = scheduler.config
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"scheduler.prediction_type must be epsilon or v_prediction for a U-Net with text, got "
            f"{config.prediction_type!r}; use weights with one of these."
        )
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        raise ValueError(
            "scheduler.rescale_betas_zero_snr must be False when prediction_type is epsilon, got True; at zero SNR the "
            "noise says nothing of the image: use a v_prediction base, or set it to False."
        )
    return scheduler
