"""A denoising network compiled by torch, for a closed set of shapes.

The sampler calls a network with one shape for each image size and number of slots, so each of these is compiled for
itself and none in general. What would compile without end, or fall back to the slower path in silence, is an error.
Sums are rounded in another order than without: whoever draws a sample again must compile too, and the fingerprint of
samples says so. Kernels are chosen by rule and not by timing, so that every process that compiles has the same.
"""

from __future__ import annotations

import os
import shutil

from torch import nn

BLOCKS = {"BasicTransformerBlock", "FluxTransformerBlock", "FluxSingleTransformerBlock"}  # of diffusers' networks
GRAPHS = 64  # of one block: some have two for a shape, and a run has a shape for each halving of its slots
REPEATED = 0.9  # of a network's parameters: from there on its blocks are compiled once, in place of all of it


def compile_network(network: nn.Module) -> None:
    """Compiles in place, at the first call of each shape. Where nearly all of a network is one block again and again,
    as in FLUX.1 and DiT, it is compiled once for all of them, which takes a tenth of the time. A ValueError where
    there is nothing to compile with."""
    if next(network.parameters()).device.type == "cpu" and not _cpp_compiler():
        raise ValueError(
            "synthesize.compile must have a C++ compiler for a CPU, got none; install g++, name one in CXX, or set "
            "synthesize.compile=false."
        )
    for part in _repeated(network) or [network]:
        part.compile(fullgraph=True, dynamic=False, recompile_limit=GRAPHS)  # the global one is a thread's own


def _cpp_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


def _repeated(network: nn.Module) -> list[nn.Module]:
    """The blocks that a network repeats, where they are nearly all of it."""
    blocks = [part for part in network.modules() if type(part).__name__ in BLOCKS]
    return blocks if sum(map(_size, blocks)) >= REPEATED * _size(network) else []


def _size(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())
