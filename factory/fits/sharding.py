"""Tensors of which each worker holds a piece (FSDP2), and the same tensors whole.

A fit that is sharded writes the checkpoints of one that is not: whatever is saved is put together first, and cut
again when it is read. Every function here is the identity on a tensor that is not sharded; on one that is, all workers
must call it together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def shard(model: nn.Module) -> nn.Module:
    """Cuts a model's parameters over the default process group, in place: each block of its lists of blocks (also of
    timm's, which are sequences of one kind of block), then the rest. A model whose parts are called by themselves
    (`nn.ModuleDict`, a teacher with its student) is cut child by child."""
    from torch.distributed.fsdp import fully_shard

    if isinstance(model, (nn.ModuleDict, nn.ModuleList)) or getattr(model, "parts_are_called", False):
        for child in model.children():
            if any(True for _ in child.parameters()):
                shard(child)
        return model
    for module in reversed(list(model.modules())):  # inner lists first: what is cut is not cut again within
        if isinstance(module, nn.ModuleList) or _is_blocks(module):
            for block in module.children():
                if any(True for _ in block.parameters()):
                    fully_shard(block)
    fully_shard(model)
    return model


def _is_blocks(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and len(module) > 1 and len({type(child) for child in module}) == 1


def whole(value: Any) -> Any:
    """A tensor put together from its pieces, or tensors in nested lists and dicts; anything else as it is."""
    return tree_map(lambda one: one.full_tensor() if isinstance(one, DTensor) else one, value)


def as_piece(value: Tensor, like: Tensor) -> Tensor:
    """This worker's piece of a whole tensor, cut as `like` is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


@torch.no_grad()
def copy_whole(target: Tensor, value: Tensor) -> None:
    """Writes a whole tensor into one that may be sharded."""
    target.copy_(as_piece(value, target))
