"""What a LoRA fit needs of a GPU's memory, part by part, counted on the meta device without a weight.

Weights, gradients and AdamW's two moments are counts times bytes: 4 + 4 + 8 a trained parameter (ZeRO, arXiv
1910.02054, section 3.1, without its half-precision copy, for what trains here is float32), 4 more for an average of it.
The frozen base has 4, 2, 1 (fp8) or 0.516 bytes a weight: nf4 is half a byte, a byte for every 64 weights' scale and
four for every 256 of those (QLoRA, arXiv 2305.14314, section 3); only linear layers are quantised.

Activations are not a formula but a count: the network's own forward runs on the meta device, and what autograd saves
for the backward is added up, each storage once and no parameter. Attention is counted as its fused kernels save it:
queries, keys, values, output and a number a row (FlashAttention, arXiv 2205.14135, Algorithm 1). With gradient
checkpointing (arXiv 1604.06174) each block keeps its inputs, and one block at a time what its own forward saves:

    activations = what is saved outside blocks + inputs of all blocks + max over blocks of what is saved in it

An fp8 weight is made wide where it is used, and autograd keeps the wide one, so these count as saved too.

Not counted: the temporary tensors of a kernel and what an allocator loses to fragments; RESERVE stands for both and for
the CUDA context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from factory.recipe import LoraSection

RESERVE = 3 * 2**29  # bytes
TRAINED_BYTES, AVERAGE_BYTES = {"adapter": 4, "gradients": 4, "optimizer": 8}, 4  # a trained parameter
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, with double quantisation
BYTES = {"float32": 4.0, "bfloat16": 2.0, "fp8": 1.0, "nf4": NF4_BYTES}
# What recomputes itself under gradient checkpointing, by diffusers' classes.
_BLOCKS = {"FluxTransformerBlock", "FluxSingleTransformerBlock", "BasicTransformerBlock", "ResnetBlock2D"}


@dataclass(frozen=True)
class Workload:
    """What decides a fit's memory beside its network. rows: of a worker at once; side: px; tokens: of a prompt."""

    rows: int
    side: int
    tokens: int = 77
    base_dtype: str = "float32"
    average: bool = False
    checkpointing: bool = False
    data_parallel: bool = False


def workload_of(section: LoraSection, size: int) -> Workload:
    """A fit's workload by its section of the recipe and `plan.size`."""
    rows = -(-section.batch_size // section.num_workers)
    flux = section.family == "flux"
    own = {"flux": section.flux.gradient_checkpointing, "inpaint": section.inpaint.gradient_checkpointing}
    return Workload(
        rows=min(rows, section.micro_batch or rows),
        side=max(section.flux.scales, default=size) if flux else size,
        tokens=section.flux.max_sequence_length if flux else 77,
        base_dtype=section.flux.base_dtype if flux else "float32",
        average=section.ema_decay > 0,
        checkpointing=own.get(section.family, False),
        data_parallel=section.num_workers > 1,
    )


def estimate(network: nn.Module, forward: Callable[[], Tensor], work: Workload) -> dict[str, Any]:
    """Bytes by part and their `total`, of a network on the meta device whose frozen parameters are in the dtype that
    they are computed in. forward: one forward of the workload's rows. `activations` has both ways, `total` the fit's.
    """
    trained = sum(value.numel() for value in network.parameters() if value.requires_grad)
    saved = activations(network, forward)
    if work.base_dtype == "fp8":
        saved = {name: value + wide for (name, value), wide in zip(saved.items(), _widened(network), strict=True)}
    parts: dict[str, int] = {"base": base_bytes(network, work.base_dtype)}
    parts |= {name: size * trained for name, size in TRAINED_BYTES.items()}
    parts["average"] = AVERAGE_BYTES * trained if work.average else 0
    parts["buckets"] = TRAINED_BYTES["gradients"] * trained if work.data_parallel else 0
    parts["reserve"] = RESERVE
    chosen = saved["gradient_checkpointing" if work.checkpointing else "plain"]
    return {
        "rows": work.rows, "side": work.side, "base_dtype": work.base_dtype, **parts, "activations": saved,
        "gradient_checkpointing": work.checkpointing, "total": sum(parts.values()) + chosen,
    }  # fmt: skip


def narrow_base(network: nn.Module, base_dtype: str) -> None:
    """Frozen parameters on the meta device in what a base of `base_dtype` is computed in, as a fit loads them."""
    if base_dtype != "float32":
        for value in network.parameters():
            if not value.requires_grad:
                value.data = value.data.to(torch.bfloat16)


def base_bytes(network: nn.Module, base_dtype: str) -> int:
    """Of the frozen weights: those of linear layers in `base_dtype`, the others in what they are computed in."""
    narrow = "float32" if base_dtype == "float32" else "bfloat16"
    linear = _weights_of_linears(network)
    others = sum(value.numel() for value in network.parameters() if not value.requires_grad) - sum(linear.values())
    scales = sum(_scale_bytes(base_dtype, module) for module in _linears(network))
    return round(sum(linear.values()) * BYTES[base_dtype] + scales + others * BYTES[narrow])


def _linears(network: nn.Module) -> Iterator[nn.Linear]:
    """The frozen linear layers."""
    for module in network.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            yield module


def _weights_of_linears(network: nn.Module) -> dict[int, int]:
    return {id(module): module.weight.numel() for module in _linears(network)}


def _scale_bytes(base_dtype: str, module: nn.Linear) -> int:
    """fp8 has a float32 scale a row; that of nf4 is in BYTES."""
    return 4 * module.out_features if base_dtype == "fp8" else 0


def _widened(network: nn.Module) -> tuple[int, int]:
    """Bytes of all frozen linear weights in bfloat16, and of those of the largest block."""
    blocks = [module for module in network.modules() if type(module).__name__ in _BLOCKS]
    sizes = [2 * sum(_weights_of_linears(module).values()) for module in [network, *blocks]]
    return sizes[0], max(sizes[1:], default=sizes[0])


def activations(network: nn.Module, forward: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes that autograd keeps of one forward: `plain`, and with `gradient_checkpointing` by block."""
    counted = _Counted({_storage(value) for value in network.parameters()})
    network.train()
    with counted.watching(network), _FusedAttention(), torch.enable_grad():
        kept = forward()  # noqa: F841  (what is saved must stay alive while it is counted)
    return {"plain": counted.plain, "gradient_checkpointing": counted.recomputed}


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


@dataclass
class _Counted:
    """What a forward saves: by storage, outside blocks and in each."""

    parameters: set[int]
    outside: dict[int, int] = field(default_factory=dict)
    blocks: list[dict[int, int]] = field(default_factory=list)
    inputs: dict[int, int] = field(default_factory=dict)
    _within: dict[int, int] | None = None
    _alive: list[Tensor] = field(default_factory=list)

    @property
    def plain(self) -> int:
        known = dict(self.outside)
        for block in self.blocks:
            known |= block
        return sum(known.values())

    @property
    def recomputed(self) -> int:
        if not self.blocks:
            return self.plain
        return sum((self.outside | self.inputs).values()) + max(sum(block.values()) for block in self.blocks)

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        handles: list[Any] = []
        for module in network.modules():
            if type(module).__name__ in _BLOCKS:
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda value: value):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._within = {}
        self.blocks.append(self._within)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                self._note(self.inputs, value)

    def _leave(self, *_: Any) -> None:
        self._within = None

    def _pack(self, value: Tensor) -> Tensor:
        self._note(self.outside if self._within is None else self._within, value)
        return value

    def _note(self, known: dict[int, int], value: Tensor) -> None:
        if _storage(value) not in self.parameters:
            self._alive.append(value)  # so that no other storage is given its number
            known[_storage(value)] = value.untyped_storage().nbytes()


class _FusedAttention(TorchFunctionMode):
    """Attention that saves what its fused kernels save; on the meta device torch would save every weight of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*args[:3] or [kwargs[name] for name in ("query", "key", "value")])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise AssertionError("only counted")
