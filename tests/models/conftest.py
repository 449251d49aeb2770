"""Tiny networks of the real classes: 32 px, latents of 8 channels at 16 x 16, built in a moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from factory.models.joint import JointDenoiser, build_starter

CAPTIONS = ["a dermoscopic image of a melanoma with an irregular border", "a nevus on tan skin"]


def build_tiny(seed: int = 0, **parts: Any) -> JointDenoiser:
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vae": {"block_out_channels": (8, 8), "layers_per_block": (0, 1)},
        "unet": {"block_out_channels": (16, 16), "num_plain_blocks": 1, "num_heads": 2, "norm_num_groups": 4},
        "text_encoder": {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32},
        "vocab_size": 540, "model_max_length": 12, "head_width": 16,
    }  # fmt: skip
    return build_starter(CAPTIONS, **{**sizes, **parts})


@pytest.fixture
def tiny() -> JointDenoiser:
    """A fresh joint denoiser with random weights, v-prediction at zero terminal SNR."""
    return build_tiny()


@pytest.fixture
def make_tiny() -> Callable[..., JointDenoiser]:
    """`make_tiny(seed=0, unet={...}, scheduler={...})`; a part that is given replaces the tiny sizes of that part."""
    return build_tiny
