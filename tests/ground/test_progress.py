"""The progress line says rows, rate, outcomes and time left, and counts what was there before."""

from __future__ import annotations

import time

from factory.progress import ProgressLine


def test_a_line_counts_rows_done_before_and_now_and_its_rate_counts_only_now():
    line = ProgressLine("synthesize", total=40, done=10)
    line.started = time.monotonic() - 10
    line.add({"accepted": 15, "rejected": 5, "failed": 0})
    said = line.line()
    assert said.startswith("synthesize  30/40 rows  2.0 rows/s  accepted 15, rejected 5")
    assert said.endswith("5 s left")


def test_a_log_gets_a_line_a_minute_and_one_at_the_end():
    said: list[str] = []
    line = ProgressLine("caption", total=4, echo=said.append)
    line.add({"accepted": 1, "rejected": 0, "failed": 0})
    assert said == []
    line.said -= 61
    line.add({"accepted": 1, "rejected": 0, "failed": 1})
    line.end()
    assert len(said) == 2
    assert "accepted 2, failed 1" in said[-1]


def test_a_step_with_nothing_to_do_says_so():
    assert "nothing to do" in ProgressLine("ingest", total=3, done=3).line()
