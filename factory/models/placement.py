"""Where a generator is computed and in which precision: decided here once, for all families.

`dtype` is that of the denoising network and of the text encoders. VAE, mask head and segmenter stay float32, where half
precision is known to overflow, and so do latents, noise, solver and scores. It decides pixels, so whatever is not
float32 on a CPU is part of the samples' fingerprint.
"""

from __future__ import annotations

from typing import NamedTuple


class Placement(NamedTuple):
    """device: `cuda` or `cpu`; dtype: `float32` or `bfloat16`, as torch names them."""

    device: str
    dtype: str


def placement(dtype: str, gpu: bool) -> Placement:
    """`synthesize.dtype` where a GPU is at hand or not; `auto` is bfloat16 on a GPU and float32 on a CPU."""
    chosen = ("bfloat16" if gpu else "float32") if dtype == "auto" else dtype
    return Placement("cuda" if gpu else "cpu", chosen)


def gpu_at_hand(asked: bool | None = None) -> bool:
    """Whether to compute on a GPU: as asked, and without a wish if torch sees one. Raises ValueError where one was
    reserved that torch does not see."""
    import torch

    if asked and not torch.cuda.is_available():
        raise ValueError(
            f"torch must see the GPU that its process has, got none in torch {torch.__version__}; install a CUDA build "
            "of torch on the GPU's machines, or start Ray there with --num-gpus=0."
        )
    return torch.cuda.is_available() if asked is None else asked


def fingerprint(where: Placement, base_dtype: str | None, compiled: bool = False) -> dict[str, str]:
    """What a placement adds to the fingerprint of samples: nothing for float32 on a CPU, not compiled, which was all
    there once was."""
    found = {} if where == Placement("cpu", "float32") else {"synthesize.dtype": f"{where.dtype} on {where.device}"}
    if compiled:
        found["synthesize.compile"] = "true"
    return found if base_dtype is None else found | {"synthesize.base_dtype": base_dtype}
