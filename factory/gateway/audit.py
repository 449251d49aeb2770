"""The audit log: one JSON line per decision, appended before the answer is sent. No pixels, no token, no prompt.

    {"time": "2026-05-04T03:02:01.123Z", "request_id": ..., "verdict": "rejected", "reason": "low_iou", "iou": 0.41,
     "theta": 0.7, "scores": {...}, "model": {"vae": ..., "gate": ..., "policy": ...}, "width": 1022, "height": 767,
     "image_bytes": ..., "mask_bytes": ..., "image_sha256": ..., "mask_sha256": ..., "prompt_sha256": null,
     "diagnosis": null}

A process has a file of its own, so two never write into one another's lines; a file that is full is followed by
another. Folder and files are their owner's alone.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 2**26


class AuditLog:
    """Appends to FOLDER/NONCE-NUMBER.jsonl; `write` raises OSError where it cannot."""

    def __init__(self, folder: str | Path, max_file_bytes: int = MAX_FILE_BYTES) -> None:
        self.folder, self._max = Path(folder), max_file_bytes
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._nonce, self._number, self._size = secrets.token_hex(6), 0, 0
        self._lock = threading.Lock()
        self._file = self._opened()

    def write(self, **fields: Any) -> None:
        """One line, whole or not at all for a reader that looks after the call."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = (json.dumps({"time": now, **fields}, allow_nan=False) + "\n").encode()
        with self._lock:
            if self._size and self._size + len(line) > self._max:
                os.close(self._file)
                self._number, self._size = self._number + 1, 0
                self._file = self._opened()
            written = os.write(self._file, line)
            self._size += written
            if written != len(line):
                raise OSError(f"the audit log in {self.folder} took {written} of {len(line)} bytes")

    def _opened(self) -> int:
        path = self.folder / f"{self._nonce}-{self._number:04d}.jsonl"
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
