"""Prompts that were embedded before: one safetensors file each, named by the encoder's digest and the prompt's.

    RUN/cache/prompts/0f3a.../9c41....safetensors    (L, D), in the dtype that the encoder computes in

A file each, so that whoever draws reads just what it draws, and so that any number of processes may fill the same
folder: two that embed one prompt write the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from safetensors.torch import load, save
from torch import Tensor

from factory.storage import Store

FOLDER = "cache/prompts"


class KeptPrompts:
    """The embeddings of one text encoder. encoder: of all that decides them; dtype: what they lose nothing in."""

    def __init__(self, store: Store, encoder: str, dtype: torch.dtype = torch.float32) -> None:
        self.store, self.encoder, self.dtype = store, encoder, dtype
        self.folder = f"{FOLDER}/{encoder[:16]}"

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those that are not kept, each once, in order."""
        there = {path.rpartition("/")[2] for path in self.store.list(self.folder)}
        return [prompt for prompt in sorted(set(prompts)) if _name(prompt) not in there]

    def put(self, prompts: Sequence[str], embedded: Tensor) -> None:
        """Keeps embeddings (N, L, D)."""
        for prompt, values in zip(prompts, embedded, strict=True):
            stored = values.to("cpu", self.dtype).contiguous()
            self.store.put_if_absent(f"{self.folder}/{_name(prompt)}", save({"embedding": stored}))

    def read(self, prompts: Sequence[str]) -> Tensor:
        """(N, L, D) float32. A prompt that is not kept is a FileNotFoundError."""
        return torch.stack([self._read(prompt) for prompt in prompts])

    def _read(self, prompt: str) -> Tensor:
        try:
            return load(self.store.read(f"{self.folder}/{_name(prompt)}"))["embedding"].float()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"prompt {prompt[:60]!r} must be embedded before it is drawn, got none in {self.folder}; run `factory "
                "synthesize` again, which embeds what is missing."
            ) from error


def _name(prompt: str) -> str:
    return f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"
