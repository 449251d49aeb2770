"""Whether a LoRA fit has room on a GPU, asked before a cluster is started, and what would have room if not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory.fits import presets
from factory.fits.presets import Preset
from factory.models.quantise import check_quantised
from factory.recipe import LoraSection

if TYPE_CHECKING:
    from torch import nn

GB = 10**9
_FIELD = "fit.lora.flux.base_dtype"


def check(section: LoraSection, size: int, base: Path, gpu_bytes: int | None) -> None:
    """Refuse a fit that cannot be begun: a quantised base whose package is not installed, or one that needs more than
    `gpu_bytes`, the memory of the GPU that it is to run on (None: there is none, or it is not known)."""
    flux = section.family == "flux"
    if flux:
        check_quantised(section.flux.base_dtype, "flux", _FIELD)
    if gpu_bytes is None or section.sharding == "sharded":  # a shard's share of the base depends on the workers
        return
    need = needed(section, size, base)["total"]
    if need <= gpu_bytes:
        return
    room = f"fit.lora must fit in a GPU's {gpu_bytes / GB:.1f} GB, got one that needs {need / GB:.1f} GB"
    found = next((other for other in (smaller(section) if flux else ()) if _fits(other, size, base, gpu_bytes)), None)
    if found is not None:
        own = found.flux
        further = "" if section.flux.gradient_checkpointing else " and fit.lora.flux.gradient_checkpointing=true"
        raise ValueError(
            f"{room}; the largest that fits is fit.lora.flux.preset={own.preset} with {_FIELD}={own.base_dtype}"
            f"{further}, set these."
        )
    raise ValueError(f"{room}; lower fit.lora.micro_batch or the size, or fit on a larger GPU.")


def needed(section: LoraSection, size: int, base: Path) -> dict[str, Any]:
    """The memory of a fit, bytes by part (see `fits/memory.py`), by its section of the recipe and `plan.size`."""
    return presets.memory_of(_network(section, base), base, section, size)


def smaller(section: LoraSection) -> Iterator[LoraSection]:
    """A FLUX.1 fit's section with every preset and dtype of the base, gradients checkpointed: the most trained
    parameters first, and of these the widest weights."""
    named = [name for name, _ in sorted(presets.PRESETS["flux"].items(), key=_size)]
    for preset in named:
        for dtype in ("bfloat16", "fp8", "nf4"):
            own = {"preset": preset, "base_dtype": dtype, "gradient_checkpointing": True}
            yield section.model_copy(update={"flux": section.flux.model_copy(update=own)})


def _size(named: tuple[str, Preset]) -> int:
    """Sorts presets by what they train, the largest first: attention has 1,634,304 values a rank, all linears 5,369,856
    at FLUX.1's size."""
    preset = named[1]
    return -preset.rank * (1_634_304 if preset.targets == "attention" else 5_369_856)


def _fits(section: LoraSection, size: int, base: Path, gpu_bytes: int) -> bool:
    return bool(needed(section, size, base)["total"] <= gpu_bytes)


def _network(section: LoraSection, base: Path) -> nn.Module:
    """The network of a fit on the meta device, with what trains on it."""
    family = section.family
    name = getattr(section, family).preset
    if family == "class_conditional" and section.train_mode == "lora":
        name = "lora"
    chosen = Preset("joint" if family == "joint" else "attention", section.rank, "") if name is None else None
    model = presets.built(family, chosen or presets.preset_of(family, name), base, name or "")[0]
    return model.requires_grad_(True) if section.train_mode == "full" else model
