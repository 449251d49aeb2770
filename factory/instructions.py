"""Versioned prompt files: what a vision-language model is asked, and the sentence that its answer is put into.

A file in `factory/prompt_files/` is one instruction or one prefix, in two arms: `text`, which names the label at
`{label}`, and `blind`, which names none. It is known by the SHA-256 of its bytes, so a changed word is another prompt.
"""

from __future__ import annotations

import hashlib
import importlib.resources
from dataclasses import dataclass
from functools import cache
from typing import Literal

import yaml

Kind = Literal["instruction", "prefix"]
_FOLDER = "prompt_files"


@dataclass(frozen=True)
class PromptFile:
    """One versioned prompt; `again` is added to an instruction whose answer was not valid."""

    id: str
    version: int
    kind: Kind
    text: str
    blind: str
    digest: str
    again: str = ""

    def worded(self, label: str | None, description: str = "") -> str:
        """The labelled arm for a label (`benign`, `malignant`), the blind arm for None."""
        chosen = self.blind if label is None else self.text.replace("{label}", label)
        return chosen.replace("{description}", description).strip()


def prompt_ids(kind: Kind) -> tuple[str, ...]:
    """The ids of the prompt files of a kind, sorted."""
    return tuple(sorted(prompt.id for prompt in _all() if prompt.kind == kind))


def prompt_file(identifier: str, kind: Kind) -> PromptFile:
    """The prompt of an id. Raises ValueError, which names those there are."""
    for prompt in _all():
        if (prompt.id, prompt.kind) == (identifier, kind):
            return prompt
    raise ValueError(f"{kind} must be one of {', '.join(prompt_ids(kind))}, got {identifier!r}; choose one of them.")


@cache
def _all() -> tuple[PromptFile, ...]:
    files = (importlib.resources.files("factory") / _FOLDER).iterdir()
    found = [file.read_bytes() for file in files if file.name.endswith(".yaml")]
    return tuple(PromptFile(**yaml.safe_load(data), digest=hashlib.sha256(data).hexdigest()) for data in found)
