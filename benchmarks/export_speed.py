"""int8 against float32 under ONNX Runtime on a CPU, for a ViT student and EfficientNet-B0, and the operations of three
networks of DerMAE's table.

Agreement is that of students fitted on ISIC 2017's training images (as `phone_env.py` fits its own, both by one
teacher) with the torch models on its validation images. Latency is of one image of 224 px on one thread, both kinds in
turn, of the same students at that size.

    python benchmarks/export_speed.py --isic2017 PATH [--steps 300] [--runs 30]      # wants dermafactory[export]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from phone_env import labelled, read, student_of
from torch import nn

from factory.models import export
from factory.models.classifier import build_classifier
from factory.models.student import cost_at

STUDENTS = ("vit_tiny_patch16_224", "efficientnet_b0")
NETWORKS = ("efficientnet_b0", "vit_base_patch16_224", "vit_huge_patch14_224")
CLASSES, SIDE = 7, 224  # of what is timed and counted
DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")
GOALS = {"efficientnet_gflops": 0.8, "agreement": 0.98, "vit_speedup": 1.5}


def instructions() -> list[str]:
    """The processor's 8-bit dot products, as Linux names them."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return [name for name in DOT_PRODUCTS if name in words]


def agreeing(model: nn.Module, calibration: np.ndarray, held_out: np.ndarray, folder: Path) -> dict[str, Any]:
    """How a fitted student's files answer on pictures that no fit has seen, and what is in eight bits."""
    found: dict[str, Any] = {}
    for kind in ("onnx", "int8"):
        path = folder / f"fitted-{kind}.onnx"
        written = export.export(model, kind, path, held_out.shape[1], {}, calibration=calibration)
        same = export.compared(export.original(model, True), export.opened(path), held_out)
        found[kind] = {"layers": written.get("layers"), "bytes": path.stat().st_size, **same}
    return found


def at_size(name: str, fitted: nn.Module, size: int) -> nn.Module:
    """The fitted student at another size: positions of a ViT are interpolated, all else is the same."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    own: Any = fitted
    state = own.model.state_dict()
    model = build_classifier(name, own.model.num_classes, size)
    model.model.load_state_dict(checkpoint_filter_fn(state, model.model) if "pos_embed" in state else state)
    return model


def timed(
    name: str, fitted: nn.Module, calibration: np.ndarray, asked: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Milliseconds of one image at the usual size."""
    model, answers = at_size(name, fitted, asked.size), {}
    found: dict[str, Any] = {"onnx": {"rounds": []}, "int8": {"rounds": []}}
    for kind in found:
        path = folder / f"{name}-{kind}.onnx"
        written = export.export(model, kind, path, asked.size, {}, calibration=calibration)
        answers[kind] = export.opened(path)
        found[kind] |= {"layers": written.get("layers"), "bytes": path.stat().st_size}
    for turn in range(asked.rounds):
        for kind in ("onnx", "int8") if turn % 2 else ("int8", "onnx"):
            found[kind]["rounds"].append(export.latency(answers[kind], calibration[:1], asked.runs)["median_ms"])
    for kind in answers:
        found[kind]["median_ms"] = float(np.median(found[kind]["rounds"]))
    return found | {"speedup": found["onnx"]["median_ms"] / found["int8"]["median_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isic2017", type=Path, required=True)
    parser.add_argument("--size", type=int, default=SIDE, help="px of what is timed")
    parser.add_argument("--fit-size", type=int, default=96, help="px of what is fitted and compared")
    parser.add_argument("--steps", type=int, default=300, help="of each of the four fits")
    parser.add_argument("--train", type=int, default=2000, help="training images at most")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/export_speed.json"))
    asked = parser.parse_args()
    export.needs("onnx", "onnxscript", "onnxruntime")
    torch.set_num_threads(1)
    paths, labels = labelled(asked.isic2017, "Training")
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(asked.train, len(paths))).astype(int))
    pixels, truth = read([paths[row] for row in chosen], asked.fit_size), [labels[row] for row in chosen]
    shown, expected = labelled(asked.isic2017, "Validation")
    held_out, usual = read(shown, asked.fit_size), read(paths[:64], asked.size)
    calibration = pixels[:: max(1, len(pixels) // 128)]
    students: dict[str, Any] = {}
    flops = {name: cost_at(name, CLASSES, SIDE) for name in NETWORKS}
    with tempfile.TemporaryDirectory() as folder:
        for name in STUDENTS:
            model = student_of(name, pixels, truth, asked.steps, Path(folder))
            verdicts = export.original(model, True)(held_out).argmax(1)
            students[name] = {
                "fitted": agreeing(model, calibration, held_out, Path(folder)),
                "accuracy": float(np.mean(verdicts == expected)), **timed(name, model, usual, asked, Path(folder)),
            }  # fmt: skip
    import onnxruntime

    vit, small = (students[name] for name in STUDENTS)
    reached = {
        "efficientnet_gflops": flops["efficientnet_b0"].flops / 1e9,
        "agreement": min(one["fitted"]["int8"]["agreement"] for one in (vit, small)), "vit_speedup": vit["speedup"],
    }  # fmt: skip
    result = {
        "size": asked.size, "fit_size": asked.fit_size, "steps": asked.steps, "num_train": len(pixels),
        "num_validation": len(held_out), "runs": asked.runs, "rounds": asked.rounds,
        "processor": platform.machine(), "int8_dot_products": instructions(), "onnxruntime": onnxruntime.__version__,
        "students": students, "reached": reached, "goal": GOALS,
        "operations_at_224": {
            name: {"gflops": one.flops / 1e9, "params": one.params} for name, one in flops.items()
        },
    }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    met = reached["efficientnet_gflops"] <= GOALS["efficientnet_gflops"]
    met &= reached["agreement"] >= GOALS["agreement"]
    sys.exit(0 if met and (reached["vit_speedup"] >= GOALS["vit_speedup"] or not instructions()) else 1)


if __name__ == "__main__":
    main()
