"""SimMIM: masked patches are marked instead of left out, and one linear layer predicts their pixels.

Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling" (CVPR 2022). The encoder sees all places, so a step
costs more than MAE's; there is no decoder to speak of, and the loss is the absolute error of the masked pixels.

    B images  H W pixels  p side of a patch  L = (H/p)(W/p) patches  P prefix tokens  D encoder width
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from factory.models.mae import build_encoder, check_encoder, patchify


class SimMIM(nn.Module):
    """A timm ViT that sees mask tokens, under a linear head. It is called, saved and loaded as a MaskedAutoencoder.

    Raises ValueError if `encoder` is not a plain timm VisionTransformer or the patches do not tile the image.
    """

    def __init__(self, encoder: str, image_size: int, patch_size: int) -> None:
        super().__init__()
        check_encoder(encoder, image_size, patch_size)
        self.patch_size = patch_size
        self.encoder: Any = build_encoder(encoder, image_size, patch_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.encoder.embed_dim))
        self.head = nn.Linear(self.encoder.embed_dim, patch_size**2 * 3)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, mask_ratio: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (B, 3, H, W), noise (B, L) -> loss (), predicted patches (B, L, p*p*3), mask (B, L) with 0
        kept and 1 masked: the int(L * mask_ratio) patches of highest noise."""
        vit = self.encoder
        x = vit.patch_embed(images)
        shape = x.shape  # (B, L, D), or (B, h, w, D) of encoders of any size
        x = x.flatten(1, -2)  # (B, L, D)
        num_keep = x.shape[1] - int(x.shape[1] * mask_ratio)
        mask = (noise.argsort(dim=1).argsort(dim=1) >= num_keep).to(x.dtype)  # (B, L)
        x = torch.where(mask.unsqueeze(-1) > 0, self.mask_token.to(x.dtype), x)  # (B, L, D)
        x = vit.norm_pre(vit._pos_embed(x.reshape(shape)))  # (B, P + L, D)
        x = vit.norm(vit.blocks(x))[:, vit.num_prefix_tokens :]  # (B, L, D)
        predicted = self.head(x)  # (B, L, p*p*3)
        error = (predicted - patchify(images, self.patch_size)).abs().mean(-1)  # (B, L)
        return (error * mask).sum() / mask.sum().clamp(min=1), predicted, mask
