"""What the page needs to show the facts of a corpus: names, shades and bars. No number is made here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from factory import taxonomy
from factory.release import charts
from factory.release.corpus import composition, skin, table1
from factory.release.corpus.facts import CorpusFacts

KIND_NAMES = {"exact": "of equal pixels", "published": "published as such", "near": "found by likeness"}
# The colour of a filter's part of a bar: what one cannot help, what is a choice, and copies.
_TONES = {
    "excluded_label": "excluded", "failed": "failed", "too_small": "rejected", "exact_duplicate": "copy",
    "published_duplicate": "copy", "near_duplicate": "copy", "other": "waiting",
}  # fmt: skip


def filters_shown(facts: CorpusFacts) -> list[str]:
    """Every filter, `other` only where something fell to it."""
    return [name for name in table1.FILTERS if name != "other" or facts.total.lost(name)]


def became(dataset: table1.Dataset) -> list[charts.Segment]:
    """A dataset's listed images by what became of them; the kinds of copies are one part."""
    parts = {"accepted": charts.Segment("accepted", dataset.accepted.total, "accepted")}
    for name, title in table1.FILTERS.items():
        tone = _TONES[name]
        before = parts[tone].value if tone in parts else 0
        parts[tone] = charts.Segment("copies" if tone == "copy" else title, before + dataset.lost(name), tone)
    return list(parts.values())


def tones(counts: Sequence[int]) -> list[charts.Segment]:
    """Bands of the angle, light to dark, then images without an angle."""
    names = [*taxonomy.SKIN_WORDS.values(), skin.NO_ANGLE]
    return [charts.Segment(name, n, f"tone-{i}") for i, (name, n) in enumerate(zip(names, counts, strict=True))]


def heat_of(count: int, most: int) -> str:
    """The depth of a cell's shade by the logarithm of its count, 0.08 to 0.6."""
    return f"{0.08 + 0.52 * math.log1p(count) / math.log1p(max(most, 1)):.2f}"


def titles(facts: CorpusFacts) -> dict[str, str]:
    """Each source's title."""
    return {dataset.source: dataset.title for dataset in facts.datasets}


def count_or_dot(count: int) -> str:
    """1234 -> `1,234`; a dot for none, so that a table of many zeros can be read."""
    return f"{count:,}" if count else "·"


def share(count: float, of: float) -> str:
    """93 of 1000 -> `9.3%`; what is not all and not none is never rounded to it."""
    text = f"{100 * count / of:.1f}%"
    if text == "0.0%" and count:
        return "<0.1%"
    return ">99.9%" if text == "100.0%" and count < of else text


def signed(difference: int) -> str:
    """1234 -> `+1,234`, -5 -> `−5`; a dot for no difference."""
    return f"{difference:+,}".replace("-", "\N{MINUS SIGN}") if difference else "·"


FILTERS = {"count_or_dot": count_or_dot, "signed": signed}
GLOBALS: dict[str, Any] = {
    "filters_shown": filters_shown, "became": became, "tones": tones, "heat_of": heat_of, "share": share,
    "titles": titles, "kind_names": KIND_NAMES, "field_names": composition.FIELDS, "scale_names": skin.SCALE_NAMES,
    "band_words": list(taxonomy.SKIN_WORDS.values()), "band_bounds": skin.band_bounds(),
}  # fmt: skip
