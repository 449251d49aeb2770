"""Grids of samples drawn while a fit goes on, and how many of their samples the generator has by heart.

A grid holds the same prompts and seeds at every step, so that two grids differ by what was learned between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.io import encode_png
from torchvision.utils import draw_segmentation_masks, make_grid

from factory import records
from factory.images import read_mask, read_png, resized
from factory.models.weights import is_whole_generator
from factory.quality.duplicates import near_copies, near_copy_threshold, thumbnails
from factory.recipe import Recipe
from factory.stages.plan import sample_rows
from factory.stages.synthesize import SynthesizeSamples

PER_DIAGNOSIS = 4
MAX_TRAINING, MAX_FOR_THRESHOLD = 20_000, 2_000
_SIDE = 64  # px at which copies are looked for


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    """The rows of a grid: PER_DIAGNOSIS of each diagnosis of the plan."""
    return [
        row for diagnosis in recipe.plan.diagnoses
        for row in sample_rows(
            count=PER_DIAGNOSIS, diagnosis=diagnosis, skin_type=None, asymmetry=None, border=None, colors=None,
            section=recipe.plan, seed=0,
        )
    ]  # fmt: skip


class DrawPreview:
    """Draws grids of planned rows from weights that a fit hands over.

    base: the generator that is fitted; family: what it is fitted as; rows: see `rows_of`; training: encoded images that
    the fit learns from, groups: their group ids. Only the first MAX_TRAINING are compared with.
    """

    def __init__(
        self, base: Path, family: str, recipe: Recipe, rows: Sequence[dict[str, Any]],
        training: Sequence[bytes], groups: Sequence[str],
    ) -> None:  # fmt: skip
        self.base, self.family, self.recipe, self.rows = base, family, recipe, list(rows)
        small = [resized(read_png(data), _SIDE, _SIDE) for data in training[:MAX_TRAINING]]
        self.training = thumbnails(np.asarray(small, np.uint8))
        first = slice(0, MAX_FOR_THRESHOLD)
        self.threshold = near_copy_threshold(self.training[first], np.asarray(groups[:MAX_TRAINING])[first])

    def __call__(self, step: int, weights: Path) -> tuple[bytes, dict[str, float]]:
        """A grid (PNG) of the fit at this step, a line per diagnosis, and `memorised`: the share of its samples that
        are nearer to a training image than all but 0.1 % of training images are to one of another group."""
        section = self.recipe.synthesize.model_copy(
            update={"keep_rejected": "image", "slots": min(len(self.rows), self.recipe.synthesize.slots)}
        )
        generator, adapter = (weights, None) if is_whole_generator(weights) else (self.base, weights)
        made = SynthesizeSamples(generator, adapter, section, self.recipe.gate, None, family=self.family)(self.rows)
        drawn = [row for row in made if row["outcome"] == records.ACCEPTED]
        found = {"memorised": self._memorised(drawn), "not_finite": 1 - len(drawn) / len(made)}
        return _grid(made), found

    def _memorised(self, drawn: Sequence[dict[str, Any]]) -> float:
        if not drawn:
            return 0.0
        small = [resized(read_png(row["image"]["bytes"]), _SIDE, _SIDE) for row in drawn]
        return float(near_copies(thumbnails(np.asarray(small, np.uint8)), self.training, self.threshold).mean())


def _grid(rows: Sequence[dict[str, Any]]) -> bytes:
    """Samples as PNG, PER_DIAGNOSIS to a line; beside each what was masked in it, if it has a mask."""
    tiles: list[torch.Tensor] = []
    masked = any(row.get("mask") for row in rows)
    for row in rows:
        shape = (row["height"], row["width"])
        rgb = read_png(row["image"]["bytes"]) if row.get("image") else np.zeros((*shape, 3), np.uint8)
        image = torch.from_numpy(rgb.copy()).permute(2, 0, 1)
        tiles.append(image)
        if masked:
            mask = torch.from_numpy(read_mask(row["mask"]["bytes"]) if row.get("mask") else np.zeros(shape, bool))
            tiles.append(draw_segmentation_masks(image, mask, alpha=0.45, colors="cyan"))
    grid = make_grid(tiles, nrow=PER_DIAGNOSIS * (2 if masked else 1), padding=4, pad_value=245)
    return bytes(encode_png(grid).numpy())
