"""What every captioner of images is: requests in, as many answers out, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from factory.images import RGB


@dataclass(frozen=True)
class Request:
    """One image (H, W, 3) uint8 and what is asked of it."""

    image: RGB
    prompt: str


@dataclass(frozen=True)
class Answer:
    """The text that came back, or the named problem that kept it away; tokens over all tries that were answered."""

    text: str | None
    problem: str | None = None  # such as `timeout`, `http_500`, `out_of_memory`
    tokens_in: int = 0
    tokens_out: int = 0


class Captioner(Protocol):
    """A model that describes images. `digest` names what answers; `ask` loses no request and raises for none."""

    name: str
    digest: str

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer per request, in order. Raises progress.Stopped where asking on would be of no use."""
        ...
