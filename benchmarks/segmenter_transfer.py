"""Are phantoms a toy? A segmenter trained on phantoms alone, judged on real lesions it has never seen.

The same network, steps and augmentation on the real training split stand beside it, and two peers that learn nothing:
a centred disk of the mean size, and Otsu's threshold. Judged on the ISIC 2017 validation masks by mean Dice.

    python benchmarks/segmenter_transfer.py --isic2017 PATH [--steps 1500] [--work runs/segmenter_transfer]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from factory.fits.loop import train
from factory.fits.segmenter import FitSegmenter, PhantomPairs, StoredPairs
from factory.quality.overlap import dice
from factory.recipe import FitSection

SIZE = 96
VALIDATION = ("ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth")
TRAINING = ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth")


def real_pairs(root: Path, folders: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, S, S, 3) uint8 RGB and masks (N, S, S) uint8, at SIZE."""
    images, masks = [], []
    for path in sorted((root / folders[0]).glob("*.jpg")):
        mask = cv2.imread(str(root / folders[1] / f"{path.stem}_segmentation.png"), cv2.IMREAD_GRAYSCALE)
        images.append(cv2.resize(cv2.imread(str(path))[:, :, ::-1], (SIZE, SIZE), interpolation=cv2.INTER_AREA))
        masks.append(cv2.resize(mask, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
    return np.stack(images), np.stack(masks)


@torch.inference_mode()
def predicted(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """(N, S, S) bool, the mean of four flips."""
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    total = torch.zeros(len(images), SIZE, SIZE)
    for dims in ((), (2,), (3,), (2, 3)):
        logits = torch.cat([model(batch.flip(dims)).flip(dims) for batch in pixels.split(25)])
        total += logits[:, 0].sigmoid()
    return (total / 4 > 0.5).numpy()


def disk(masks: np.ndarray) -> np.ndarray:
    radius = np.sqrt((masks > 127).mean() * SIZE**2 / np.pi)
    ys, xs = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    return np.repeat((np.hypot(ys, xs) <= radius)[None], len(masks), axis=0)


def otsu(images: np.ndarray) -> np.ndarray:
    grey = [cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (5, 5), 0) for image in images]
    return np.stack([cv2.threshold(g, 0, 255, cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU)[1] > 0 for g in grey])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isic2017", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--work", type=Path, default=Path("runs/segmenter_transfer"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/segmenter_transfer.json"))
    args = parser.parse_args()
    images, masks = real_pairs(args.isic2017, VALIDATION)
    truth = masks > 127
    section = FitSection(
        steps=args.steps, batch_size=16, learning_rate=2e-3, warmup_steps=50, schedule="cosine", weight_decay=1e-4,
        ema_decay=0.99, checkpoint_every=100,
    )  # fmt: skip
    arms = {
        "phantoms": PhantomPairs(seed=11, count=args.steps * 16, size=SIZE),
        "real": StoredPairs(*real_pairs(args.isic2017, TRAINING)),
    }
    scores = {"centred_disk": dice(disk(masks), truth), "otsu": dice(otsu(images), truth)}
    minutes = {}
    for name, rows in arms.items():
        started = time.monotonic()
        model = train(FitSegmenter(rows), section, args.work / name).eval()
        minutes[name] = round((time.monotonic() - started) / 60, 1)
        found = predicted(model, images)
        scores[name] = dice(found, truth)
        np.save(args.work / f"{name}.npy", found)
    result = {
        "size": SIZE, "images": len(images), "steps": args.steps, "minutes": minutes,
        "mean_dice": {name: round(float(np.mean(values)), 4) for name, values in scores.items()},
        "median_dice": {name: round(float(np.median(values)), 4) for name, values in scores.items()},
        "phantoms_over_real": round(float(np.mean(scores["phantoms"]) / np.mean(scores["real"])), 4),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
