"""The two learners of the worth experiment, one small loop for both: a timm classifier and a pixel U-Net.

N rows  B batch  S side in pixels
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from factory import images, taxonomy
from factory.models.classifier import build_classifier
from factory.models.segmenter import PixelUNet, dice_bce_loss
from factory.quality.overlap import dice, iou
from factory.recipe import WorthSection

LEARNING_RATE = 1e-3
FOUND_IOU = 0.5  # a lesion is found if one predicted component reaches this IoU with it
UNKNOWN = -1
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """Rows at image_size; `digests` name each row by what a learner sees of it."""

    ids: list[str]
    digests: list[str]
    images: NDArray[np.uint8]  # (N, S, S, 3)
    masks: NDArray[np.bool_]  # (N, S, S), empty where there is none
    malignant: NDArray[np.int64]  # (N,), 1, 0 or UNKNOWN

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: Pictures) -> Pictures:
        return Pictures(
            self.ids + other.ids,
            self.digests + other.digests,
            np.concatenate([self.images, other.images]),
            np.concatenate([self.masks, other.masks]),
            np.concatenate([self.malignant, other.malignant]),
        )


def pictures(table: pa.Table, id_column: str, image_size: int) -> Pictures:
    """The rows of a corpus or samples table that have an image, decoded and squeezed to image_size."""
    columns = ["image", "mask", "diagnosis", id_column] + (["malignant"] if "malignant" in table.column_names else [])
    ids, digests, pixels, masks, malignant = [], [], [], [], []
    for batch in table.select(columns).to_batches(max_chunksize=64):
        for row in batch.to_pylist():
            data = (row["image"] or {}).get("bytes")
            if data is None:
                continue
            outline = (row["mask"] or {}).get("bytes")
            ids.append(row[id_column])
            malignant.append(_malignant(row))
            digests.append(hashlib.sha256(b"|".join([data, outline or b"", b"%d" % malignant[-1]])).hexdigest())
            pixels.append(images.resized(images.read_png(data), image_size, image_size))
            mask = images.read_mask(outline) if outline else np.zeros((image_size, image_size), bool)
            masks.append(images.resized(mask, image_size, image_size))
    side = (len(ids), image_size, image_size)
    return Pictures(
        ids,
        digests,
        np.array(pixels, np.uint8).reshape(*side, 3),
        np.array(masks, bool).reshape(side),
        np.array(malignant, np.int64),
    )


def _malignant(row: dict[str, object]) -> int:
    known = row.get("malignant")
    if known is None and row["diagnosis"] is not None:
        known = taxonomy.is_malignant(str(row["diagnosis"]))
    return UNKNOWN if known is None else int(bool(known))


@dataclass(frozen=True)
class Task:
    """What is learned: which rows can teach it, the network, the loss, and what is measured on held-out rows."""

    name: str
    usable: Callable[[Pictures], NDArray[np.bool_]]
    build: Callable[[WorthSection], nn.Module]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]  # output, masks (B, 1, S, S), malignant (B,)
    measure: Callable[[NDArray[np.float32], Pictures, Rows, float], dict[str, float | None]]


def fit(task: Task, data: Pictures, rows: Rows, section: WorthSection, steps: int, seed: int) -> nn.Module:
    """A network fitted on these rows: a function of its arguments alone.

    Batches draw benign, malignant and unknown rows equally often, each row flipped and transposed at random. AdamW,
    one cosine over the steps.
    """
    rng = np.random.default_rng([seed, 1])
    device = _device()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = task.build(section).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        strata = [rows[data.malignant[rows] == value] for value in np.unique(data.malignant[rows])]
        for _ in range(steps):
            chosen = balanced_draw(rng, strata, section.batch_size)
            pixels, masks = dihedral(rng, data.images[chosen], data.masks[chosen])
            output = model(_as_pixels(pixels, device))
            labels = torch.from_numpy(data.malignant[chosen]).to(device)
            loss = task.loss(output, torch.from_numpy(masks).unsqueeze(1).float().to(device), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def predict(model: nn.Module, data: Pictures, rows: Rows) -> NDArray[np.float32]:
    """The network's raw outputs for these rows, in order."""
    model.eval()
    with torch.no_grad():
        found = [
            model(_as_pixels(data.images[part], _device())).cpu() for part in np.split(rows, range(64, len(rows), 64))
        ]
    return np.asarray(torch.cat(found).numpy())


def balanced_draw(rng: np.random.Generator, strata: list[Rows], count: int) -> Rows:
    """`count` rows with replacement, the strata in turn, so that each has an equal share of every batch."""
    offset = int(rng.integers(len(strata)))
    return np.array([rng.choice(strata[(turn + offset) % len(strata)]) for turn in range(count)])


def dihedral(
    rng: np.random.Generator, pixels: NDArray[np.uint8], masks: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Each image and its mask in one of the square's eight positions: the classical augmentation of every arm."""
    turned, outlines = np.empty_like(pixels), np.empty_like(masks)
    for row, position in enumerate(rng.integers(8, size=len(pixels))):
        image, mask = np.rot90(pixels[row], position % 4), np.rot90(masks[row], position % 4)
        turned[row], outlines[row] = (image[:, ::-1], mask[:, ::-1]) if position >= 4 else (image, mask)
    return turned, outlines


def lesion_found(predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> bool:
    """Whether some connected component of the prediction (H, W) has an IoU of at least 0.5 with the lesion."""
    count, labels = cv2.connectedComponents(predicted.astype(np.uint8), connectivity=8)
    return any(iou(labels == label, true) >= FOUND_IOU for label in range(1, count))


def _as_pixels(batch: NDArray[np.uint8], device: torch.device) -> Tensor:
    return torch.from_numpy(batch).to(device).permute(0, 3, 1, 2).float() / 255  # (B, 3, S, S)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _measure_classes(logits: NDArray[np.float32], data: Pictures, rows: Rows, small: float) -> dict[str, float | None]:
    """AUC and F1 of malignancy at a half; AUC is null where the held-out rows are of one class."""
    from sklearn.metrics import f1_score, roc_auc_score

    labels, scores = data.malignant[rows], logits[:, 1] - logits[:, 0]
    auc = float(roc_auc_score(labels, scores)) if len(np.unique(labels)) == 2 else None
    return {"auc": auc, "f1": float(f1_score(labels, scores > 0, zero_division=0.0))}


def _measure_masks(logits: NDArray[np.float32], data: Pictures, rows: Rows, small: float) -> dict[str, float | None]:
    """Mean Dice, and how many lesions were missed, of all and of those whose area share is at most `small`."""
    predicted, true = logits[:, 0] > 0, data.masks[rows]
    missed = np.array([not lesion_found(p, t) for p, t in zip(predicted, true, strict=True)])
    little = true.mean(axis=(1, 2)) <= small
    return {
        "dice": float(np.mean(dice(predicted, true))),
        "missed": int(missed.sum()), "lesions": len(rows),
        "missed_small": int(missed[little].sum()), "lesions_small": int(little.sum()),
    }  # fmt: skip


CLASSIFY = Task(
    name="classify",
    usable=lambda data: np.asarray(data.malignant != UNKNOWN),
    build=lambda section: build_classifier(section.classifier, 2, section.image_size),
    loss=lambda logits, masks, malignant: F.cross_entropy(logits, malignant),
    measure=_measure_classes,
)
SEGMENT = Task(
    name="segment",
    usable=lambda data: np.asarray(data.masks.any(axis=(1, 2))),
    build=lambda section: PixelUNet(width=16),
    loss=lambda logits, masks, malignant: dice_bce_loss(logits, masks),
    measure=_measure_masks,
)
TASKS: tuple[Task, ...] = (CLASSIFY, SEGMENT)
