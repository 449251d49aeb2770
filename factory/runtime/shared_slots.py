"""Units that several threads ask for, drawn through the same slots: what one leaves free, the next one takes.

    slots = SharedSlots(stage.stream, begin, fell)
    drawn = slots.draw(unit, rows)      # in any thread; each of them draws in turn, for all
    with slots.alone():                 # nothing is under way, and nothing begins
        ...

There is no thread of its own: who waits for a unit draws until it has ended, whoever's units end in the meantime.
A unit that an error ended together with others raises `Fallen` for each of them: whose error it was is not known.
No Ray and no torch here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, TypeVar

from factory.progress import Stopped

Work = TypeVar("Work")
Drawn = TypeVar("Drawn")


class Fallen(Exception):
    """An error ended what a unit was drawn with."""


class SharedSlots(Generic[Work, Drawn]):
    """stream: from units with their work, which may have none now and one later, to what was drawn of each, as they
    end; begin: told of each unit whose turn it is; fell: told which units were under way when an error ended them; it
    may end the process. guard: what each wait for the end of a unit is done within."""

    def __init__(
        self,
        stream: Callable[[Iterator[tuple[int, Work]]], Iterator[tuple[int, Drawn]]],
        begin: Callable[[int], None],
        fell: Callable[[list[int], Exception], None],
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._stream, self._begin, self._fell, self._guard = stream, begin, fell, guard
        self._turn = threading.Lock()
        self._waiting: deque[tuple[int, Work]] = deque()
        self._under_way: list[int] = []
        self._ended: dict[int, Drawn | Exception] = {}
        self._running: Iterator[tuple[int, Drawn]] | None = None
        self._open = True

    def draw(self, unit: int, work: Work) -> Drawn:
        """What was drawn of a unit, among those of other threads. Raises `Fallen`, or the `Stopped` of the stage."""
        self._waiting.append((unit, work))
        with self._turn:
            while unit not in self._ended:
                self._advance()
            found = self._ended.pop(unit)
        if isinstance(found, Stopped):
            raise found
        if isinstance(found, Exception):
            raise Fallen(unit) from found
        return found

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within it no unit is drawn for another thread; those under way have ended before."""
        with self._turn:
            self._open = False
            try:
                while self._running is not None:
                    self._advance()
            finally:
                self._open = True
            yield

    def _advance(self) -> None:
        """Draws until one more unit has ended, or there is none left to begin."""
        if self._running is None:
            self._running = self._stream(_Turns(self._next))
        try:
            with self._guard():
                unit, drawn = next(self._running)
        except StopIteration:
            self._running = None
        except Exception as error:
            self._running = None
            fallen, self._under_way = self._under_way, []
            if not fallen:  # not a unit's fault
                raise
            self._ended.update(dict.fromkeys(fallen, error))
            if not isinstance(error, Stopped):
                self._fell(fallen, error)
        else:
            self._under_way.remove(unit)
            self._ended[unit] = drawn

    def _next(self) -> tuple[int, Work]:
        if not self._open or not self._waiting:
            raise StopIteration
        unit, work = self._waiting.popleft()
        self._under_way.append(unit)
        self._begin(unit)
        return unit, work

    @property
    def under_way(self) -> tuple[int, ...]:
        """Units that have begun and not ended."""
        return tuple(self._under_way)


class _Turns(Generic[Work]):
    """An iterator that may have nothing now and something later, as a generator could not."""

    def __init__(self, following: Callable[[], tuple[int, Work]]) -> None:
        self._following = following

    def __iter__(self) -> Iterator[tuple[int, Work]]:
        return self

    def __next__(self) -> tuple[int, Work]:
        return self._following()
