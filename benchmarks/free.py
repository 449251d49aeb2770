"""A generator whose every answer is a few additions: what is left of a run is the factory's own work.

Shared by the benchmarks of what Ray costs and of a million samples.
"""

from __future__ import annotations

import sys
from pathlib import Path

from factory.models.denoiser import Denoiser
from factory.models.sleeping import DIGEST, SleepingDenoiser
from factory.runtime.synthesize import SynthesizeUnit
from factory.stages.synthesize import SynthesizeSamples

__all__ = ["DIGEST", "FreeUnit", "SynthesizeFree", "Ungated", "for_workers"]


class SynthesizeFree(SynthesizeSamples):
    def load_denoiser(self, weights: str | Path, adapter: str | Path | None) -> Denoiser:
        return SleepingDenoiser()


class FreeUnit(SynthesizeUnit):
    def stage(self) -> type[SynthesizeSamples]:
        return SynthesizeFree


class Ungated(FreeUnit):
    """As `FreeUnit`, with nothing judged: every sample is accepted without an answer from a gate."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.synthesize.gate = None


def for_workers(*names: str) -> None:
    """Sends the classes of these modules with what is run: workers cannot import a script or its neighbours."""
    from ray import cloudpickle

    for name in (__name__, *names):
        cloudpickle.register_pickle_by_value(sys.modules[name])
