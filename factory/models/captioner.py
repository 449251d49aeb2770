"""The measured captioner: it writes what can be measured, in the paper's sentence, and nothing else.

DermaFlux (arXiv 2603.16392) gives a vision-language model the label and asks for asymmetry, border irregularity and
color. This captioner measures the three, so its accuracy can be stated where the truth is known. What it measures
with is given to it: models know nothing of quality.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from factory.images import RGB, Mask
from factory.prompts import Attributes, caption_for


class NoLesion(ValueError):
    """No lesion could be found to describe."""


class MeasuredCaptioner:
    """Captions from measured attributes; `measure(rgb, mask)` and `estimate_mask(rgb)` are the instruments."""

    name = "measured"

    def __init__(self, measure: Callable[[Any, Any], Attributes], estimate_mask: Callable[[Any], Any]) -> None:
        self._measure, self._estimate_mask = measure, estimate_mask

    def caption(
        self, rgb: RGB, mask: Mask | None, diagnosis: str | None, label_in_prompt: bool, skin_type: str | None = None
    ) -> tuple[Attributes, str, str]:
        """Attributes, sentence and the mask's source: `given`, or `estimated` where `mask` (H, W) is None.

        Raises NoLesion where the mask, given or estimated, is too small to measure.
        """
        source = "estimated" if mask is None else "given"
        used = self._estimate_mask(rgb) if mask is None else mask
        try:
            attributes = self._measure(rgb, used)
        except ValueError as error:
            raise NoLesion(f"the {source} mask must hold a lesion: {error}") from error
        return attributes, caption_for(attributes, diagnosis, skin_type, label_in_prompt), source
