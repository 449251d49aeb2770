"""Two workers of a fit against one: the loss of every log line, and the rows that each step saw.

    python benchmarks/fit_workers.py

A LoRA of the starter on 64 phantoms, 40 steps of a global batch of 8, on Ray Train: once on one worker, once on two
(gloo), and once begun on two, which fall at step 14 for good, and gone on with on one from their last checkpoint.
Writes results/fit_workers.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from factory import images, phantom
from factory.fits.joint import FitLora
from factory.models.weights import STARTER
from factory.recipe import LoraSection
from factory.runtime import cluster, train

RESULT = Path(__file__).parent / "results/fit_workers.json"
SECTION = LoraSection(steps=40, batch_size=8, rank=4, warmup_steps=4, checkpoint_every=10, learning_rate=5e-4)


class Noting:
    """FitLora whose rows are noted, a line per step and worker; from line `fall_at` on it falls."""

    def __init__(self, diary: Path, fall_at: int | None = None) -> None:
        drawn = [phantom.draw(11, index, 64) for index in range(64)]
        pictures, masks = [images.encode_png(p.image) for p in drawn], [images.encode_mask(p.mask) for p in drawn]
        self.inner = FitLora(
            STARTER, pictures, masks, [f"a dermoscopic image of a {p.diagnosis}" for p in drawn], SECTION, 64
        )
        self.diary, self.fall_at = diary, fall_at
        self.examples = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner.examples)

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        return self.inner.examples.batch(indices) | {"row": torch.from_numpy(np.asarray(indices))}

    def loss(self, model: Any, batch: dict[str, Any], noise: Any) -> dict[str, Any]:
        rows = batch.pop("row").tolist()
        with self.diary.open("a") as out:
            out.write(json.dumps(rows) + "\n")
        if self.fall_at is not None and len(self.diary.read_text().splitlines()) >= self.fall_at:
            raise RuntimeError("the machine is gone")
        return self.inner.loss(model, batch, noise)


def fitted(folder: Path, workers: int, fall_at: int | None = None) -> tuple[list[dict[str, float]], str]:
    """The curve, and a digest of how often each row was seen."""
    section = SECTION.model_copy(update={"num_workers": workers})
    diary = folder / "diary"
    folder.mkdir(parents=True, exist_ok=True)
    train.fit(partial(Noting, diary, fall_at), section, folder / "fit")
    curve = [json.loads(line) for line in (folder / "fit/metrics.jsonl").read_text().splitlines()]
    seen = np.bincount([row for line in diary.read_text().splitlines() for row in json.loads(line)], minlength=64)
    return curve, hashlib.sha256(seen.tobytes()).hexdigest()[:16]


def _step_s(curve: list[dict[str, float]]) -> float:
    return float(np.median([row["step_s"] for row in curve]))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch, cluster.connect():
        one, seen_by_one = fitted(Path(scratch) / "one", 1)
        two, seen_by_two = fitted(Path(scratch) / "two", 2)
        try:
            fitted(Path(scratch) / "fallen", 2, fall_at=2 * 14)
        except Exception as error:  # Ray Train's own, after its last try
            print(f"fell as it was to: {type(error).__name__}")
        fallen, _ = fitted(Path(scratch) / "fallen", 1)
    result = {
        "steps": SECTION.steps, "batch_size": SECTION.batch_size,
        "largest_difference_of_loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two, strict=True)),
        "largest_difference_of_loss_begun_on_two_ended_on_one": max(
            abs(a["loss"] - b["loss"]) for a, b in zip(one, fallen, strict=True)
        ),
        "same_rows_seen": seen_by_one == seen_by_two,
        "first_and_last_loss": [one[0]["loss"], one[-1]["loss"]],
        "step_s": {"one": _step_s(one), "two": _step_s(two)},
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
