"""A fitted classifier as a file for a phone, checked on the run's own images, with its card beside it.

FILE                 ONNX or .pt2, in float or int8; class names and digests are inside too
FILE.card.json       what it is, what it was made of, what it costs, how far it is from its original
FILE.md              the same, to read
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from factory import images, records, taxonomy
from factory.fits.card import digest_of
from factory.fits.classifiers import load_classifier
from factory.fits.examples import image_bytes, training_rows, with_images
from factory.fits.objective import evenly
from factory.models import export, int8
from factory.models.classifier import is_vit
from factory.models.student import cost, cost_at
from factory.run import Run

FORMATS = tuple(export.BOUNDS)
CALIBRATION, CHECKED = 256, 512  # images at most
USUAL_SIZE = 224  # px that published costs are counted at

Echo = Callable[[str], None]


def export_weights(
    run: Run,
    name: str,
    kind: str,
    out: Path,
    *,
    uint8: bool = True,
    echo: Echo = print,
    bound: export.Bound | None = None,
) -> Path:
    """Exports weights of a run as `onnx`, `pt2` or `int8` and returns the file. The suffix says for what int8 is: .onnx
    for CPUs, .pt2 for GPUs.

    name: of weights, or of a fit that has one. bound: for other bounds than `export.BOUNDS`. Raises ExportDiffers, and
    writes nothing, where it answers otherwise than its original on validation images.
    """
    bound = bound or export.BOUNDS[taxonomy.check(kind, FORMATS, "--format")]
    if out.suffix not in export.SUFFIXES[kind]:
        raise ValueError(
            f"--out must end in {' or '.join(export.SUFFIXES[kind])} for {kind}, got {out.name}; rename it."
        )
    name = _weights_named(run, name)
    card = run.card(name)
    size, model = int(card["image_size"]), load_classifier(run.weights_dir(name))
    corpus = run.table("corpus").read(["image", "diagnosis", "split", "outcome"])
    held_out, known = (
        _pixels(_validation_rows(corpus), size, CHECKED),
        _metadata(run, name, card, kind, out.suffix, uint8),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
        staged = Path(folder) / out.name
        calibration = (
            _pixels(training_rows(corpus), size, CALIBRATION) if (kind, out.suffix) == ("int8", ".onnx") else None
        )
        known = export.export(model, kind, staged, size, known, uint8=uint8, calibration=calibration)
        given = export.as_input(held_out, uint8)
        answer = export.opened(staged)
        found = export.compared(export.original(model, uint8), answer, given)
        export.check(found, bound, kind)
        fields = known | {
            "bytes": staged.stat().st_size, "digest": digest_of(staged), "checked": found, "bound": asdict(bound),
            "latency": _latency(answer, given[:1], out.suffix), "cost": _costs(model, card, size),
            "num_calibration": 0 if calibration is None else len(calibration),
        }  # fmt: skip
        os.replace(staged, out)
    out.with_name(f"{out.name}.card.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    out.with_name(f"{out.name}.md").write_text(card_text(fields))
    echo(
        f"export      {name} as {kind}: {fields['bytes']:,} bytes, probabilities within {found['max_difference']:.2g}, "
        f"{found['agreement']:.1%} same verdicts on {found['num_images']} images, "
        f"{fields['latency']['median_ms']:.2f} ms"
    )
    return out


def _weights_named(run: Run, name: str) -> str:
    """Weights by their name, or by their fit's where that has one; ValueError for others and for no classifier."""
    of_fit = [known for known in run.weights() if known.startswith(f"{name}-")]
    name = of_fit[0] if name not in run.weights() and len(of_fit) == 1 else name
    if "classes" not in run.card(name) or "image_size" not in run.card(name):
        raise ValueError(f"an export must be of a classifier, got {name}; make one with `factory fit distill`.")
    return name


def _metadata(run: Run, name: str, card: dict[str, Any], kind: str, suffix: str, uint8: bool) -> dict[str, Any]:
    """What a user of the file needs, and what it was made of."""
    layout = "uint8 RGB (B, S, S, 3)" if uint8 else "float32 RGB (B, 3, S, S) in [0, 1]"
    made_of = card.get("inputs", {}).get("tables", {})
    return {
        "name": name, "format": kind, "architecture": card["architecture"], "classes": card["classes"],
        "image_size": card["image_size"], "input": layout, "output": "probabilities (B, K)",
        "opset": None if suffix == ".pt2" else export.OPSET, "weights_digest": card["digest"],
        "tables": made_of, "licence": card.get("licence", "unknown"),
        "num_real": card.get("num_real"), "num_synthetic": card.get("num_synthetic"),
    }  # fmt: skip


def _validation_rows(corpus: pa.Table) -> pa.Table:
    return with_images(corpus.filter(records.accepted("val")))


def _pixels(rows: pa.Table, size: int, most: int) -> NDArray[np.uint8]:
    """Images (N, S, S, 3) uint8 as the classifier was fitted on them: at most so many, evenly over the table."""
    encoded = image_bytes(rows.take(pa.array(evenly(len(rows), most))))
    found = [images.resized(images.read_png(one), size, size) for one in encoded]
    return np.stack(found) if found else np.zeros((0, size, size, 3), np.uint8)


def _latency(answer: export.Answer, image: export.Pixels, suffix: str) -> dict[str, Any]:
    import torch

    if suffix == ".pt2":
        return {"runtime": f"torch {torch.__version__}, {torch.get_num_threads()} threads"} | export.latency(
            answer, image
        )
    import onnxruntime

    return {"runtime": f"onnxruntime {onnxruntime.__version__}, 1 thread"} | export.latency(answer, image)


def _costs(model: Any, card: dict[str, Any], size: int) -> list[dict[str, int]]:
    """Parameters and operations of one image at the model's own size and at the usual one."""
    options = {"patch_size": model.model.patch_embed.patch_size[0]} if is_vit(card["architecture"]) else {}
    usual = cost_at(card["architecture"], len(card["classes"]), USUAL_SIZE, **options)
    return [asdict(cost(model, size)), *([] if size == USUAL_SIZE else [asdict(usual)])]


def _eight_bits(card: dict[str, Any]) -> list[str]:
    """What is in eight bits, as lines of the card; none for float formats."""
    if "layers" not in card:
        return []
    count = card["layers"]
    lines = [
        f"- int8: {count[int8.COMPUTED]} linear layers computed in eight bits, {count[int8.STORED]} layers whose "
        f"weights are stored in eight bits and computed in float32, {count[int8.FLOAT]} layers in float32"
    ]
    if card["opset"] is None:
        lines.append(
            "- made for GPUs by torchao, which must be installed to load it; checked on a CPU, tried on no GPU"
        )
    return lines


def card_text(card: dict[str, Any]) -> str:
    """The card as Markdown."""
    checked, bound, speed = card["checked"], card["bound"], card["latency"]
    costs = [
        f"| {one['image_size']} px | {one['params']:,} | {one['flops'] / 1e9:.3f} GFLOPs |" for one in card["cost"]
    ]
    tables = [f"- table `{name}`: `{digest}`" for name, digest in sorted(card["tables"].items())]
    return "\n".join([
        f"# {card['name']} ({card['format']})",
        "",
        f"{card['architecture']}, {len(card['classes'])} classes: {', '.join(card['classes'])}. A research model "
        "fitted on skin-lesion images; not a medical device, and not for use on patients.",
        "",
        f"- input: {card['input']}, S = {card['image_size']} px, any batch size; normalised inside",
        f"- output: {card['output']}",
        f"- file: {card['bytes']:,} bytes, sha256 `{card['digest']}`",
        f"- weights: `{card['weights_digest']}`, licence {card['licence']}",
        f"- fitted on {card['num_real']} real and {card['num_synthetic']} synthetic images",
        *tables,
        *_eight_bits(card),
        f"- checked on {checked['num_images']} validation images: probabilities differ by at most "
        f"{checked['max_difference']:.3g} (bound {bound['max_difference']:g}), {checked['agreement']:.1%} same "
        f"verdicts (bound {bound['min_agreement']:.0%})",
        f"- one image on a CPU: median {speed['median_ms']:.2f} ms, p95 {speed['p95_ms']:.2f} ms over {speed['runs']} "
        f"runs ({speed['runtime']})",
        "",
        "| size | parameters | operations, two per multiply-add |",
        "|---|---|---|",
        *costs,
        "",
    ])  # fmt: skip
