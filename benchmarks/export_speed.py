"""int8 against float32 under ONNX Runtime on a CPU, for a ViT student and EfficientNet-B0, and the operations of three
networks of DerMAE's table.

The networks have random weights: batch norms are averaged over phantoms and heads scaled, so that verdicts differ from
image to image. Speed does not depend on weights; agreement does, and close verdicts of random networks flip more easily
than those of fitted ones. Latency is of one image on one thread, both kinds in turn.

    python benchmarks/export_speed.py [--size 224] [--images 64] [--runs 30]      # wants dermafactory[export]
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
from torch import nn

from factory import images as pictures
from factory import phantom
from factory.models import export
from factory.models.classifier import build_classifier
from factory.models.student import cost_at

STUDENTS = ("vit_tiny_patch16_224", "efficientnet_b0")
NETWORKS = ("efficientnet_b0", "vit_base_patch16_224", "vit_huge_patch14_224")
CLASSES, SIDE = 7, 224
DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp")
GOALS = {"efficientnet_gflops": 0.8, "agreement": 0.98, "vit_speedup": 1.5}


def telling(name: str, pixels: np.ndarray, size: int) -> nn.Module:
    """A random classifier whose verdicts differ from image to image."""
    torch.manual_seed(0)
    model = build_classifier(name, CLASSES, size)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        model.train()
        for _ in range(10):
            model(images)
        model.eval()
        head = model.model.get_classifier()
        logits = model(images)
        scale = 2.0 / logits.std(0)
        head.weight.mul_(scale[:, None])
        head.bias.mul_(scale)
        head.bias.sub_(model(images).mean(0))
    return model


def instructions() -> list[str]:
    """The processor's 8-bit dot products, as Linux names them."""
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    return [name for name in DOT_PRODUCTS if name in words]


def measured(name: str, pixels: np.ndarray, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    calibration, held_out = pixels[: len(pixels) // 2], pixels[len(pixels) // 2 :]
    model = telling(name, calibration, asked.size)
    answers, found = {}, {}
    for kind in ("onnx", "int8"):
        path = folder / f"{name}-{kind}.onnx"
        given = calibration if kind == "int8" else None
        export.export(model, kind, path, asked.size, {"name": name}, uint8=True, calibration=given)
        answers[kind] = export.opened(path)
        found[kind] = {"bytes": path.stat().st_size, "rounds": []}
    for turn in range(asked.rounds):
        for kind in ("onnx", "int8") if turn % 2 else ("int8", "onnx"):
            found[kind]["rounds"].append(export.latency(answers[kind], held_out[:1], asked.runs)["median_ms"])
    for kind in answers:
        found[kind]["median_ms"] = float(np.median(found[kind]["rounds"]))
        found[kind] |= export.compared(export.original(model, True), answers[kind], held_out)
    return found | {"speedup": found["onnx"]["median_ms"] / found["int8"]["median_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=SIDE)
    parser.add_argument("--images", type=int, default=64, help="half calibrate, half are compared")
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/export_speed.json"))
    asked = parser.parse_args()
    export.needs("onnx", "onnxscript", "onnxruntime")
    torch.set_num_threads(1)
    drawn = [phantom.draw(3, number, 128).image for number in range(asked.images)]
    pixels = np.stack([pictures.resized(one, asked.size, asked.size) for one in drawn])
    flops = {name: cost_at(name, CLASSES, SIDE) for name in NETWORKS}
    with tempfile.TemporaryDirectory() as folder:
        students = {name: measured(name, pixels, asked, Path(folder)) for name in STUDENTS}
    import onnxruntime

    vit, small = (students[name] for name in STUDENTS)
    reached = {
        "efficientnet_gflops": flops["efficientnet_b0"].flops / 1e9,
        "agreement": min(vit["int8"]["agreement"], small["int8"]["agreement"]), "vit_speedup": vit["speedup"],
    }  # fmt: skip
    result = {
        "size": asked.size, "compared": len(pixels) // 2, "runs": asked.runs, "rounds": asked.rounds,
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
