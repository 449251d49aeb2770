"""Grids beside a fit: the fit hands its weights to an actor of their own and goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from factory.stages.preview import DrawPreview


class PreviewActor:
    """`fits.loop.Preview` on an actor, on a GPU of its own where the fit has some. Grids go to
    `directory/previews/step-000100.png`, their numbers to the log of the fit."""

    def __init__(self, directory: Path, build: Callable[[], DrawPreview], use_gpu: bool = False) -> None:
        import ray

        self.folder = directory / "previews"
        self.folder.mkdir(parents=True, exist_ok=True)
        # No CPU is asked for: the workers of the fit may hold all there are, and a grid is not worth waiting for one.
        self._actor = ray.remote(num_cpus=0, num_gpus=int(use_gpu))(_Drawing).remote(build)
        self._last: Any = None

    def start(self, step: int, weights: Path) -> None:
        kept = self.folder / f"weights-{step:06}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(weights, kept)
        self._last = self._actor.draw.remote(step, kept, self.folder / f"step-{step:06}.png")

    def result(self) -> dict[str, float]:
        import ray

        found: dict[str, float] = ray.get(self._last)
        return found


class _Drawing:
    """The actor."""

    def __init__(self, build: Callable[[], DrawPreview]) -> None:
        self._draw = build()

    def draw(self, step: int, weights: Path, out: Path) -> dict[str, float]:
        sheet, found = self._draw(step, weights)
        staged = out.with_suffix(".tmp")
        staged.write_bytes(sheet)
        os.replace(staged, out)
        shutil.rmtree(weights)
        return found
