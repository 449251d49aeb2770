"""The courtesy lock that keeps two drivers off one run. Correctness never depends on it: the part is the commit.

RUN/_LOCK.json holds a nonce and a beat counter. A lock is alive while its counter moves, judged by the observer's
own monotonic clock, so no two clocks are ever compared. A lock whose process is known to be gone (same boot, same
PID namespace, no such process) is stale at once, so a killed run resumes without waiting.

    {"nonce": "9f0c...", "beat": 12, "host": "node-1", "pid": 4211, "home": "<boot>/<namespace>/<start>"}
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from factory.storage import Store

LOCK_PATH = "_LOCK.json"


class RunLocked(ValueError):
    """Another driver is at work on this run."""


class RunLock:
    """Held while a driver writes into a run: `with RunLock(store): ...`, else RunLocked.

    interval_s is the time between beats, stale_s how long an observer sees no movement before it takes a lock
    over. `lost` turns true if another driver did that to us, which only a pause longer than stale_s can cause.
    """

    def __init__(self, store: Store, interval_s: float = 5.0, stale_s: float = 60.0) -> None:
        self.store, self.interval_s, self.stale_s = store, interval_s, stale_s
        self.nonce = uuid.uuid4().hex
        self.lost = False
        self._beat = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="run-lock", daemon=True)

    def __enter__(self) -> Self:
        while not self.store.put_if_absent(LOCK_PATH, self._content()):
            holder = self._read()
            if holder is None:  # released between the two calls
                continue
            if not _is_gone(holder):
                self._watch(holder)
            if self._take_over():
                break
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        # Where the run has become read-only the lock stays, stale, and the reason goes out.
        with suppress(OSError) if error is not None else nullcontext():
            holder = self._read()
            if holder is not None and holder.get("nonce") == self.nonce:
                self.store.delete(LOCK_PATH)

    def _watch(self, holder: dict[str, Any]) -> None:
        """Return once the holder has not moved for stale_s or let go; refuse as soon as it moves."""
        deadline = time.monotonic() + self.stale_s
        while time.monotonic() < deadline:
            time.sleep(min(self.interval_s, self.stale_s) / 2)
            now = self._read()
            if now is None:
                return
            if (now.get("nonce"), now.get("beat")) != (holder.get("nonce"), holder.get("beat")):
                raise RunLocked(self._refusal(now))

    def _take_over(self) -> bool:
        """Replace a stale lock. Of two that try, the last to write keeps it, and the other sees that."""
        if self._read() is None:
            return False
        self.store.replace(LOCK_PATH, self._content())
        time.sleep(self.interval_s / 10)
        holder = self._read()
        if holder is not None and holder.get("nonce") != self.nonce:
            raise RunLocked(self._refusal(holder))
        return holder is not None

    def _refusal(self, holder: dict[str, Any]) -> str:
        who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        return (
            f"{self.store.uri} is in use by another driver ({who}); wait for it, stop it, or use another --run "
            f"(the lock frees itself {self.stale_s:g} s after its holder's last sign of life)"
        )

    def _keep_beating(self) -> None:
        while not self._stop.wait(self.interval_s):
            try:
                holder = self._read()
                if holder is not None and holder.get("nonce") != self.nonce:
                    self.lost = True
                    return
                self._beat += 1
                self.store.replace(LOCK_PATH, self._content())
            except OSError:  # a store that is briefly away costs a beat, not the run
                continue

    def _read(self) -> dict[str, Any] | None:
        """The lock as it is; None if there is none. One that cannot be parsed is a holder that never moves."""
        try:
            content = json.loads(self.store.read(LOCK_PATH))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def _content(self) -> bytes:
        pid = os.getpid()
        content = {
            "nonce": self.nonce,
            "beat": self._beat,
            "host": socket.gethostname(),
            "pid": pid,
            "home": _home(pid),
        }
        return json.dumps(content, sort_keys=True).encode()


def lock(store: Store) -> RunLock:
    """The lock of a run with its usual timing."""
    return RunLock(store)


def _home(pid: int) -> str | None:
    """Names one living process of one boot and PID namespace; None if it ended or /proc does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state in "ZX" else f"{boot}/{namespace}/{started}"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder ran here and its process is known to have ended. Unsure means no."""
    pid, home, mine = holder.get("pid"), holder.get("home"), _home(os.getpid())
    if not isinstance(pid, int) or not isinstance(home, str) or mine is None:
        return False
    if home.rpartition("/")[0] != mine.rpartition("/")[0]:
        return False
    return _home(pid) != home
