"""FLUX LoRAs in the format of kohya's sd-scripts, which ComfyUI reads too, to the layers of diffusers and back.

    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight (r, in)   .lora_up.weight (out, r)   .alpha ()

Those trainers see the original model, whose queries, keys and values (and in single blocks the MLP) are one fused
layer. Down is shared by the parts and up is split by rows; the other way the parts are stacked, ranks added, up
block-diagonal. Both are exact. A layer changes by alpha / r up down, and here the scale is folded into up, so
alpha is the rank.

diffusers has such a converter too; it knows FLUX.1-dev's widths only and leaves out the scale of the last layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_SWAPPED = "lora_unet_final_layer_adaLN_modulation_1"  # shift and scale are the other way round in diffusers
_DOUBLE = {  # layer of a double block -> the parts of it in diffusers, in the order of their rows
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn_proj": ("attn.to_out.0",),
    "img_mlp_0": ("ff.net.0.proj",), "img_mlp_2": ("ff.net.2",), "img_mod_lin": ("norm1.linear",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn_proj": ("attn.to_add_out",),
    "txt_mlp_0": ("ff_context.net.0.proj",), "txt_mlp_2": ("ff_context.net.2",),
    "txt_mod_lin": ("norm1_context.linear",),
}  # fmt: skip
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}  # fmt: skip
_OUTSIDE = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
    **{
        f"{theirs}_{layer}": f"time_text_embed.{ours}.linear_{number}"
        for theirs, ours in (
            ("time_in", "timestep_embedder"), ("vector_in", "text_embedder"), ("guidance_in", "guidance_embedder"),
        )
        for layer, number in (("in_layer", 1), ("out_layer", 2))
    },
}  # fmt: skip


class Converted(NamedTuple):
    """An adapter in PEFT's names with alpha equal to the rank, and what was left out, one counted note each."""

    state: dict[str, Tensor]
    notes: list[str]


class _Part(NamedTuple):
    """A layer of the diffusers transformer, (rows, columns)."""

    name: str
    rows: int
    columns: int


def is_kohya(state: Mapping[str, Tensor]) -> bool:
    """Whether a file's tensors are named as kohya's trainer names them."""
    return any(key.endswith(_DOWN) for key in state)


def read(path: str | Path, transformer: Any) -> Converted:
    """The adapter in a kohya file for this transformer. Raises ValueError if it was fitted on another base."""
    return from_kohya(load_file(path), transformer, str(path))


def write(path: str | Path, state: Mapping[str, Tensor], transformer: Any) -> None:
    """A kohya file of an adapter in PEFT's names whose alpha is its rank (`flux_lora.adapter_state` gives one)."""
    stored = {key: value.detach().cpu().contiguous() for key, value in to_kohya(state, transformer).items()}
    save_file(stored, path, metadata={"format": "pt", "ss_network_module": "networks.lora_flux"})


def from_kohya(state: Mapping[str, Tensor], transformer: Any, source: str) -> Converted:
    """kohya's tensors -> PEFT's. `source` names the file in a refusal, which names the first tensor that misfits."""
    text = [key for key in state if key.startswith("lora_te")]
    layers = _layers(transformer)
    found: dict[str, Tensor] = {}
    rest = sorted(state.keys() - set(text), key=natural)
    for key in rest:
        name, _, kind = key.partition(".")
        parts = layers.get(name)
        side = {_DOWN: 1, _UP: 0}.get(f".{kind}")
        if parts is None or (side is None and f".{kind}" != _ALPHA):
            check_side(key, state[key], 0, None, source)
        elif side is not None:
            sides = (sum(part.rows for part in parts), parts[0].columns)
            check_side(key, state[key], side, sides[side], source)
    for name in dict.fromkeys(key.partition(".")[0] for key in rest):
        missing = [name + kind for kind in (_DOWN, _UP) if name + kind not in state]
        if missing:
            raise ValueError(f"{source} must hold {missing[0]}, got none; fetch or write the file again.")
        found |= _unfused(name, layers[name], state)
    if not found:
        raise ValueError(
            f"{source} must hold a LoRA of FLUX.1's transformer, got none of its layers; name another file."
        )
    note = f"{len(text)} tensors of text encoders were left out: the factory's LoRA is the transformer's alone."
    return Converted(found, [note] if text else [])


def _unfused(name: str, parts: list[_Part], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    down, up = state[name + _DOWN], state[name + _UP]
    if name + _ALPHA in state and (scale := float(state[name + _ALPHA]) / len(down)) != 1:
        up = up.float() * scale
    if name == _SWAPPED:
        up = torch.cat(up.chunk(2)[::-1])
    found: dict[str, Tensor] = {}
    for part, rows, columns in zip(parts, up.split([part.rows for part in parts]), _columns(parts, up), strict=True):
        if len(columns):
            found[part.name + _A] = down[columns].clone()
            found[part.name + _B] = rows[:, columns].contiguous()
    return found


def _columns(parts: list[_Part], up: Tensor) -> list[Tensor]:
    """Which of up's columns each part needs: all of them, or its own if no column serves two parts (block-diagonal).
    A column of zeros goes with the one before it, so that a stacked adapter comes apart at the ranks it had."""
    everything = torch.arange(up.shape[1])
    serves = torch.stack([rows.ne(0).any(dim=0) for rows in up.split([part.rows for part in parts])])  # (parts, r)
    if len(parts) == 1 or not serves.any() or (serves.sum(dim=0) > 1).any():
        return [everything] * len(parts)
    known = everything[serves.any(dim=0)]
    nearest = known[(torch.searchsorted(known, everything, right=True) - 1).clamp_min(0)]
    owner = serves.int().argmax(dim=0)[nearest]
    return [everything[owner == number] for number in range(len(parts))]


def to_kohya(state: Mapping[str, Tensor], transformer: Any) -> dict[str, Tensor]:
    """PEFT's tensors, alpha equal to the rank -> kohya's. Raises ValueError for a layer that kohya's format lacks."""
    left = dict(state)
    found: dict[str, Tensor] = {}
    for name, parts in _layers(transformer).items():
        present = [part for part in parts if part.name + _A in left]
        if not present:
            continue
        downs = {part.name: left.pop(part.name + _A) for part in present}
        ups = {part.name: left.pop(part.name + _B) for part in present}
        down, up = torch.cat(list(downs.values())), _stacked(parts, ups)
        if name == _SWAPPED:
            up = torch.cat(up.chunk(2)[::-1])
        found |= {name + _DOWN: down, name + _UP: up, name + _ALPHA: torch.tensor(float(len(down)), dtype=down.dtype)}
    if left:
        raise ValueError(
            f"a kohya LoRA must consist of layers of FLUX.1's blocks, got {sorted(left, key=natural)[0]}; "
            "save the adapter in the diffusers format."
        )
    return found


def _stacked(parts: list[_Part], ups: Mapping[str, Tensor]) -> Tensor:
    """(rows of all parts, sum of the ranks that are there), block-diagonal; a part without an adapter has zero rows."""
    first = next(iter(ups.values()))
    up = first.new_zeros(sum(part.rows for part in parts), sum(value.shape[1] for value in ups.values()))
    row = column = 0
    for part in parts:
        if part.name in ups:
            block = ups[part.name]
            up[row : row + part.rows, column : column + block.shape[1]] = block
            column += block.shape[1]
        row += part.rows
    return up


def _layers(transformer: Any) -> dict[str, list[_Part]]:
    """kohya's layers of this transformer, in the order of the network, each with its parts."""
    named = {name: module for name, module in transformer.named_modules() if hasattr(module, "in_features")}
    found: dict[str, tuple[str, ...]] = {f"lora_unet_{theirs}": (ours,) for theirs, ours in _OUTSIDE.items()}
    for kind, table, count in (
        ("double", _DOUBLE, len(transformer.transformer_blocks)),
        ("single", _SINGLE, len(transformer.single_transformer_blocks)),
    ):
        block = "transformer_blocks" if kind == "double" else "single_transformer_blocks"
        for number in range(count):
            for layer, ours in table.items():
                found[f"lora_unet_{kind}_blocks_{number}_{layer}"] = tuple(f"{block}.{number}.{name}" for name in ours)
    return {
        theirs: [_Part(name, named[name].out_features, named[name].in_features) for name in ours]
        for theirs, ours in found.items()
        if all(name in named for name in ours)
    }


def check_side(key: str, value: Tensor, side: int, wanted: int | None, source: str) -> None:
    """Refuse a tensor (rows, columns) of a LoRA that does not fit the base's layer, or whose layer is not there (None).
    side: 0 rows, 1 columns."""
    if wanted is None:
        rule, got = "a layer of this base", "a layer that it does not have"
    elif value.ndim != 2 or value.shape[side] != wanted:
        rule, got = f"(rank, {wanted})" if side else f"({wanted}, rank)", str(tuple(value.shape))
        rule = f"of shape {rule}"
    else:
        return
    raise ValueError(f"{key} in {source} must be {rule}, got {got}; use the base that the LoRA was fitted on.")


def natural(key: str) -> list[tuple[int, str]]:
    """Sorts names with the numbers in them by value: block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]
