"""Which licences bind fitted weights: those of the rows that trained them, and their base's.

They are joined as an SPDX expression, `A AND B`; what that allows is for `release/licences.py` to say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from factory import records
from factory.run import Run

UNKNOWN = "unknown"
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
_FILES = ("LICENSE*", "LICENCE*", "COPYING*")


def of_training_rows(run: Run) -> set[str]:
    """The licences of the corpus rows that a fit may learn from; `unknown` for those that state none."""
    found: set[str] = set()
    for batch in run.table("corpus").batches(["licence", "split", "outcome"]):
        rows = batch.filter(records.accepted("train"))
        found |= {licence or UNKNOWN for licence in rows["licence"].unique().to_pylist()}
    return found


def of_base(directory: str | Path) -> str:
    """The licence that a directory of weights states: in our `card.json`, in the front matter of its model card
    `README.md` (`license`, and `license_name` where that is `other`), else the name of its licence file, else
    `unknown`."""
    folder = Path(directory)
    return _of_card(folder / "card.json") or _of_readme(folder / "README.md") or _of_files(folder) or UNKNOWN


def joined(licences: Iterable[str]) -> str:
    """The expression of several, each once, in order; `unknown` for none."""
    return " AND ".join(sorted({part for licence in licences for part in licence.split(" AND ")})) or UNKNOWN


def _of_card(path: Path) -> str:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return ""
    return str(known.get("licence") or "") if isinstance(known, dict) else ""


def _of_readme(path: Path) -> str:
    try:
        matter = _FRONT_MATTER.match(path.read_text(errors="replace"))
        known: Any = yaml.safe_load(matter.group(1)) if matter else None
    except (OSError, yaml.YAMLError):
        return ""
    if not isinstance(known, dict):
        return ""
    stated = known.get("license")
    if stated == "other":
        stated = known.get("license_name") or stated
    names = stated if isinstance(stated, list) else [stated]
    return " AND ".join(str(name) for name in names if name)


def _of_files(folder: Path) -> str:
    return next((file.name for pattern in _FILES for file in sorted(folder.glob(pattern)) if file.is_file()), "")
