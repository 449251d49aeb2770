"""Pickled weights as safetensors: the one place where a pickle is opened, and only as far as it holds tensors.

pytorch_model.bin                        model.safetensors
diffusion_pytorch_model.fp16.bin         diffusion_pytorch_model.fp16.safetensors
pytorch_model-00001-of-00002.bin         model-00001-of-00002.safetensors, and the index with it
anything.ckpt, .pt, .pth                 anything.safetensors
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from factory.models.weights import PICKLED

INDEX = ".bin.index.json"
_NESTED = ("state_dict", "model", "module")  # where trainers keep the weights beside their own state


def convert(path: str | Path, out: str | Path) -> list[Path]:
    """Convert a pickled file, or every one of a directory, into the new directory `out`; the files written, in order.

    Of a directory all else is copied, so that a diffusers directory stays one; where both forms of a file are there,
    the safetensors one is kept. Nothing is overwritten: `out` must not exist, and appears whole. Raises ValueError for
    a pickle that holds more than tensors, without running what it holds.
    """
    source, target = Path(path), Path(out)
    files = [source] if source.is_file() else sorted(file for file in source.rglob("*") if file.is_file())
    pickles = [file for file in files if file.suffix in PICKLED]
    if not pickles:
        raise ValueError(
            f"PATH must be a file or a directory with one of {', '.join(PICKLED)}, got {source}; check the path."
        )
    if target.exists():
        raise ValueError(f"--out must be a directory that is not there yet, got {target}; name another.")
    staged = target.with_name(target.name + ".tmp")
    shutil.rmtree(staged, ignore_errors=True)
    base = source.parent if source.is_file() else source
    try:
        for file in files:
            _put(file, staged / file.relative_to(base))
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    staged.rename(target)
    return [target / _renamed(file.relative_to(base)) for file in pickles]


def _put(file: Path, at: Path) -> None:
    """One file of the source, converted or copied."""
    at.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix in PICKLED:
        if not (file.parent / _renamed(Path(file.name))).exists():
            save_file(tensors_of(file), at.parent / _renamed(Path(at.name)), {"format": "pt"})
    elif file.name.endswith(INDEX):
        index = json.loads(file.read_text())
        index["weight_map"] = {key: str(_renamed(Path(name))) for key, name in index["weight_map"].items()}
        name = file.name.replace(INDEX, ".safetensors.index.json")
        at.with_name(name.replace("pytorch_model.safetensors", "model.safetensors")).write_text(json.dumps(index))
    else:
        shutil.copy2(file, at)


def _renamed(path: Path) -> Path:
    """The safetensors name that diffusers and transformers look for."""
    if path.suffix not in PICKLED:
        return path
    stem = "model" + path.stem.removeprefix("pytorch_model") if path.stem.startswith("pytorch_model") else path.stem
    return path.with_name(stem + ".safetensors")


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file by name, each with memory of its own: safetensors knows no shared ones."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{file} must hold tensors and nothing else, but torch refuses it with weights_only ({reason[:120]}); "
            "get the weights as safetensors from their publisher."
        ) from error
    state = _state(found)
    if not state:
        raise ValueError(
            f"{file} must hold tensors by name, got {type(found).__name__}; save the model's state_dict() alone."
        )
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}


def _state(found: Any) -> dict[str, Tensor]:
    """The tensors of what was loaded, at the top or one level down."""
    if not isinstance(found, Mapping):
        return {}
    for name in _NESTED:
        if isinstance(found.get(name), Mapping):
            return _state(found[name])
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
