"""When an ingest did what, read from its run: the times of its parts and of its manifests, and the rows that they hold.

What both benchmarks of ingest share. Nothing is asked of the process that ingests, so it runs as it always does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Span = tuple[float, float]

# Copies and settle need every row, so they come after the last one.
PHASES = ("start", "first_part", "intake", "copies", "settle", "end")
_SEALED = ("listing", "intake", "copies", "corpus")


def machine() -> dict[str, Any]:
    """What it ran on, and how busy that was before."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "cores": os.cpu_count(), "cpu": found[1] if found else "unknown", "load_before": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def require_disk(folder: Path, needed: int, what: str) -> None:
    """Refuses to begin what would fill the disk."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{what} needs {needed / 2**30:.1f} GiB below {folder}, where {free / 2**30:.1f} GiB are free; "
            "free some, or give a larger disk with --work."
        )


def stored_bytes(folder: Path) -> int:
    """Bytes of all Parquet parts in a folder."""
    return sum(part.stat().st_size for part in folder.glob("*.parquet"))


def manifest(run: Path, table: str) -> dict[str, Any]:
    """The manifest of a sealed table."""
    content: dict[str, Any] = json.loads((run / table / "_MANIFEST.json").read_text())
    return content


def commits(run: Path, table: str) -> list[tuple[float, int]]:
    """When each part was committed and its rows, in the order of time."""
    rows = {part["part"]: part["rows"] for part in manifest(run, table)["parts"]}
    return sorted(((run / table / f"part-{part:06d}.parquet").stat().st_mtime, rows[part]) for part in rows)


def steady_rate(done: Sequence[tuple[float, int]]) -> float:
    """Rows per second from when a quarter of the rows are committed, to the last part.

    Not from the first part on: the actors have gone ahead by then, while the first commit waited for its worker.
    """
    total = np.cumsum([rows for _, rows in done])
    begun = int(np.searchsorted(total, total[-1] / 4))
    return float((total[-1] - total[begun]) / (done[-1][0] - done[begun][0]))


def seconds(run: Path, began: float, ended: float, idle: Sequence[Span] = ()) -> dict[str, float]:
    """Seconds of each phase of a finished ingest, which add up to its whole time; `idle`: when no driver ran.

    `start` is the process and the listing of its sources, `first_part` the start of Ray and of the actors and the first
    unit, `intake` what is left of the pass over the images, and `end` the end of Ray.
    """
    listing, *sealed = [(run / table / "_MANIFEST.json").stat().st_mtime for table in _SEALED]
    edges = [began, listing, commits(run, "intake")[0][0], *sealed, ended]
    spans = zip(PHASES, edges[:-1], edges[1:], strict=True)
    return {name: round(stop - start - _overlap((start, stop), idle), 2) for name, start, stop in spans}


def _overlap(span: Span, others: Sequence[Span]) -> float:
    return sum(max(0.0, min(span[1], stop) - max(span[0], start)) for start, stop in others)


def without_idle(done: Sequence[tuple[float, int]], idle: Sequence[Span]) -> list[tuple[float, int]]:
    """The same commits on a clock that stands still while no driver runs."""
    return [(time - _overlap((float("-inf"), time), idle), rows) for time, rows in done]


def cost_windows(done: Sequence[tuple[float, int]], size: int) -> list[dict[str, float]]:
    """Milliseconds per row in windows of about `size` rows, from the first part on."""
    total, times = np.cumsum([rows for _, rows in done]), np.array([time for time, _ in done])
    number = max(1, round((total[-1] - total[0]) / size))
    edges = np.unique(np.searchsorted(total, np.linspace(total[0], total[-1], number + 1)))
    rows, spent = np.diff(total[edges]), np.diff(times[edges])
    return [
        {"rows_before": int(before), "rows": int(count), "ms_per_row": round(1000 * float(time / count), 3)}
        for before, count, time in zip(total[edges[:-1]], rows, spent, strict=True)
    ]
