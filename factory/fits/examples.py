"""Training rows that are images: encoded bytes decoded when first asked for, kept small, augmented per row.

B rows  S side in pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F

from factory import images, records
from factory.fits.objective import RowNoise


class ImageExamples:
    """Images as `image` (B, 3, S, S) uint8 and, if they have labels, `label` (B,).

    Each is decoded once and kept as uint8 at image_size, which costs 3 S^2 bytes: 12 KB at 64 px. Images that are not
    square are squeezed to it, so that no lesion is cut off. What is kept does not travel: a copy sent to another
    process decodes its own rows. With `balanced`, the passes over the examples show every class equally often.
    """

    def __init__(
        self, encoded: Sequence[bytes], image_size: int, labels: Sequence[int] | None = None, *, balanced: bool = False
    ) -> None:
        self.encoded, self.image_size = list(encoded), image_size
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.also: dict[str, np.ndarray] = {}  # further arrays, a row for each image; `batch` gives theirs
        self.order = np.arange(len(self.encoded))
        if balanced and self.labels is not None:
            self.order = balanced_order(self.labels)
        self._forget()

    def _forget(self) -> None:
        # Empty memory is not committed until a row is written.
        self._pixels = np.empty((len(self.encoded), self.image_size, self.image_size, 3), dtype=np.uint8)
        self._known = np.zeros(len(self.encoded), dtype=bool)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_pixels", "_known")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return len(self.order)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """The rows at these positions of a pass."""
        rows = self.order[indices]
        for row in np.unique(rows[~self._known[rows]]):
            pixels = images.read_png(self.encoded[row])
            self._pixels[row] = images.resized(pixels, self.image_size, self.image_size)
            self._known[row] = True
        found = {"image": torch.from_numpy(self._pixels[rows]).permute(0, 3, 1, 2).contiguous()}  # (B, 3, S, S)
        if self.labels is not None:
            found["label"] = torch.from_numpy(self.labels[rows])
        return found | {name: torch.from_numpy(values[rows]) for name, values in self.also.items()}


def balanced_order(labels: np.ndarray) -> np.ndarray:
    """Row indices in which every class comes up as often as the largest: smaller ones are gone through again.

    Example: labels (0, 0, 0, 1) -> rows (0, 3, 1, 3, 2, 3).
    """
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    most = max((len(rows) for rows in classes), default=0)
    return np.array([rows[turn % len(rows)] for turn in range(most) for rows in classes], dtype=np.int64)


def augment(pixels: Tensor, noise: RowNoise, min_area: float) -> Tensor:
    """A random square crop of at least min_area of each image at its own size, flipped either way or not.

    pixels: (B, 3, S, S) uint8 -> (B, 3, S, S) float in [0, 1]. Colour is left alone: it is evidence.
    """
    u = noise.uniform(5).to(pixels.device)  # (B, 5)
    side = (min_area + (1 - min_area) * u[:, 0]).sqrt()  # (B,)
    shift = (1 - side).unsqueeze(1) * (2 * u[:, 1:3] - 1)  # (B, 2), in half-sides
    sign = torch.where(u[:, 3:5] < 0.5, -1.0, 1.0)  # (B, 2)
    theta = torch.zeros(len(pixels), 2, 3, device=pixels.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = side * sign[:, 0], side * sign[:, 1], shift
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)  # (B, S, S, 2)
    return F.grid_sample(pixels.float() / 255, grid, padding_mode="reflection", align_corners=False)


def training_rows(corpus: pa.Table) -> pa.Table:
    """The accepted rows of the training split that have an image."""
    return with_images(corpus.filter(records.accepted("train")))


def accepted_rows(samples: pa.Table) -> pa.Table:
    """The accepted samples that have an image."""
    return with_images(samples.filter(records.accepted()))


def with_images(table: pa.Table) -> pa.Table:
    """The rows whose image has bytes."""
    return table.filter(pc.is_valid(pc.struct_field(table["image"], "bytes")))


def image_bytes(table: pa.Table, column: str = "image") -> list[bytes]:
    """The encoded bytes of an image column, row by row."""
    found: list[bytes] = pc.struct_field(table[column], "bytes").to_pylist()
    return found
