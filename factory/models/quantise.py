"""FLUX.1's transformer on cards that bfloat16 (23.8 GB) does not fit: four bits or eight a weight.

    nf4   bitsandbytes' four-bit normal floats with double quantisation (QLoRA, arXiv 2305.14314): 6.1 GB; needs a GPU
    fp8   torchao's eight-bit floats with a scale a row, weights only: 11.9 GB

Both are diffusers' own quantisation configs, and what is computed is computed in bfloat16: a layer's weight is made
wide where it is used. Only linear layers are quantised. An adapter stays a LoRA beside such weights, for merging it
would round it away.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# The package of each, and what is installed for it.
QUANTISED: dict[str, str] = {"nf4": "bitsandbytes", "fp8": "torchao"}


def check_quantised(base_dtype: str | None, family: str, field: str, gpu: bool | None = None) -> None:
    """Refuse a quantised base that is not FLUX.1's, or whose package or GPU is not here, in one sentence that names
    the remedy. gpu: whether one will be there; None: not known yet, so not asked."""
    if base_dtype not in QUANTISED:
        return
    if family != "flux":
        raise ValueError(
            f"{field} must be null for the family {family}, got {base_dtype}; leave it out, only FLUX.1 is so large."
        )
    package = QUANTISED[base_dtype]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{field} {base_dtype} must have {package}, got none installed; install dermafactory[small-cards], or "
            f"leave {field} out."
        )
    if base_dtype == "nf4" and gpu is False:
        raise ValueError(f"{field} nf4 must have a GPU, got none; run on a machine with one, or use fp8.")


def compute_dtype(base_dtype: str) -> torch.dtype:
    """What a base of `float32`, `bfloat16`, `nf4` or `fp8` is computed in."""
    import torch

    return torch.float32 if base_dtype == "float32" else torch.bfloat16


def quantisation(base_dtype: str) -> Any:
    """diffusers' config of a quantised dtype."""
    import torch

    if base_dtype == "nf4":
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig

    return TorchAoConfig(Float8WeightOnlyConfig())


def load_base(folder: Path, base_dtype: str, field: str = "fit.lora.flux.base_dtype") -> Any:
    """FLUX.1's transformer from a folder, in eval mode, as `base_dtype` says; nf4 ones are on the GPU at once."""
    import torch
    from diffusers import FluxTransformer2DModel

    from factory.models.loading import load_part

    if base_dtype not in QUANTISED:
        return load_part(FluxTransformer2DModel, folder, compute_dtype(base_dtype))
    check_quantised(base_dtype, "flux", field, torch.cuda.is_available())
    config = quantisation(base_dtype)
    return load_part(FluxTransformer2DModel, folder, torch.bfloat16, quantization_config=config)


def is_quantised(module: Any) -> bool:
    """Whether a model was loaded by a quantisation config: its weights can move, but not be cast."""
    return getattr(module, "hf_quantizer", None) is not None
