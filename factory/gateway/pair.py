"""The fields of a request as an image and a mask at the gate's working size, or the sentence that refuses them.

Letters: H and W pixels as sent, h and w at the working size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from factory import images, taxonomy
from factory.gateway.refusal import Refusal
from factory.gateway.settings import Settings

# Only these are handed to a decoder. (offset, bytes)
_MAGIC = {"PNG": ((0, b"\x89PNG\r\n\x1a\n"),), "JPEG": ((0, b"\xff\xd8\xff"),), "WebP": ((0, b"RIFF"), (8, b"WEBP"))}


@dataclass(frozen=True)
class Pair:
    """What is judged, and what the audit log says of what was sent."""

    image: np.ndarray  # (h, w, 3) uint8
    mask: np.ndarray  # (h, w) bool
    width: int  # W
    height: int  # H
    facts: dict[str, Any]  # of the audit line: sizes and digests, never pixels


def pair_of(fields: dict[str, bytes | str], settings: Settings, size: int, multiple: int) -> Pair:
    """Decodes, checks and shrinks. size: px of the working short side; multiple: what its sides are multiples of."""
    diagnosis, prompt = fields.get("diagnosis"), fields.get("prompt")
    if diagnosis is not None and diagnosis not in taxonomy.ALL_DIAGNOSES:
        raise Refusal(
            422, "unknown_diagnosis", "The field diagnosis must be one of the listed words; see the page's list."
        )
    if prompt is not None and len(prompt) > settings.max_prompt:
        sentence = (
            f"The field prompt must have at most {settings.max_prompt} characters, got {len(prompt)}; shorten it."
        )
        raise Refusal(422, "long_prompt", sentence)
    sent = {name: _bytes(fields[name]) for name in ("image", "mask")}
    for name, data in sent.items():
        _check_format(name, data)
    mask = _decoded(images.decode_mask, sent["mask"], "mask", settings)  # the smaller first: a wrong one costs little
    image = _decoded(images.decode_rgb, sent["image"], "image", settings)
    height, width = image.shape[:2]
    if mask.shape != (height, width):
        theirs = f"{mask.shape[1]} x {mask.shape[0]}"
        raise Refusal(
            422, "mask_size", f"The mask must have the image's {width} x {height} pixels, got {theirs}; resize it."
        )
    wide, high = working_size(width, height, size, multiple, settings)
    facts = {
        "width": width, "height": height, "image_bytes": len(sent["image"]), "mask_bytes": len(sent["mask"]),
        "image_sha256": _sha256(sent["image"]), "mask_sha256": _sha256(sent["mask"]),
        "prompt_sha256": None if prompt is None else _sha256(str(prompt).encode()), "diagnosis": diagnosis,
    }  # fmt: skip
    return Pair(images.resized(image, wide, high), images.resized(mask, wide, high), width, height, facts)


def working_size(width: int, height: int, size: int, multiple: int, settings: Settings) -> tuple[int, int]:
    """(w, h): the short side at `size`, the other in proportion, both multiples of the VAE's."""
    short, long = sorted((width, height))
    if short < settings.min_side:
        sentence = (
            f"The image's sides must be at least {settings.min_side} px, got {width} x {height}; send a larger one."
        )
        raise Refusal(422, "too_small", sentence)
    if long > settings.max_aspect * short:
        sentence = f"The image's sides must be at most 1:{settings.max_aspect:g}, got {width} x {height}; crop it."
        raise Refusal(422, "too_long", sentence)
    wide, high = (max(multiple, round(side * size / short / multiple) * multiple) for side in (width, height))
    return wide, high


def _bytes(value: bytes | str) -> bytes:
    assert isinstance(value, bytes)
    return value


def _check_format(name: str, data: bytes) -> None:
    if not data:
        raise Refusal(422, "empty_file", f"The {name} must be a file, got 0 bytes; send it again.")
    if not any(all(data[at : at + len(magic)] == magic for at, magic in parts) for parts in _MAGIC.values()):
        raise Refusal(415, "image_format", f"The {name} must be PNG, JPEG or WebP, got something else; convert it.")


def _decoded(decode: Any, data: bytes, name: str, settings: Settings) -> np.ndarray:
    try:
        pixels: np.ndarray = decode(
            data, f"the {name}", max_pixels=settings.max_pixels, max_bytes=settings.max_body_bytes
        )
        return pixels
    except images.ImageProblem as problem:
        if problem.reason == "bomb":
            sentence = f"The {name} must declare at most {settings.max_pixels} pixels, got more; shrink it."
            raise Refusal(413, "too_many_pixels", sentence) from None
        got = _SAID.get(problem.reason, "another")
        sentence = f"The {name} must be one whole, undamaged picture of 8 or 16 bits, got {got}; export it again."
        raise Refusal(422, problem.reason, sentence) from None


# Decoders' own words may quote what they read, so a client is told these.
_SAID = {
    "animated": "an animation", "truncated": "one that ends early", "broken": "a damaged one",
    "unsupported_pixels": "other pixels", "not_an_image": "something else",
}  # fmt: skip


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
