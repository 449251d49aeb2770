"""One forward of each family's network, on the meta device: what `memory.estimate` counts.

Letters: B rows, C latent channels, h and w latent sides, L tokens, D token width.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from factory.fits.memory import Workload

FACTOR = 8  # pixels per latent cell of a published VAE


def factor_of(base: str | Path | None) -> int:
    """Pixels per latent cell of a base's VAE, by its config; that of published ones without a base."""
    path = None if base is None else Path(base) / "vae" / "config.json"
    config = json.loads(path.read_text()) if path is not None and path.is_file() else {}
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return 2 ** (len(levels) - 1) if levels else FACTOR


def forward_of(family: str, network: nn.Module, work: Workload, factor: int) -> Callable[[], Tensor]:
    """The call of a family's loss on its network, for the workload's rows and size."""
    probe = {"flux": _flux, "inpaint": _inpaint, "joint": _joint, "class_conditional": _class_conditional}[family]

    def forward() -> Tensor:
        with torch.device("meta"):
            return probe(network, network.config, work, work.side // factor, factor)

    return forward


def _flux(network: Any, config: Any, work: Workload, cells: int, factor: int) -> Tensor:
    from factory.models.flux import velocity

    latents = torch.empty(work.rows, config.in_channels // 4, cells, cells)  # (B, C, h, w)
    width = max(config.joint_attention_dim, config.pooled_projection_dim)
    condition = torch.empty(work.rows, 1 + work.tokens, width)  # (B, 1 + L, D)
    levels = torch.empty(work.rows)
    return velocity(network, latents, levels, condition, levels if config.guidance_embeds else None)


def _inpaint(network: Any, config: Any, work: Workload, cells: int, factor: int) -> Tensor:
    from factory.models.inpaint import CONTEXT_CHANNELS, predicted

    latents = torch.empty(work.rows, config.out_channels, cells, cells)
    context = torch.empty(work.rows, CONTEXT_CHANNELS, cells, cells)
    condition = torch.empty(work.rows, 1 + work.tokens, config.cross_attention_dim)
    return predicted(network, latents, torch.zeros(work.rows, dtype=torch.long), condition, context, factor)


def _joint(network: Any, config: Any, work: Workload, cells: int, factor: int) -> Tensor:
    latents = torch.empty(work.rows, config.in_channels, cells, cells)
    condition = torch.empty(work.rows, work.tokens, config.cross_attention_dim)
    found: Tensor = network(latents, torch.zeros(work.rows, dtype=torch.long), condition, return_dict=False)[0]
    return found


def _class_conditional(network: Any, config: Any, work: Workload, cells: int, factor: int) -> Tensor:
    """Of a network's own size where it has one: a DiT knows the positions of that alone."""
    from factory.models.class_networks import class_prediction

    numbers = torch.zeros(work.rows, dtype=torch.long)
    cells = config.sample_size if type(network).__name__ == "DiTTransformer2DModel" else cells
    return class_prediction(network, torch.empty(work.rows, config.in_channels, cells, cells), numbers, numbers)
