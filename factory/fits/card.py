"""The card beside fitted weights: what they are, what they cost, and the digest that names them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
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


def placed(directory: Path, save: Callable[[Path], None]) -> None:
    """Saves into a directory that appears whole or not at all; of several that save at once the first one's stays."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as folder:
        staged = Path(folder) / "new"
        save(staged)
        try:
            staged.rename(directory)
        except OSError:
            if not directory.exists():
                raise


def read_card(directory: Path) -> dict[str, Any]:
    """The card that `write_card` wrote; ValueError if there is none."""
    path = directory / CARD
    if not path.exists():
        raise ValueError(f"weights must be a directory with a {CARD}, got {directory}; run the fit that makes them.")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def checkpoint_at(named: str, field: str) -> Path:
    """The checkpoint that a recipe's field names. Raises ValueError if it is not there or no whole safetensors."""
    from safetensors import SafetensorError, safe_open

    path = Path(named)
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(
            f"{field} must be a .safetensors file that is there, got {named}; `factory convert` makes one of a pickled "
            "checkpoint."
        )
    try:
        with safe_open(path, framework="numpy"):
            return path
    except SafetensorError as error:
        raise ValueError(
            f"{field} must be a whole .safetensors file, got {named} of {path.stat().st_size} bytes ({error}); copy it "
            "again."
        ) from error
