"""Networks that denoise latents by class: diffusers' U-Net and DiT, their class tables, and the named sizes.

A class is a row of an embedding table and the last row is the null class, which guidance needs. A DiT of diffusers has
one such table in every block, and each of them drops labels by itself while it trains, from the global seed and block
by block; a fit that draws its own null classes must `stop_own_dropout`.

Sizes are those of published models; the class enters as each class of diffusers has it:

- `dermae_dit_b`: DiT-B/2 of Peebles and Xie (arXiv 2212.09748, Table 1): 12 layers, width 768, 12 heads, patch 2.
- `dermae_unet`: LDM-4 on ImageNet by class of Rombach et al. (arXiv 2112.10752, Appendix E): 192 channels times
  1, 2, 3 and 5, two residual blocks a level, attention on all but the first.

DerMAE (arXiv 2602.19848) gives no size of its latent diffusion, so both are readings of it.

Letters: B samples, C latent channels, h and w latent sides, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor, nn

Network: TypeAlias = UNet2DModel | DiTTransformer2DModel
NETWORKS: dict[str, tuple[type[Network], dict[str, Any]]] = {
    "budget": (
        UNet2DModel,
        {
            "block_out_channels": (48, 96, 128), "layers_per_block": 2, "attention_head_dim": 32, "norm_num_groups": 16,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "dermae_dit_b": (
        DiTTransformer2DModel,
        {"num_layers": 12, "num_attention_heads": 12, "attention_head_dim": 64, "patch_size": 2},
    ),
    "dermae_unet": (
        UNet2DModel,
        {
            "block_out_channels": (192, 384, 576, 960), "layers_per_block": 2, "attention_head_dim": 64,
            "down_block_types": ("DownBlock2D", *("AttnDownBlock2D",) * 3),
            "up_block_types": (*("AttnUpBlock2D",) * 3, "UpBlock2D"),
        },
    ),
}  # fmt: skip


def build_network(
    kind: type[Network], config: dict[str, Any], num_classes: int, channels: int, sample_size: int
) -> Network:
    """A fresh network for K classes and the null class, on latents (B, channels, sample_size, sample_size). Weights
    come from torch's global seed."""
    sides = {"in_channels": channels, "out_channels": channels, "sample_size": sample_size}
    if kind is UNet2DModel:
        return UNet2DModel(**sides, **config, num_class_embeds=num_classes + 1)
    return _initialised(DiTTransformer2DModel(**sides, **config, num_embeds_ada_norm=num_classes))


@torch.no_grad()
def _initialised(dit: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """adaLN-Zero as DiT's authors begin it: every block is the identity and the prediction zero. The class in diffusers
    is made for loading and leaves torch's defaults."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias) if module.bias is not None else None
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    patch = dit.pos_embed.proj
    nn.init.xavier_uniform_(patch.weight.view(len(patch.weight), -1))
    nn.init.zeros_(patch.bias)
    for block in dit.transformer_blocks:
        for linear in (block.norm1.emb.timestep_embedder.linear_1, block.norm1.emb.timestep_embedder.linear_2):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(dit.proj_out_1.weight)
    nn.init.zeros_(dit.proj_out_2.weight)
    return dit


def class_prediction(network: Any, latents: Tensor, timesteps: Tensor, classes: Tensor) -> Tensor:
    """What the network predicts, (B, C, h, w) float32, from latents (B, C, h, w), timesteps (B,) and classes (B,). Of a
    DiT with a learned variance the first half. Gradients pass."""
    found = network(latents.to(network.dtype), timesteps, class_labels=classes, return_dict=False)[0]
    return found[:, : latents.shape[1]].float()


def class_tables(network: Network) -> list[nn.Embedding]:
    """The embedding tables of a network's classes, (K + 1, D) each. Raises ValueError where there is none."""
    if isinstance(network, UNet2DModel):
        table = network.class_embedding
        found = [table] if isinstance(table, nn.Embedding) else []
    else:
        found = [module.embedding_table for module in network.modules() if isinstance(module, LabelEmbedding)]
    if not found:
        raise ValueError(
            "unet must have a table of classes, got a U-Net without num_class_embeds; use one that was fitted by class."
        )
    return found


def null_class(network: Network) -> int:
    """The number of the null class: the last row."""
    return class_tables(network)[0].num_embeddings - 1


@torch.no_grad()
def take_classes(network: Network, rows: Sequence[int]) -> Network:
    """The network, in place, with these rows of its class tables alone, in this order; the last becomes the null
    class. A row may be taken more than once."""

    def taken(table: nn.Embedding) -> nn.Embedding:
        index = torch.tensor(rows, device=table.weight.device)
        return nn.Embedding.from_pretrained(table.weight[index].clone(), freeze=False)

    class_tables(network)  # which there must be
    if isinstance(network, UNet2DModel):
        network.class_embedding = taken(network.class_embedding)
        network.register_to_config(num_class_embeds=len(rows))
        return network
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.embedding_table, module.num_classes = taken(module.embedding_table), len(rows) - 1
    network.register_to_config(num_embeds_ada_norm=len(rows) - 1)
    return network


def stop_own_dropout(network: Network) -> Network:
    """The network, in place, without the dropping of labels that a DiT does by itself in train mode."""
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return network
