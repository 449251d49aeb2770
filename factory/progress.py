"""One progress line per stage: rate, outcome counts, time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from factory import records


class Stopped(RuntimeError):
    """Work that was ended before it was done, for a reason the user can mend; the same command then goes on."""


class FailedRows(Stopped):
    """Work that was done, with rows in it that failed by an error: somebody must look at it."""


class ProgressLine:
    """A line a minute while a stage runs, and one at its end."""

    def __init__(self, stage: str, total: int, done: int = 0, echo: Callable[[str], None] = print) -> None:
        self.stage, self.total, self.done, self.echo = stage, total, done, echo
        self.already = done
        self.counts = dict.fromkeys(records.OUTCOMES, 0)
        self.failures: list[str] = []  # of units that failed as a whole: what by
        self.failed_in_a_row = 0
        self.started = self.said = time.monotonic()

    def add(self, committed: dict[str, Any]) -> None:
        """A unit was committed: {outcome: rows}."""
        for outcome in records.OUTCOMES:
            self.counts[outcome] += committed[outcome]
            self.done += committed[outcome]
        failure = committed.get("failure")
        self.failures += [failure] if failure else []
        self.failed_in_a_row = self.failed_in_a_row + 1 if failure else 0
        now = time.monotonic()
        if now - self.said >= 60 and self.done < self.total:  # `end` says the last line
            self.said = now
            self.echo(self.line())

    def line(self) -> str:
        """`synthesize  128/256 rows  3.1 rows/s  accepted 110, rejected 18  41 s left`"""
        spent = max(1e-6, time.monotonic() - self.started)
        rate = (self.done - self.already) / spent
        counts = ", ".join(f"{name} {count}" for name, count in self.counts.items() if count) or "nothing to do"
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate and self.done < self.total else f"{spent:.0f} s"
        return f"{self.stage:<11} {self.done}/{self.total} rows  {rate:.1f} rows/s  {counts}  {left}"

    def end(self) -> None:
        self.echo(self.line())
