"""A classifier in eight bits: QDQ for ONNX Runtime on CPUs (Jacob et al., CVPR 2018), torchao's layers for GPUs.

Linear layers are computed in eight bits. Convolutions are computed in float32 and only their weights are kept in eight
bits, one scale an output channel: with eight-bit inputs, fitted MobileNetV3 and EfficientNet-B0 changed 8-30% of their
verdicts, by every calibration tried, and were no faster. Layers of fewer than `SMALLEST` weights stay float32, and
larger ones too in the more careful of `SCHEMES`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

SMALLEST = 4096  # weights: what is smaller saves nothing, and most of the verdicts changed by rounding were its doing
# Whether linear layers are computed in eight bits, and the least weights of a layer that is touched: from the smallest
# and fastest to the most careful.
SCHEMES = ((True, SMALLEST), (False, SMALLEST), (False, 4 * SMALLEST), (False, 16 * SMALLEST))
LINEAR = ("MatMul", "Gemm")
COMPUTED, STORED, FLOAT = "computed_in_int8", "stored_in_int8", "float32"  # what becomes of a layer

Pixels = NDArray[np.generic]


def fold(source: Path, path: Path) -> None:
    """The same graph with its constants folded, batch norms into convolutions among them."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(source), str(path), skip_symbolic_shape=True)


def quantise(source: Path, path: Path, images: Pixels, computed: bool, smallest: int = SMALLEST) -> dict[str, int]:
    """Writes a folded ONNX graph in eight bits, and returns how many layers are of each sort.

    images: (N, ...) as its only input takes them; the ranges of what linear layers read are taken from them. computed:
    whether linear layers are computed in eight bits, or only stored so as convolutions are. smallest: layers of fewer
    weights stay float32.
    """
    import onnx

    graph = onnx.load(str(source)).graph
    weights = _weights(graph)
    large = {name for name, array in weights.items() if array.size >= smallest}
    layers = [node for node in graph.node if _weight(node) in weights]
    linear = [node.name for node in layers if computed and node.op_type in LINEAR and _weight(node) in large]
    if linear:
        _calibrated(source, path, graph.input[0].name, images, linear)
    else:
        path.write_bytes(source.read_bytes())
    stored = large - {_weight(node) for node in layers if node.name in linear}
    _store(path, stored)
    return {COMPUTED: len(linear), STORED: len(stored), FLOAT: len(weights) - len(large)}


def _weight(node: Any) -> str | None:
    """The name of a layer's weight, None for what is no layer."""
    return node.input[1] if node.op_type in (*LINEAR, "Conv") else None


def _weights(graph: Any) -> dict[str, NDArray[np.float32]]:
    """The constant weights of layers by name; a product of two activations, as in attention, has none."""
    from onnx import numpy_helper

    used = {_weight(node) for node in graph.node}
    return {one.name: numpy_helper.to_array(one) for one in graph.initializer if one.name in used}


def _calibrated(source: Path, path: Path, name: str, images: Pixels, linear: list[str]) -> None:
    """Static quantisation of these layers: inputs uint8 by their least and largest values, weights int8 an output
    channel, results float32."""
    from onnxruntime import quantization

    quantization.quantize_static(
        str(source),
        str(path),
        _reader(name, images),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=list(LINEAR),
        nodes_to_quantize=linear,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        extra_options={"OpTypesToExcludeOutputQuantization": list(LINEAR)},
    )


def _reader(name: str, images: Pixels) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The images one at a time, so that memory does not grow with their number."""

        def __init__(self) -> None:
            self.rows = iter(images)

        def get_next(self) -> dict[str, Pixels] | None:
            row = next(self.rows, None)
            return None if row is None else {name: row[None]}

    return Reader()


def _store(path: Path, names: set[str]) -> None:
    """Keeps these weights as int8 and a scale an output channel.

    They are widened by Cast and Mul, which ONNX Runtime does once, as it loads. A DequantizeLinear it would repeat for
    every image, which made small networks half to a quarter as fast.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    axes = {_weight(node): _output_axis(node) for node in graph.node}
    found = [one for one in graph.initializer if one.name in names]
    for one in found:
        whole, scale = rounded(numpy_helper.to_array(one), axes[one.name])
        name = one.name
        graph.initializer.remove(one)
        graph.initializer.append(numpy_helper.from_array(whole, f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}_scale"))
        graph.node.insert(0, helper.make_node("Mul", [f"{name}_wide", f"{name}_scale"], [name]))
        graph.node.insert(0, helper.make_node("Cast", [f"{name}_int8"], [f"{name}_wide"], to=onnx.TensorProto.FLOAT))
    onnx.save(model, str(path))


def _output_axis(node: Any) -> int:
    transposed = any(one.name == "transB" and one.i for one in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def rounded(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A weight as int8 of its own shape and float32 scales, one for each place along the axis, that broadcast to it."""
    others = tuple(k for k in range(weight.ndim) if k != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


# ------------------------------------------------------------------------------------------------------ torchao, GPUs


def quantised(model: Any) -> tuple[nn.Module, dict[str, int]]:
    """A copy whose linear layers are torchao's int8, and how many layers are of each sort; for `torch.export`.

    A layer's input is quantised a row at a time as it comes, so nothing is calibrated. Convolutions, the head and
    layers that a GPU's int8 product does not take, whose sides are no multiples of 8, stay float32. Made for GPUs and
    run on CPUs alone so far: no GPU was there to try it on. model: a `Normalised`; it is left as it is. Raises
    ValueError where there is no linear layer to quantise.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    found: Any = copy.deepcopy(model)
    chosen = set(_linear(found))
    if not chosen:
        raise ValueError(
            "an int8 .pt2 must have linear layers beside its head to quantise, got a network with none; "
            "export int8 as .onnx."
        )
    layers = sum(isinstance(one, (nn.Linear, nn.Conv2d)) for one in found.modules())
    quantize_(found, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: module in chosen)
    return found, {COMPUTED: len(chosen), STORED: 0, FLOAT: layers - len(chosen)}


def _linear(model: Any) -> Iterator[nn.Module]:
    head = model.model.get_classifier()
    for one in model.modules():
        large = isinstance(one, nn.Linear) and one is not head and one.weight.numel() >= SMALLEST
        if large and not any(side % 8 for side in one.weight.shape):
            yield one
