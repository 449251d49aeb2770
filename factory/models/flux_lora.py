"""LoRA on a FLUX.1 transformer, in the file format that `FluxPipeline.load_lora_weights` reads.

Layers are named in full, by globs over the two kinds of block: a bare suffix such as `proj_out` would also match the
model's own last layer. Alpha equals the rank in everything that is written, module by module, so a loader that ignores
metadata scales it right all the same.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor

from factory.models import kohya
from factory.models.lora import ADAPTER_FILE
from factory.models.weights import canonical_metadata, refuse_pickled

# `*` is a block's number.
ATTENTION: tuple[str, ...] = (
    *(f"transformer_blocks.*.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"transformer_blocks.*.attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"single_transformer_blocks.*.attn.{name}" for name in ("to_q", "to_k", "to_v")),
)
ALL_LINEARS: tuple[str, ...] = (
    *ATTENTION,
    *(f"transformer_blocks.*.{ff}.{name}" for ff in ("ff", "ff_context") for name in ("net.0.proj", "net.2")),
    *(f"transformer_blocks.*.{norm}.linear" for norm in ("norm1", "norm1_context")),
    *(f"single_transformer_blocks.*.{name}" for name in ("proj_mlp", "proj_out", "norm.linear")),
)
TARGETS: dict[str, tuple[str, ...]] = {"attention": ATTENTION, "all_linears": ALL_LINEARS}
_NAME = "default"


def add_lora(transformer: FluxTransformer2DModel, rank: int, targets: Sequence[str]) -> FluxTransformer2DModel:
    """Freeze the transformer in place and add a LoRA of this rank, alpha the same, to the layers that the globs name.

    What trains is float32, whatever the base is stored in: an optimiser's small steps are lost in half precision.
    """
    transformer.requires_grad_(False)
    pattern = "|".join(re.escape(target).replace(r"\*", r"\d+") for target in targets)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=f"(?:{pattern})")
    transformer.add_adapter(config, adapter_name=_NAME)
    cast_training_params(transformer, torch.float32)
    return transformer


def adapter_state(transformer: FluxTransformer2DModel) -> dict[str, Tensor]:
    """The adapter that is on a transformer, `<layer>.lora_A.weight` (r, in) and `<layer>.lora_B.weight` (out, r).

    Its scale is in B, so alpha is the rank: the layer's change is B A.
    """
    found: dict[str, Tensor] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer) and _NAME in module.lora_A:
            down, up, scale = module.lora_A[_NAME].weight, module.lora_B[_NAME].weight, module.scaling[_NAME]
            found[f"{name}.lora_A.weight"] = down.detach().cpu().contiguous()
            found[f"{name}.lora_B.weight"] = (up if scale == 1 else up * scale).detach().cpu().contiguous()
    return found


def save_adapter(directory: str | Path, state: Mapping[str, Tensor]) -> None:
    """Write `pytorch_lora_weights.safetensors` with its metadata. The same weights always give the same bytes."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    FluxPipeline.save_lora_weights(
        folder, transformer_lora_layers=dict(state), transformer_lora_adapter_metadata=_metadata(state)
    )
    canonical_metadata(folder / ADAPTER_FILE)


def _metadata(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of an adapter whose alpha is its rank, layer by layer: ranks may differ."""
    ranks = {key.removesuffix(".lora_A.weight"): len(value) for key, value in state.items() if ".lora_A." in key}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: found for name, found in sorted(ranks.items()) if found != rank}
    config = LoraConfig(
        r=rank, lora_alpha=rank, rank_pattern=others, alpha_pattern=dict(others), target_modules=sorted(ranks)
    )
    found: dict[str, Any] = config.to_dict()
    found["target_modules"] = sorted(ranks)  # a set, whose order changes with the process
    return found


def load_adapter(transformer: FluxTransformer2DModel, path: str | Path) -> FluxTransformer2DModel:
    """Put an adapter onto the transformer, in place: a directory that `save_adapter` wrote, or a safetensors file of
    any format that diffusers reads, or of kohya's. A LoRA of another base is a ValueError that names its first tensor.

    What it holds for text encoders is left out, with a line in the log.
    """
    file = Path(path) / ADAPTER_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file() or file.suffix != ".safetensors":
        refuse_pickled(Path(path))
    if not file.is_file():
        raise ValueError(
            f"adapter must be a directory with {ADAPTER_FILE} or a safetensors file, got {path}; "
            "fit one or name another."
        )
    state = load_file(file)
    if kohya.is_kohya(state):
        converted = kohya.from_kohya(state, transformer, str(file))
        for note in converted.notes:
            logging.getLogger(__name__).warning("%s: %s", file, note)
        transformer.load_lora_adapter(
            converted.state, prefix=None, adapter_name=_NAME, metadata=_metadata(converted.state)
        )
        return transformer.eval()
    found, alphas, metadata = FluxPipeline.lora_state_dict(
        file.parent, weight_name=file.name, return_alphas=True, return_lora_metadata=True, local_files_only=True
    )
    layers = {key: value for key, value in found.items() if key.startswith("transformer.")}
    check_fits({key.removeprefix("transformer."): value for key, value in layers.items()}, transformer, str(file))
    FluxPipeline.load_lora_into_transformer(layers, alphas, transformer, adapter_name=_NAME, metadata=metadata)
    return transformer.eval()


def check_fits(state: Mapping[str, Tensor], transformer: FluxTransformer2DModel, source: str) -> None:
    """Refuse an adapter that was fitted on another base, by its first tensor, in the order of the layers."""
    if not state:
        raise ValueError(
            f"{source} must hold a LoRA of FLUX.1's transformer, got none of its layers; name another file."
        )
    layers = dict(transformer.named_modules())
    for key in sorted(state, key=kohya.natural):
        name, side = re.split(r"\.lora_(?=[AB]\.)", key)[0], 1 if ".lora_A." in key else 0  # A's columns, B's rows
        # A quantised weight is packed, so its shape is not the layer's.
        found = getattr(layers.get(name), ("out_features", "in_features")[side], None)
        kohya.check_side(key, state[key], side, found, source)


def fuse(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Merge the adapter into the weights and drop it: the same network to rounding, at the base's cost."""
    transformer.fuse_lora(adapter_names=[_NAME])
    transformer.unload_lora()
    return transformer
