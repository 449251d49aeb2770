"""Stochastic depth (Huang et al. 2016) whose draws belong to rows, so that a resumed fit skips the same blocks.

timm's DropPath asks the process's generator, which knows nothing of steps and rows; this one is told.

    B rows  M drop paths of a model
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class RowDropPath(nn.Module):
    """In training leaves a row's residual out where its draw is below `drop_prob`, and scales the others up."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.draws: Tensor | None = None  # (B,), uniform; set by `give`

    def forward(self, residual: Tensor) -> Tensor:
        if not self.training or self.draws is None:
            return residual
        keep = (self.draws >= self.drop_prob).to(residual) / (1 - self.drop_prob)  # (B,)
        return residual * keep.view(-1, *[1] * (residual.ndim - 1))


def by_row(model: nn.Module) -> int:
    """Replaces every timm DropPath of a model in place and returns how many there are, M."""
    from timm.layers import DropPath

    count = 0
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                setattr(module, name, RowDropPath(float(child.drop_prob or 0.0)))
                count += 1
    return count


def give(model: nn.Module, draws: Tensor) -> None:
    """The draws of the next forward pass, (B, M) uniform in [0, 1)."""
    paths: list[Any] = [module for module in model.modules() if isinstance(module, RowDropPath)]
    for number, path in enumerate(paths):
        path.draws = draws[:, number]
