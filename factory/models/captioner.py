"""The measured captioner: it writes what can be measured, in the paper's sentence, and nothing else.

DermaFlux (arXiv 2603.16392) gives a vision-language model the label and asks for asymmetry, border irregularity and
color. This captioner measures the three, so its accuracy can be stated where the truth is known. What it measures
with is given to it: models know nothing of quality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from factory.images import RGB, Mask
from factory.prompts import Attributes, Surroundings, caption_for


class NoLesion(ValueError):
    """No lesion could be found to describe."""


class MeasuredCaptioner:
    """Captions from measured attributes; `measure(rgb, mask)` and `estimate_mask(rgb)` are the instruments."""

    name = "measured"

    def __init__(
        self,
        measure: Callable[[Any, Any], Attributes],
        estimate_mask: Callable[[Any], Any],
        bank: str = "standard",
    ) -> None:
        self._measure, self._estimate_mask, self.bank = measure, estimate_mask, bank

    def caption(
        self,
        rgb: RGB,
        mask: Mask | None,
        diagnosis: str | None,
        label_in_prompt: bool,
        skin_type: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> tuple[Attributes, str, str]:
        """Attributes, sentence and the mask's source: `given`, or `estimated` where `mask` (H, W) is None.

        about: the corpus row, of which the extended bank tells more than the label and the skin.
        Raises NoLesion where the mask, given or estimated, is too small to measure.
        """
        source = "estimated" if mask is None else "given"
        used = self._estimate_mask(rgb) if mask is None else mask
        try:
            attributes = self._measure(rgb, used)
        except ValueError as error:
            raise NoLesion(f"the {source} mask must hold a lesion: {error}") from error
        around = Surroundings.of(about or {}, getattr(attributes, "relative_diameter", None))
        return attributes, caption_for(attributes, diagnosis, skin_type, label_in_prompt, self.bank, around), source
