"""A request's body: read under a cap and a time limit, then taken apart, as a multipart form or a JSON object.

Bodies are small enough to be held whole, so a part is what lies between two delimiters (RFC 2046, section 5.1.1).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Awaitable, Callable, MutableMapping
from email.message import Message
from email.parser import BytesHeaderParser
from typing import Any

from factory.gateway.refusal import ClientGone, Refusal
from factory.gateway.settings import Settings

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

FILES, TEXTS = ("image", "mask"), ("prompt", "diagnosis")
MAX_PARTS, MAX_PART_HEADER = 16, 8192
FORM, JSON = "multipart/form-data", "application/json"


async def read_body(receive: Receive, content_length: str | None, settings: Settings) -> bytes:
    """The whole body. Refused with 413 by its declared length before anything is read, by its true length while it
    is, and with 408 when it does not arrive in `settings.body_s`."""
    cap = settings.max_body_bytes
    if content_length is not None and (not content_length.isascii() or not content_length.isdigit()):
        raise Refusal(400, "content_length", "Content-Length must be a number; send the body's bytes.")
    if content_length is not None and (len(content_length) > 18 or int(content_length) > cap):
        raise _too_large(f"{content_length[:18]} declared", cap)
    try:
        async with asyncio.timeout(settings.body_s):
            body = await _received(receive, cap)
    except TimeoutError:
        raise Refusal(
            408, "slow_body", f"The body must arrive within {settings.body_s:g} s, got less; send it faster."
        ) from None
    if content_length is not None and len(body) != int(content_length):
        raise Refusal(400, "content_length", f"Content-Length must be the body's {len(body)} bytes; correct it.")
    return body


async def _received(receive: Receive, cap: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > cap:
            raise _too_large("more", cap)
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(got: str, cap: int) -> Refusal:
    sentence = f"The body must not exceed {cap} bytes, got {got}; send smaller images."
    return Refusal(413, "body_too_large", sentence)


def content_kind(content_type: str | None, encoding: str | None) -> Message:
    """The parsed Content-Type, if the service takes it; 415 if not. Asked before a body is read."""
    message = Message()
    message["Content-Type"] = (content_type or "").encode("ascii", "replace").decode()
    kind = message.get_content_type() if content_type else "nothing"
    if kind not in (FORM, JSON):
        raise Refusal(415, "content_type", f"Content-Type must be {FORM} or {JSON}, got {kind[:60]}; send one.")
    if encoding and encoding.lower() != "identity":
        raise Refusal(415, "content_encoding", "The body must not be compressed; leave Content-Encoding out.")
    if kind == FORM and not message.get_boundary():
        raise Refusal(
            400,
            "boundary",
            f"The content type {FORM} must name its boundary, got none; let the client write the header.",
        )
    return message


def fields_of(body: bytes, kind: Message) -> dict[str, bytes | str]:
    """`image` and `mask` as bytes, `prompt` and `diagnosis` as text; the last two may be missing."""
    if kind.get_content_type() == JSON:
        found = _of_json(body)
    else:
        found = _of_form(body, str(kind.get_boundary()).encode("utf-8", "replace"))
    for name in FILES:
        if name not in found:
            raise Refusal(422, "missing_field", f"The field {name} must be given, got none; send image and mask.")
    return found


def _of_form(body: bytes, boundary: bytes) -> dict[str, bytes | str]:
    malformed = Refusal(400, "multipart", "The form must be parts between its boundary, got something else; send one.")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary, MAX_PARTS + 2)
    if len(pieces) < 3 or len(pieces) > MAX_PARTS + 2 or not pieces[-1].startswith(b"--"):
        raise malformed
    found: dict[str, bytes | str] = {}
    for piece in pieces[1:-1]:
        padding, _, rest = piece.partition(b"\r\n")
        head, blank, content = (b"\r\n" + rest).partition(b"\r\n\r\n")
        if padding.strip(b" \t") or not blank or len(head) > MAX_PART_HEADER:
            raise malformed
        part = BytesHeaderParser().parsebytes(head.lstrip() + b"\r\n\r\n")
        name = part.get_param("name", header="content-disposition")
        if part.get_content_disposition() != "form-data" or not isinstance(name, str):
            raise malformed
        if str(part.get("content-transfer-encoding", "binary")).lower() not in ("binary", "8bit", "7bit"):
            raise malformed
        _add(found, name, content)
    return found


def _of_json(body: bytes) -> dict[str, bytes | str]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name twice")
        return dict(pairs)

    try:
        given = json.loads(body, object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise Refusal(400, "json", "The body must be one JSON object of distinct names; correct it.") from None
    if not isinstance(given, dict):
        raise Refusal(
            400, "json", 'The body must be a JSON object, got another value; send {"image": ..., "mask": ...}.'
        )
    found: dict[str, bytes | str] = {}
    for name, value in given.items():
        if name in TEXTS and value is None:
            continue
        if not isinstance(value, str):
            raise Refusal(
                422, "wrong_type", f"The field {_shown(name)} must be a text, got another type; send base64 or text."
            )
        _add(found, name, _unbase64(name, value) if name in FILES else value)
    return found


def _unbase64(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refusal(422, "base64", f"The field {name} must be base64 of a file's bytes; encode it again.") from None


def _add(found: dict[str, bytes | str], name: str, value: bytes | str) -> None:
    if name not in (*FILES, *TEXTS):
        known = ", ".join((*FILES, *TEXTS))
        raise Refusal(422, "unknown_field", f"A field must be one of {known}, got {_shown(name)}; leave it out.")
    if name in found:
        raise Refusal(422, "repeated_field", f"The field {name} must be given once, got it twice; leave one out.")
    if name in TEXTS:
        value = _text(name, value)
        if not value:
            return
    found[name] = value


def _text(name: str, value: bytes | str) -> str:
    try:
        text = value.decode() if isinstance(value, bytes) else value
        text.encode()  # JSON can spell half of a surrogate pair, which is no text
    except UnicodeError:
        raise Refusal(422, "not_text", f"The field {name} must be UTF-8 text, got other bytes; encode it so.") from None
    return text


def _shown(name: str) -> str:
    return ascii(name[:40])
