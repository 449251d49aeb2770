"""A classifier as one file: ONNX, `torch.export` (.pt2), or int8 as either, checked against its original.

Everything but the resizing is inside the graph: pixels go in as an image decoder gives them, probabilities come out.
int8 as ONNX is for CPUs and calibrated on training images, as .pt2 for GPUs by torchao: see `factory.models.int8`.

    B images  S side in pixels  K classes
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from factory.models import int8
from factory.progress import Stopped

OPSET = 20  # what the mobile builds of ONNX Runtime from 1.17 on read
METADATA = "metadata.json"  # inside a .pt2
INPUT, OUTPUT = "images", "probabilities"
SUFFIXES = {"onnx": (".onnx",), "pt2": (".pt2",), "int8": (".onnx", ".pt2")}
APART = 4  # of the calibration images one in so many is kept from the ranges, to choose by

Pixels = NDArray[np.generic]
Answer = Callable[[Pixels], NDArray[np.float32]]


@dataclass(frozen=True)
class Bound:
    """How far an exported model may be from its original on real images: the largest difference of a probability, and
    the least share of images with the same verdict."""

    max_difference: float
    min_agreement: float


# Derived, stated by no paper. Float formats differ by the order of sums alone. Eight bits may cost two points of
# verdicts; with fewer than 50 images that is none at all. Of their probabilities the largest difference measured on
# fitted students was 0.08; quantisations that changed a tenth of the verdicts and more had 0.2 at least.
BOUNDS = {"onnx": Bound(1e-4, 0.99), "pt2": Bound(1e-4, 0.99), "int8": Bound(0.15, 0.98)}


class ExportDiffers(Stopped):
    """An exported model that does not answer as its original does; nothing was written."""


class PixelsIn(nn.Module):
    """A classifier with a decoder's pixels for input: uint8 (B, S, S, 3), or float32 (B, 3, S, S) in [0, 1].

    model: pixels (B, 3, S, S) in [0, 1] -> logits (B, K). Returns probabilities (B, K).
    """

    def __init__(self, model: nn.Module, uint8: bool) -> None:
        super().__init__()
        self.model, self.uint8 = model.eval(), uint8

    def forward(self, images: Tensor) -> Tensor:
        if self.uint8:
            images = images.permute(0, 3, 1, 2).float() / 255  # (B, 3, S, S)
        return self.model(images).softmax(dim=1)  # (B, K)


def as_input(pixels: NDArray[np.uint8], uint8: bool) -> Pixels:
    """Pixels (B, S, S, 3) uint8 as the graph takes them."""
    return pixels if uint8 else np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def export(
    model: nn.Module,
    kind: str,
    path: Path,
    image_size: int,
    metadata: Mapping[str, Any],
    *,
    uint8: bool = True,
    calibration: NDArray[np.uint8] | None = None,
) -> dict[str, Any]:
    """Writes a classifier as `onnx`, `pt2` or `int8`, with any batch size and the metadata inside, and returns that.

    model: as `PixelsIn` takes it. path: an int8 that ends in .pt2 is torchao's, for GPUs. metadata: JSON values; they
    are strings in ONNX, one JSON file in a .pt2; int8 adds `layers`, how many are computed or stored in eight bits.
    calibration: (N, S, S, 3) uint8, for int8 ONNX alone. Raises ValueError for one without any, and where the packages
    of the extra `export` are not installed.
    """
    example = torch.from_numpy(as_input(np.zeros((2, image_size, image_size, 3), np.uint8), uint8))
    known = dict(metadata)
    if kind == "int8" and path.suffix == ".pt2":
        needs("torchao")
        model, known["layers"] = int8.quantised(model)
    if kind == "pt2" or path.suffix == ".pt2":
        _save_pt2(PixelsIn(model, uint8), example, path, known)
        return known
    needs("onnx", "onnxscript")
    if kind == "onnx":
        _save_onnx(PixelsIn(model, uint8), example, path)
    else:
        needs("onnxruntime")
        if calibration is None or not len(calibration):
            raise ValueError("int8 must be calibrated on training images, got none; ingest some, or export onnx.")
        known["layers"] = _save_int8(PixelsIn(model, uint8), example, path, as_input(calibration, uint8))
    _describe(path, known)
    return known


def needs(*packages: str) -> None:
    """Raises ValueError where one is not installed."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"this export must have {', '.join(packages)} installed, got no {', '.join(missing)}; "
            "install dermafactory[export], or export pt2."
        )


def _program(module: PixelsIn, example: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},))


def _save_pt2(module: PixelsIn, example: Tensor, path: Path, metadata: Mapping[str, Any]) -> None:
    torch.export.save(_program(module, example), path, extra_files={METADATA: json.dumps(metadata, sort_keys=True)})


def _save_onnx(module: PixelsIn, example: Tensor, path: Path) -> None:
    with torch.no_grad(), _quiet():
        program: Any = torch.onnx.export(
            module, (example,), dynamo=True, opset_version=OPSET, verbose=False, input_names=[INPUT],
            output_names=[OUTPUT], dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )  # fmt: skip
    program.save(str(path), external_data=False)


def _save_int8(module: PixelsIn, example: Tensor, path: Path, calibration: Pixels) -> dict[str, int]:
    """The first of the schemes whose verdicts are within the bound, on images that gave it no ranges; the last where
    none is, for the check on validation images to refuse. Returns how many layers are of each sort."""
    apart = np.arange(len(calibration)) % APART == APART - 1
    with tempfile.TemporaryDirectory() as folder, _quiet():
        whole, folded = (Path(folder) / name for name in ("float.onnx", "folded.onnx"))
        _save_onnx(module, example, whole)
        int8.fold(whole, folded)
        before: dict[str, int] = {}
        for computed, smallest in int8.SCHEMES:
            layers = int8.quantise(folded, path, calibration[~apart], computed, smallest)
            unseen = calibration[apart] if layers[int8.COMPUTED] else calibration  # what is only stored took no ranges
            if layers != before and within(compared(opened(folded), opened(path), unseen), BOUNDS["int8"]):
                break
            before = layers
        return layers


def _describe(path: Path, metadata: Mapping[str, Any]) -> None:
    import onnx

    stored = onnx.load(str(path))
    written = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    onnx.helper.set_model_props(stored, written)
    onnx.checker.check_model(stored)
    onnx.save(stored, str(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of their own insides (passes skipped, norms that have no second axis); what matters is checked
    on images afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ------------------------------------------------------------------------------------------------------ its answers


def original(model: nn.Module, uint8: bool) -> Answer:
    """The answers of the model that is exported: inputs as the graph takes them -> probabilities (B, K)."""
    module = PixelsIn(model, uint8)

    def answer(pixels: Pixels) -> NDArray[np.float32]:
        with torch.no_grad():
            return np.asarray(module(torch.from_numpy(pixels)))

    return answer


def opened(path: Path, threads: int = 1) -> Answer:
    """The answers of an exported file: inputs -> probabilities (B, K), on the CPU. An int8 .pt2 wants torchao installed
    and imports it itself."""
    if path.suffix == ".pt2":
        program = torch.export.load(path).module()

        def answer(pixels: Pixels) -> NDArray[np.float32]:
            with torch.no_grad():
                return np.asarray(program(torch.from_numpy(pixels)))

        return answer
    needs("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: np.asarray(session.run([OUTPUT], {INPUT: pixels})[0])


def compared(first: Answer, second: Answer, pixels: Pixels, batch: int = 32) -> dict[str, float | int]:
    """How two models differ on the same inputs: the largest difference of a probability (infinite where one is not a
    number) and the share of images with the same verdict."""
    worst, same = 0.0, 0
    for start in range(0, len(pixels), batch):
        one, other = (answer(pixels[start : start + batch]) for answer in (first, second))
        gap = float(np.abs(one - other).max())
        worst = max(worst, gap if np.isfinite(gap) else float("inf"))
        same += int((one.argmax(1) == other.argmax(1)).sum())
    return {"num_images": len(pixels), "max_difference": worst, "agreement": same / max(1, len(pixels))}


def within(found: Mapping[str, float | int], bound: Bound) -> bool:
    """Whether a comparison is in bounds."""
    return found["max_difference"] <= bound.max_difference and found["agreement"] >= bound.min_agreement


def check(found: Mapping[str, float | int], bound: Bound, kind: str) -> None:
    """Raises ExportDiffers with both figures where a comparison is out of bounds, and ValueError without images."""
    if not found["num_images"]:
        raise ValueError("an export must be checked on validation images, got none; raise corpus.val_share.")
    if not within(found, bound):
        raise ExportDiffers(
            f"the {kind} model must give probabilities within {bound.max_difference:g} of the original's and the same "
            f"verdict on {bound.min_agreement:.0%} of images, got a difference of {found['max_difference']:.3g} and "
            f"{found['agreement']:.1%} on {found['num_images']} validation images; export onnx, or fit longer: "
            "close verdicts change first."
        )


def latency(answer: Answer, image: Pixels, runs: int = 50) -> dict[str, float | int]:
    """Milliseconds of one image (1, ...): the median and the 95th percentile of `runs` after five unmeasured ones."""
    for _ in range(5):
        answer(image)
    taken = []
    for _ in range(runs):
        started = time.perf_counter()
        answer(image)
        taken.append(1000 * (time.perf_counter() - started))
    return {"runs": runs, "median_ms": float(np.median(taken)), "p95_ms": float(np.percentile(taken, 95))}
