"""What a table depends on, so that one made from something else is refused with the difference named."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from factory import parts, recipe


def fingerprint_of(
    recipe_: recipe.Recipe, table_name: str, parents: Mapping[str, str], weights: Mapping[str, str]
) -> dict[str, str]:
    """What a table depends on, one entry per field so that a difference can be named.

    The recipe's fields (those of recipe.FINGERPRINTS) as their JSON value, `parents.<table>` as that table's
    `origin()`, so that a further round of a parent adds to this table rather than refusing it, and
    `weights.<name>` as a digest. Long values are replaced by their SHA-256.
    """
    fields: dict[str, Any] = {}
    for section in recipe.FINGERPRINTS[table_name]:
        value: Any = recipe_
        for name in section.split("."):
            value = getattr(value, name)
        fields.update(_leaves(section, value))
    found = {name: _short(json.dumps(value, sort_keys=True)) for name, value in fields.items()}
    found |= {f"parents.{name}": digest for name, digest in parents.items()}
    found |= {f"weights.{name}": digest for name, digest in weights.items()}
    return found


def _leaves(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(value, BaseModel):
        return [(name, value)]
    return [leaf for key in type(value).model_fields for leaf in _leaves(f"{name}.{key}", getattr(value, key))]


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"sha256:{parts.sha256(text.encode())[:32]}"
