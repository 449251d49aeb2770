"""What bounds the service: sizes, times, how many at once, and where its token and its audit log are."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from pathlib import Path
from typing import Annotated

from pydantic import Field

from factory.sections.base import Count, Positive, Section

TOKEN_VARIABLE = "FACTORY_GATE_TOKEN"
MIN_EXPOSED_TOKEN = 16  # characters; a shorter one can be guessed by whoever may knock
_TOKEN = re.compile(r"[\x21-\x7e]+")
_PRIVATE_MODES = (0o600, 0o400)


class Settings(Section):
    """Limits of one web process. The defaults bound its memory to about 1.5 GiB whatever is sent."""

    max_body_bytes: Count = 16 * 2**20
    max_pixels: Count = 2**24  # of an image, as its header declares them
    min_side: Count = 32  # px; below it there is no lesion to see
    max_aspect: Annotated[float, Field(ge=1.0)] = 4.0  # long side over short side
    max_prompt: Count = 2000  # characters
    max_waiting: Count = 64  # requests being read, decoded or judged; the next is answered 429
    max_draining: Count = 128  # refused requests whose bodies are still read and dropped; the next is hung up on
    body_s: Positive = 30.0  # for a whole body to arrive
    drain_s: Positive = 5.0  # for the rest of a body that is refused before its end, of at most max_body_bytes; dropped
    answer_s: Positive = 30.0  # for the gate to answer; then 503
    retry_after_s: Count = 1  # what 429 and 503 tell the client
    gather_s: Annotated[float, Field(ge=0.0, le=1.0)] = 0.003  # how long a request waits for others to share its call
    max_batch: Count = 32
    max_calls: Count = 4  # of the gate at once; while all are taken, batches grow
    decode_threads: Count = 2
    audit: str | None = None  # folder of the audit log
    token_file: str | None = None
    require_token: bool = False  # refuse to start without one


def is_loopback(host: str) -> bool:
    """Whether an address to bind is reachable from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_of(settings: Settings) -> str | None:
    """The bearer token: of the file that is named, or of FACTORY_GATE_TOKEN, or None where neither is.

    Raises ValueError for a file that others may read, a token that no header can carry, and none where one is required.
    """
    token = os.environ.get(TOKEN_VARIABLE) if settings.token_file is None else _read_private(Path(settings.token_file))
    if token is None or token == "":
        if settings.require_token:
            raise ValueError(
                f"a token must be set, got none; set {TOKEN_VARIABLE} or name a file of mode 0600 by --token-file."
            )
        return None
    if not _TOKEN.fullmatch(token):
        raise ValueError(
            "the token must be printable ASCII without spaces, got other characters; make one with "
            "`openssl rand -hex 32`."
        )
    if settings.require_token and len(token) < MIN_EXPOSED_TOKEN:
        raise ValueError(
            f"the token must have at least {MIN_EXPOSED_TOKEN} characters where others can reach the port, got "
            f"{len(token)}; make one with `openssl rand -hex 32`."
        )
    return token


def _read_private(path: Path) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode not in _PRIVATE_MODES:
            raise ValueError(f"{path} must have mode 0600, got {mode:04o}; run `chmod 600 {path}`.")
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--token-file must be a readable text file, got {path} ({error}); check it.") from error


def check_exposure(host: str, settings: Settings, tls_cert: str | None, tls_key: str | None) -> Settings:
    """The settings with a token required where `host` is not loopback; raises ValueError where there is none, or where
    of certificate and key only one is named or one cannot be read."""
    if (tls_cert is None) != (tls_key is None):
        raise ValueError("--tls-cert and --tls-key must be given together, got one; name both or neither.")
    for name, path in (("--tls-cert", tls_cert), ("--tls-key", tls_key)):
        if path is not None and not os.access(path, os.R_OK):
            raise ValueError(f"{name} must be a readable PEM file, got {path}; check the path.")
    if not is_loopback(host):
        settings = settings.model_copy(update={"require_token": True})
    token_of(settings)
    return settings
