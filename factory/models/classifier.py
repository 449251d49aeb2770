"""Classifiers: timm models by name, each behind the pixel normalisation it was made for.

B images  H W pixels  K classes
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PATCHES = "patch_embed.proj.weight"  # (D, 3, p, p) in a ViT's checkpoint


class Normalised(nn.Module):
    """A model that takes pixels in [0, 1] and normalises them itself, with mean and deviation as its own buffers.

    So a teacher and a student that were made for different normalisations see the same batch, each in its own way.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model: Any = model
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor, *rest: Any) -> Any:
        """Pixels (B, 3, H, W) in [0, 1], then whatever else the model takes."""
        return self.model((images - self.mean) / self.std, *rest)


def normalised(model: nn.Module) -> Normalised:
    """A timm model behind the mean and deviation of its own configuration."""
    config: Any = model.pretrained_cfg
    return Normalised(model, config["mean"], config["std"])


def is_vit(name: str) -> bool:
    """Whether a timm model is a plain VisionTransformer, of which masked pre-training can be had."""
    from timm.models import is_model_in_modules

    return is_model_in_modules(name, {"vision_transformer"})


def check_tiles(image_size: int, patch_size: int) -> None:
    """Raises ValueError for an image smaller than a patch, and for patches that do not tile it."""
    if image_size < patch_size:
        raise ValueError(
            f"image_size must be at least a patch, got {image_size} and patch_size {patch_size}; change one of them."
        )
    if image_size % patch_size:
        raise ValueError(
            f"image_size must be a multiple of patch_size, got {image_size} and {patch_size}; change one of them."
        )


def build_classifier(
    name: str, num_classes: int, image_size: int, checkpoint: str | Path | None = None, **options: Any
) -> Normalised:
    """A timm model with average pooling and a new head: pixels (B, 3, H, W) in [0, 1] -> logits (B, K).

    checkpoint: a safetensors state dict of the same model. Its head is used if it has K classes and left out
    otherwise; every other weight must be there, and its patch size is followed. `options` go to `timm.create_model`,
    among them another `global_pool`.
    Raises ValueError for a name that timm does not know and for a checkpoint that does not fit.
    """
    import timm

    if not timm.is_model(name):
        raise ValueError(
            f"the classifier must be a model of timm, got {name!r}; choose one of timm.list_models('*{name[:6]}*')."
        )
    state = _read(checkpoint) if checkpoint is not None else {}
    config: Any = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options = {"img_size": image_size} | options
        if is_vit(name):
            # The final norm stays before the pool, so that a checkpoint made with a class token loads as it is.
            options = {"fc_norm": False} | options
        if PATCHES in state:
            options = {"patch_size": state[PATCHES].shape[-1]} | options
    options = {"global_pool": "avg"} | options
    try:
        model: Any = timm.create_model(name, num_classes=num_classes, **options)
    except (AssertionError, TypeError, RuntimeError) as error:
        told = ", ".join(f"{key}={value}" for key, value in options.items())
        raise ValueError(
            f"{name} must be built with {told}, which timm refuses ({error or type(error).__name__}); choose another "
            "model, or another value of these."
        ) from error
    if is_vit(name):
        check_tiles(image_size, model.patch_embed.patch_size[0])
    if state:
        _load(model, state, str(checkpoint))
    return normalised(model)


def _read(checkpoint: str | Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint)


def _load(model: Any, state: dict[str, Tensor], source: str) -> None:
    """Every weight but a head of other classes; a weight that is missing, unknown or of another shape is refused."""
    own = model.state_dict()
    head = {name for name in own if name.startswith(f"{model.pretrained_cfg['classifier']}.")}
    if any(name in state and state[name].shape != own[name].shape for name in head):
        state = {name: value for name, value in state.items() if name not in head}
    wrong = sorted(name for name in (set(own) ^ set(state)) - head)
    wrong += sorted(name for name in set(own) & set(state) if own[name].shape != state[name].shape)
    if wrong:
        raise ValueError(
            f"checkpoint must hold the weights of this model at this size, got {source}, which differs in "
            f"{', '.join(wrong[:4])} ({len(wrong)} in all); give the name and image_size it was made with."
        )
    model.load_state_dict(state, strict=False)
