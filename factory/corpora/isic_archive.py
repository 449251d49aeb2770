"""The words of the ISIC archive, which its challenges and the exports of its collections share. Not a reader.

Their sources: the challenges' tables, and the archive's own schema (github.com/ImageMarkup/isic-metadata).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from factory.corpora import published

CONFIRMATIONS = {
    "histopathology": "histology", "confocal microscopy with consensus dermoscopy": "confocal",
    "serial imaging showing no change": "follow_up", "single image expert consensus": "consensus",
    "single contributor clinical assessment": "clinical",
}  # fmt: skip
SITES = {
    "head/neck": "head_neck", "anterior torso": "anterior_torso", "posterior torso": "posterior_torso",
    "lateral torso": "lateral_torso", "torso": "torso", "upper extremity": "upper_extremity",
    "lower extremity": "lower_extremity", "palms/soles": "palms_soles", "oral/genital": "oral_genital",
}  # fmt: skip
MODALITIES = {
    "dermoscopic": "dermoscopic", "clinical": "clinical", "clinical: close-up": "clinical", "overview": "clinical",
    "clinical: overview": "clinical", "tbp tile: close-up": "tbp_tile",
}  # fmt: skip
_LICENCES = {"cc-by": "CC-BY-4.0", "cc-by-nc": "CC-BY-NC-4.0", "cc-0": "CC0-1.0"}


def licence(text: str | None, otherwise: str, file: Path) -> str:
    """The licence of one image, which the archive states row by row; `otherwise` where the row does not."""
    return published.translated(text, _LICENCES, "the licence", file) or otherwise


def deepest(row: published.Row, columns: Sequence[str]) -> str | None:
    """The first of some columns that is filled in: the archive's diagnoses go from the general to the particular."""
    return next((word for column in columns if (word := published.known(row.get(column)))), None)
