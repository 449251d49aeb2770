"""How often a unit was begun, kept where a process that dies cannot take it along.

    RUN/.attempts/samples/000042-<drive>-2.json   put in place before the second attempt at unit 42

Ray starts an actor that died again, and gives it its unit again, for ever. A mark is written before the work and taken
away once it is made, so the marks that are there say how many attempts ended with their process. Those of a unit that
was given up stay: what dies before its failed rows are handed on must not begin its attempts anew. Marks count within
one drive, which is one start of the command and clears them at its end: a driver that was stopped says nothing against
the units that it had in flight. Nor does a machine that was lost: `is_there` tells whether a mark's machine still is.
No Ray here.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from factory.parts import canonical_json
from factory.storage import Store

ACTOR_DIED, TIMED_OUT, ERROR = "actor_died", "timed_out", "error"
EXIT_STATUS = 70  # of a process that its own watchdog ends; EX_SOFTWARE
GRACE_S = 30.0  # after which a watchdog that cannot run is helped by the C library's timer


class Attempt(NamedTuple):
    """One try at a unit. number: from 1, of all marks; spent: earlier tries that count; reason and text: how the last
    of those ended."""

    unit: int
    number: int
    spent: int = 0
    reason: str = ACTOR_DIED
    text: str = ""


class Attempts:
    """The marks of one drive's units. machine: the name of this one; is_there: whether a named one is still there."""

    def __init__(
        self, store: Store, table: str, drive: str, machine: str = "", is_there: Callable[[str], bool] = bool
    ) -> None:
        self.store, self.table, self.drive = store, table, drive
        self.machine, self.is_there = machine, is_there

    def begin(self, unit: int) -> Attempt:
        """Marks a new attempt, and says what became of those before it."""
        number, mark = 1, canonical_json({"machine": self.machine})
        while not self.store.put_if_absent(self._path(unit, number), mark):
            number += 1
        before = [known for earlier in range(1, number) if (known := self._read(unit, earlier)) is not None]
        counted = [known for known in before if known.get("ended") or self._ended_alone(known)]
        if not counted:
            return Attempt(unit, number)
        last = counted[-1]
        return Attempt(unit, number, len(counted), last.get("ended", ACTOR_DIED), last.get("text", ""))

    def has_begun(self, unit: int) -> bool:
        """Whether an attempt at the unit was begun that did not make it."""
        return self.store.exists(self._path(unit, 1))

    def end(self, attempt: Attempt, reason: str, text: str) -> None:
        """Says how an attempt ended that its process could tell of."""
        mark = {"machine": self.machine, "ended": reason, "text": text}
        self.store.replace(self._path(attempt.unit, attempt.number), canonical_json(mark))

    def forget(self, attempt: Attempt) -> None:
        """The unit is made: its marks go, the first of them last, so that none is counted twice."""
        for number in range(attempt.number, 0, -1):
            self.store.delete(self._path(attempt.unit, number))

    def clear(self) -> None:
        """The drive is over: what is left of its marks goes."""
        for path in self.store.list(f".attempts/{self.table}"):
            if f"-{self.drive}-" in path:
                self.store.delete(path)

    def _ended_alone(self, known: dict[str, Any]) -> bool:
        """Whether the machine of a mark is still there, so that it was the process alone that ended."""
        machine = known.get("machine")
        return not machine or self.is_there(machine)

    def _read(self, unit: int, number: int) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self.store.read(self._path(unit, number))))
        except FileNotFoundError:
            return None  # an attempt elsewhere has made the unit since

    def _path(self, unit: int, number: int) -> str:
        return f".attempts/{self.table}/{unit:06d}-{self.drive}-{number}.json"


@contextmanager
def watchdog(seconds: float | None, late: Callable[[str], None]) -> Iterator[None]:
    """Ends this process when what is inside takes longer: a call that hangs cannot be ended otherwise. late: is told
    first where the work was. None watches nothing."""
    if seconds is None:
        yield
        return
    worker, over = threading.get_ident(), threading.Event()
    guard = threading.Thread(target=_guard, args=(seconds, worker, over, late), daemon=True)
    guard.start()
    # Where a call holds the interpreter's lock the guard cannot run; this timer can, and tells nothing.
    faulthandler.dump_traceback_later(seconds + GRACE_S, exit=True, file=2)  # standard error
    try:
        yield
    finally:
        over.set()
        faulthandler.cancel_dump_traceback_later()


def _guard(seconds: float, worker: int, over: threading.Event, late: Callable[[str], None]) -> None:
    if over.wait(seconds):
        return
    frame = sys._current_frames().get(worker)
    try:
        late("".join(traceback.format_stack(frame)[-3:]) if frame else "")
    finally:
        os._exit(EXIT_STATUS)
