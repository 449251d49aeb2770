"""The exported student in an environment without torch: `examples/phone.py` on the ISIC 2017 validation images.

A tiny ViT is pre-trained on the training images for some steps, teaches a small CNN, and the CNN is exported as ONNX
and as int8. Another Python, which has onnxruntime, Pillow and NumPy and no torch, then classifies every validation
picture from its JPEG file. Its verdicts are compared with the torch model's, whose pictures the factory decoded and
resized. What the file itself changes and what resizing changes are told apart: the file is also asked about the very
pixels of the torch model, and the torch model about pixels that are off by at most one of 255.

    uv venv /tmp/phone-env && uv pip install --python /tmp/phone-env/bin/python onnxruntime pillow numpy
    python benchmarks/phone_env.py --isic2017 PATH --python /tmp/phone-env/bin/python      # wants dermafactory[export]
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from factory import images as pictures
from factory.fits.distill import DistillObjective
from factory.fits.examples import ImageExamples
from factory.fits.loop import train
from factory.fits.mae import MaeObjective
from factory.images import encode_png
from factory.models import export
from factory.recipe import DistillSection, MaeSection

CLASSES = ["melanoma", "nevus", "seborrheic_keratosis"]
STUDENT = "mobilenetv3_small_050"
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "phone.py"
HAS = (
    "import importlib.util as u, importlib.metadata as m, json, sys;"
    "print(json.dumps({'torch': u.find_spec('torch') is not None, 'python': sys.version.split()[0],"
    "'packages': {n: m.version(n) for n in ('onnxruntime', 'pillow', 'numpy')}}))"
)
GOAL = 0.98  # of verdicts


def labelled(root: Path, phase: str) -> tuple[list[Path], list[int]]:
    """The pictures of a phase and their classes; neither flag means a nevus."""
    with (root / f"ISIC-2017_{phase}_Part3_GroundTruth.csv").open() as file:
        rows = {row["image_id"]: row for row in csv.DictReader(file)}
    paths = [path for path in sorted((root / f"ISIC-2017_{phase}_Data").glob("*.jpg")) if path.stem in rows]
    flags = [(float(rows[path.stem]["melanoma"]), float(rows[path.stem]["seborrheic_keratosis"])) for path in paths]
    return paths, [0 if melanoma else 2 if keratosis else 1 for melanoma, keratosis in flags]


def read(paths: list[Path], size: int) -> np.ndarray:
    """Pictures (N, S, S, 3) uint8 as the factory reads and resizes them."""
    decoded = (pictures.decode_rgb(path.read_bytes(), path.name) for path in paths)
    return np.stack([pictures.resized(one, size, size) for one in decoded])


def student_of(name: str, pixels: np.ndarray, labels: list[int], steps: int, folder: Path) -> torch.nn.Module:
    """A student fitted on pictures (N, S, S, 3) uint8. Those of one folder share their encoder and teacher."""
    encoded, size = [encode_png(one) for one in pixels], pixels.shape[1]
    fit = {
        "steps": steps, "batch_size": 32, "warmup_steps": max(1, steps // 10), "checkpoint_every": steps,
        "schedule": "cosine",
    }  # fmt: skip
    masked = MaeSection(**fit, encoder="test_vit", patch_size=8, image_size=size)
    if not (folder / "mae").exists():
        objective = MaeObjective(masked, ImageExamples(encoded, size))
        objective.save(train(objective, masked, folder / "mae-fit"), folder / "mae")
    section = DistillSection(**fit, student=name, teacher_steps=steps)
    rows = ImageExamples(encoded, size, labels, balanced=True)
    distil = DistillObjective(section, folder / "mae", rows, CLASSES, teacher_dir=folder / "teacher")
    pair: Any = train(distil, section, folder / f"{name}-fit")
    found: torch.nn.Module = pair.student.eval()
    return found


def asked_elsewhere(python: Path, model: Path, paths: list[Path]) -> np.ndarray:
    """Probabilities (N, K), printed to a tenth of a percent, of another Python's `examples/phone.py`."""
    command = [str(python), "-I", str(EXAMPLE), str(model), *map(str, paths)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout.splitlines()
    size = len(CLASSES) + 1
    assert len(lines) == size * len(paths), "a name and a line for each class"
    found = np.zeros((len(paths), len(CLASSES)), np.float32)
    for row in range(len(paths)):
        for line in lines[size * row + 1 : size * (row + 1)]:
            share, name = line.split("%")
            found[row, CLASSES.index(name.strip())] = float(share) / 100
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isic2017", type=Path, required=True)
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=800, help="of each of the three fits")
    parser.add_argument("--train", type=int, default=2000, help="training images at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/phone_env.json"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    told = subprocess.run([str(asked.python), "-I", "-c", HAS], capture_output=True, text=True, check=True).stdout
    environment = json.loads(told)
    if environment["torch"]:
        raise SystemExit(f"--python must be of an environment without torch, got {asked.python}; make a fresh one.")
    paths, labels = labelled(asked.isic2017, "Training")
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(asked.train, len(paths))).astype(int))
    shown, truth = labelled(asked.isic2017, "Validation")
    result: dict[str, Any] = {
        "student": STUDENT, "size": asked.size, "steps": asked.steps, "num_train": len(chosen),
        "num_validation": len(shown), "environment": environment, "goal": GOAL,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pixels = read([paths[row] for row in chosen], asked.size)
        model = student_of(STUDENT, pixels, [labels[row] for row in chosen], asked.steps, folder)
        held_out = read(shown, asked.size)
        expected = export.original(model, True)(held_out)
        noise = np.random.default_rng(0).integers(-1, 2, held_out.shape)
        nudged = np.clip(held_out.astype(int) + noise, 0, 255).astype(np.uint8)
        result["torch_on_pixels_off_by_one"] = export.compared(
            lambda given: expected, lambda given: export.original(model, True)(nudged), held_out, len(held_out)
        )
        result["torch_accuracy"] = float(np.mean(expected.argmax(1) == truth))
        known = {"image_size": asked.size, "input": "uint8 RGB (B, S, S, 3)", "classes": CLASSES}
        for kind in ("onnx", "int8"):
            file = folder / f"{kind}.onnx"
            given = pixels[:: max(1, len(pixels) // 128)] if kind == "int8" else None
            written = export.export(model, kind, file, asked.size, known, uint8=True, calibration=given)
            answered = asked_elsewhere(asked.python, file, shown)
            result[kind] = {
                "on_the_same_pixels": export.compared(export.original(model, True), export.opened(file), held_out),
                "agreement": float(np.mean(answered.argmax(1) == expected.argmax(1))),
                "max_difference": float(np.abs(answered - expected).max()),
                "accuracy": float(np.mean(answered.argmax(1) == truth)), "bytes": file.stat().st_size,
                "layers": written.get("layers"),
                "verdicts": np.bincount(answered.argmax(1), minlength=len(CLASSES)).tolist(),
            }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    reached = (result["onnx"]["agreement"], result["int8"]["on_the_same_pixels"]["agreement"])
    sys.exit(0 if min(reached) >= GOAL else 1)


if __name__ == "__main__":
    main()
