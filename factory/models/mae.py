"""Masked autoencoders, in the order of He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022).

The encoder is timm's own VisionTransformer, built by name, and sees the visible patches only; a light decoder fills
in the rest from mask tokens; the loss is on the masked patches alone. Positions are fixed sines and cosines.

    B images  H W pixels  p side of a patch  L = (H/p)(W/p) patches  K visible patches  D encoder  E decoder width
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from factory.models.classifier import check_tiles, is_vit

DECODER = "decoder.safetensors"
_Model = TypeVar("_Model", bound=nn.Module)  # a MaskedAutoencoder or a SimMIM
_HEAD = 32  # width of a decoder head, as in the paper (512 over 16 heads)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) -> (B, L, p*p*3), patches row by row, as timm's PatchEmbed orders them."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(batch, channels, rows, patch_size, columns, patch_size)  # (B, 3, H/p, p, W/p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)  # (B, L, p*p*3)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """(B, L, p*p*3) -> (B, 3, H, W) of a square image: the inverse of `patchify`."""
    batch, length, _ = patches.shape
    side = int(length**0.5)
    x = patches.reshape(batch, side, side, patch_size, patch_size, -1)  # (B, H/p, W/p, p, p, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, side * patch_size, side * patch_size)  # (B, 3, H, W)


def random_masking(tokens: Tensor, mask_ratio: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the K = int(L * (1 - mask_ratio)) patches of lowest noise.

    tokens: (B, L, D); noise: (B, L), uniform, one stream per image. Returns the visible tokens (B, K, D), the mask
    (B, L) with 0 kept and 1 removed, and ids_restore (B, L), which puts shuffled tokens back in place.
    """
    length, width = tokens.shape[1:]
    num_keep = int(length * (1 - mask_ratio))
    ids_shuffle = noise.argsort(dim=1)  # (B, L)
    ids_restore = ids_shuffle.argsort(dim=1)  # (B, L)
    ids_keep = ids_shuffle[:, :num_keep]  # (B, K)
    visible = tokens.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, width))  # (B, K, D)
    mask = (ids_restore >= num_keep).to(tokens.dtype)  # (B, L)
    return visible, mask, ids_restore


def sincos_positions(side: int, width: int) -> Tensor:
    """Fixed two-dimensional sine-cosine positions of a side x side grid, (side*side, width); width is of fours."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))  # (width/4,)
    line = torch.arange(side, dtype=torch.float64)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    waves = [torch.outer(axis.reshape(-1), omega) for axis in (columns, rows)]  # 2 x (side*side, width/4)
    return torch.cat([part for wave in waves for part in (wave.sin(), wave.cos())], dim=1).float()


class MaskedAutoencoder(nn.Module):
    """An asymmetric encoder and decoder over a timm ViT.

    Raises ValueError if `encoder` is not a plain timm VisionTransformer, if the patches do not tile the image, or if
    the decoder's width does not divide into heads of 32.
    """

    def __init__(
        self,
        encoder: str,
        image_size: int,
        patch_size: int,
        *,
        decoder_width: int = 64,
        decoder_depth: int = 2,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__()
        check_encoder(encoder, image_size, patch_size)
        _check_decoder(decoder_width)
        from timm.models.vision_transformer import Block

        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        self.encoder: Any = build_encoder(encoder, image_size, patch_size)
        side = image_size // patch_size
        vit: Any = self.encoder  # timm's attributes are not nn.Module's
        self.decoder_embed = nn.Linear(vit.embed_dim, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, side * side, decoder_width), requires_grad=False)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_width, decoder_width // _HEAD, qkv_bias=True) for _ in range(decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, patch_size**2 * 3)
        self._initialise(side)

    def _initialise(self, side: int) -> None:
        """The paper's: fixed positions (zero for prefix tokens), Xavier for linears, 0.02 normal for tokens."""
        positions = self.encoder.pos_embed.requires_grad_(False)  # (1, P + L, D)
        prefix = positions.shape[1] - side * side
        with torch.no_grad():
            positions.zero_()
            positions[0, prefix:] = sincos_positions(side, positions.shape[2])
            self.decoder_pos_embed[0] = sincos_positions(side, self.decoder_pos_embed.shape[2])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection = self.encoder.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.data.view(projection.shape[0], -1))
        for token in (self.mask_token, self.encoder.cls_token, self.encoder.reg_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def forward_encoder(self, images: Tensor, mask_ratio: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> latent (B, P + K, D) with the P prefix tokens first, mask (B, L), ids_restore (B, L)."""
        vit = self.encoder
        x = vit.patch_embed(images).flatten(1, -2)  # (B, L, D), also of encoders of any size, which give (B, h, w, D)
        prefix = vit.pos_embed.shape[1] - x.shape[1]
        x = x + vit.pos_embed[:, prefix:]  # (B, L, D)
        x, mask, ids_restore = random_masking(x, mask_ratio, noise)  # (B, K, D)
        tokens = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        if tokens:
            head = torch.cat(tokens, dim=1)  # (1, P, D)
            head = head + vit.pos_embed[:, :prefix] if prefix else head
            x = torch.cat([head.expand(len(x), -1, -1), x], dim=1)  # (B, P + K, D)
        x = vit.norm(vit.blocks(vit.norm_pre(x)))  # (B, P + K, D)
        return x, mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Latent (B, P + K, D) -> predicted patches (B, L, p*p*3)."""
        x = self.decoder_embed(latent[:, self.encoder.num_prefix_tokens :])  # (B, K, E)
        batch, num_visible, width = x.shape
        masked = self.mask_token.expand(batch, ids_restore.shape[1] - num_visible, -1)  # (B, L - K, E)
        x = torch.cat([x, masked.to(x.dtype)], dim=1)  # (B, L, E), shuffled
        x = x.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, width))  # (B, L, E), in place
        x = self.decoder_norm(self.decoder_blocks(x + self.decoder_pos_embed))  # (B, L, E)
        return self.decoder_pred(x)  # (B, L, p*p*3)

    def forward_loss(self, images: Tensor, predicted: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error over the masked patches, each target normalised by its own mean and variance."""
        target = patchify(images, self.patch_size)  # (B, L, p*p*3)
        if self.norm_pix_loss:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        loss = (predicted - target).square().mean(-1)  # (B, L)
        return (loss * mask).sum() / mask.sum()

    def forward(self, images: Tensor, mask_ratio: float, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (B, 3, H, W) and uniform noise (B, L) -> loss (), patches (B, L, p*p*3), mask (B, L)."""
        latent, mask, ids_restore = self.forward_encoder(images, mask_ratio, noise)
        predicted = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(images, predicted, mask), predicted, mask


def build_encoder(name: str, image_size: int, patch_size: int) -> Any:
    """timm's ViT without a head, with its final norm over the tokens, also where timm's own norms what it has pooled:
    so its checkpoint fits under either pooling."""
    import timm

    options = {"img_size": image_size, "patch_size": patch_size, "num_classes": 0, "fc_norm": False}
    found: Any = timm.create_model(name, **options)
    # A pool by attention is no part of what is pre-trained.
    return found if found.attn_pool is None else timm.create_model(name, **options, global_pool="avg")


def check_encoder(encoder: str, image_size: int, patch_size: int) -> None:
    """Raises ValueError for no plain ViT, an image smaller than a patch, and patches that do not tile it."""
    if not is_vit(encoder):
        raise ValueError(
            f"encoder must be a plain VisionTransformer of timm, got {encoder!r}; "
            "choose one of timm.list_models(module='vision_transformer'), for example vit_tiny_patch16_224."
        )
    check_tiles(image_size, patch_size)


def _check_decoder(decoder_width: int) -> None:
    if decoder_width % _HEAD:
        raise ValueError(
            f"decoder_width must be a multiple of {_HEAD}, got {decoder_width}; "
            f"use {max(_HEAD, decoder_width // _HEAD * _HEAD)}."
        )


def save_mae(model: nn.Module, directory: Path) -> None:
    """The encoder as a timm directory (`config.json`, `model.safetensors`) and the decoder beside it.

    `timm.create_model("local-dir:DIRECTORY", pretrained=True)` loads the encoder, and so does `timm.create_model(name,
    img_size=..., patch_size=..., num_classes=0, checkpoint_path="DIRECTORY/model.safetensors")`.
    """
    from safetensors.torch import save_file
    from timm.models import save_for_hf

    encoder: Any = model.encoder
    save_for_hf(encoder, str(directory), safe_serialization=True)
    decoder = {
        name: value.contiguous() for name, value in model.state_dict().items() if not name.startswith("encoder.")
    }
    save_file(decoder, directory / DECODER)


def begin_from(model: nn.Module, path: Path) -> None:
    """Puts a checkpoint's encoder into a MaskedAutoencoder or SimMIM: one of MAE's authors, whose names are timm's, or
    of timm. Its head is left out, positions of another image size are interpolated as timm does, and its decoder is
    taken if it has one and the model too. Raises ValueError for an encoder of another width, depth or patch size, and a
    decoder of another width or depth."""
    from safetensors.torch import load_file
    from timm.layers import resample_abs_pos_embed

    state, encoder = load_file(path), cast(Any, model.encoder)
    own: dict[str, Tensor] = encoder.state_dict()
    prefix = own["pos_embed"].shape[1] - encoder.patch_embed.num_patches
    if "pos_embed" in state and _is_grid(state["pos_embed"], own["pos_embed"], prefix):
        side = list(encoder.patch_embed.grid_size)
        state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], side, num_prefix_tokens=prefix)
    wrong = [name for name, value in own.items() if name not in state or state[name].shape != value.shape]
    if wrong:
        name = wrong[0]
        found = f"{list(state[name].shape)}" if name in state else "none"
        raise ValueError(
            f"fit.mae.weights must hold fit.mae.encoder, whose {name} is {list(own[name].shape)}, got {found} in "
            f"{path} ({len(wrong)} differ); name the encoder and patch_size that it was made with, or a checkpoint "
            "that norms its tokens and not what it has pooled."
        )
    encoder.load_state_dict({name: state[name] for name in own})
    fixed = ("encoder.", "decoder_pos_embed")  # the authors' decoder also has a place for the class token
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith(fixed)}
    if "decoder_embed.weight" not in state or "decoder_embed.weight" not in rest:
        return
    (width, depth), own_decoder = _decoder_of(state), _decoder_of(rest)
    if (width, depth) != own_decoder:
        raise ValueError(
            f"fit.mae.weights must hold a decoder of the fit's own shape or none, got one {width} wide and {depth} "
            f"deep in {path}; set fit.mae.decoder_width={width} fit.mae.decoder_depth={depth}."
        )
    model.load_state_dict({name: state[name] for name in rest}, strict=False)


def _decoder_of(state: dict[str, Tensor]) -> tuple[int, int]:
    """The width and depth of the decoder in a state dict."""
    blocks = [name for name in state if name.startswith("decoder_blocks.") and name.endswith(".norm1.weight")]
    return len(state["decoder_embed.weight"]), len(blocks)


def _is_grid(found: Tensor, own: Tensor, prefix: int) -> bool:
    """Whether positions (1, P + L, D) are of a square of patches, with the width and the prefix tokens of one's own."""
    patches = found.shape[1] - prefix
    return found.shape[2:] == own.shape[2:] and patches > 0 and math.isqrt(patches) ** 2 == patches


def load_mae(model: _Model, directory: Path) -> _Model:
    """The given model with the encoder and decoder that `save_mae` wrote."""
    from safetensors.torch import load_file

    encoder = {f"encoder.{name}": value for name, value in load_file(directory / "model.safetensors").items()}
    model.load_state_dict(encoder | load_file(directory / DECODER))
    return model
