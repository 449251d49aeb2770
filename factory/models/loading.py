"""Parts of a diffusers directory: loaded from safetensors alone, in eval mode, and told apart by their values."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from factory.models.weights import check_scheduler, weight_files


def checked_directory(directory: str | Path, parts: Sequence[str], kind: str) -> Path:
    """The directory, if every part is there and its scheduler is one for its network; kind names the pipeline in the
    refusal (`Stable Diffusion`)."""
    base = Path(directory)
    missing = [part for part in parts if not (base / part).is_dir()]
    if missing:
        raise ValueError(
            f"weights must be a {kind} directory with {', '.join(parts)}, got {base} without "
            f"{', '.join(missing)}; save the pipeline there with save_pretrained."
        )
    check_scheduler(base)
    return base


def load_part(kind: Any, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """One part by its class, in eval mode. Nothing is fetched and pickled weights are never read. options: further ones
    of `from_pretrained`."""
    # The loader's one warning is about `block_out_channels`, which our VAE's config holds for pipelines to find; that
    # of `.to()` is about an empty list of modules.
    for name in ("configuration_utils", "models.modeling_utils"):
        logging.getLogger(f"diffusers.{name}").setLevel(logging.ERROR)
    disable_progress_bar()  # a bar per part, of files that load in a moment
    variant = weight_files(folder)[1]
    return kind.from_pretrained(
        folder, variant=variant, use_safetensors=True, local_files_only=True, dtype=dtype, **options
    ).eval()


def module_digest(module: nn.Module) -> str:
    """SHA-256 of a module's tensors in float32, by name and shape: the same however they were stored."""
    total = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        total.update(f"{key} {tuple(value.shape)}\n".encode())
        total.update(tensor_bytes(value))
    return total.hexdigest()


def tensor_bytes(value: Tensor) -> bytes:
    """The values in float32, row by row."""
    return value.detach().cpu().float().contiguous().numpy().tobytes()
