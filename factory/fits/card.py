"""The card beside fitted weights: what they are, what they cost, and the digest that names them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from factory.models.student import Cost

CARD = "card.json"


def digest_of(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_card(directory: Path, cost: Cost, fields: Mapping[str, object]) -> None:
    """`card.json` of the weights in `directory/model.safetensors`.

    params and flops are of one forward pass at image_size (two operations per multiply-add), bytes and digest of the
    file itself.
    """
    weights = directory / "model.safetensors"
    card = {**fields, **asdict(cost), "bytes": weights.stat().st_size, "digest": digest_of(weights)}
    (directory / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")


def read_card(directory: Path) -> dict[str, Any]:
    """The card that `write_card` wrote; ValueError if there is none."""
    path = directory / CARD
    if not path.exists():
        raise ValueError(f"weights must be a directory with a {CARD}, got {directory}; run the fit that makes them.")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def checkpoint_at(named: str, field: str) -> Path:
    """The checkpoint that a recipe's field names. Raises ValueError if it is not there or not safetensors."""
    path = Path(named)
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(
            f"{field} must be a .safetensors file that is there, got {named}; `factory convert` makes one of a pickled "
            "checkpoint."
        )
    return path
