"""`kill -9` at every named step of a commit and of a seal: what is there is whole, and doing it again ends the same.

The writer is this file as a process, forked once for each step (so that its imports are paid once); each fork kills
itself when its store comes to the step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

import factory
from factory import records, storage
from factory.storage import LocalStore
from factory.tables import Table

FINGERPRINT = {"caption.captioner": '"measured"'}
FIRST_ROUND, PARTS = 2, 3
# before: nothing is written. staged: synced under .staging. placed: in place, not synced, its staged name still there.
# after: all done.
MOMENTS = ("before", "staged", "placed", "after")
FILES = ("fingerprint", "part", "sidecar", "manifest", "predecessor")
STEPS = [f"{moment} {file}" for file in FILES for moment in MOMENTS]


def kind_of(path: str) -> str:
    name = path.rpartition("/")[2]
    kinds = {"part-": "part", "_MANIFEST.": "manifest", "_MANIFEST-": "predecessor", "_FINGERPRINT": "fingerprint"}
    return next((kind for prefix, kind in kinds.items() if name.startswith(prefix)), "sidecar")


class Dying(LocalStore):
    """A store whose process dies, for good, when it comes to a step such as `staged part`."""

    def __init__(self, root: Path, step: str) -> None:
        super().__init__(root)
        self.step, self.kind = step, ""
        for module, name in ((storage, "_link"), (os, "replace")):
            setattr(module, name, self._dying_after(getattr(module, name)))

    def reached(self, moment: str) -> None:
        if self.step == f"{moment} {self.kind}":
            os.kill(os.getpid(), signal.SIGKILL)

    def _dying_after(self, place: object) -> object:
        def placed(staged: object, target: object) -> object:
            done = place(staged, target)  # type: ignore[operator]
            self.reached("placed")
            return done

        return placed

    @contextmanager
    def _staged(self, data: bytes) -> Iterator[Path]:
        with super()._staged(data) as staged:
            self.reached("staged")
            yield staged

    def put_if_absent(self, path: str, data: bytes) -> bool:
        self.kind = kind_of(path)
        self.reached("before")
        written = super().put_if_absent(path, data)
        self.reached("after")
        return written

    def replace(self, path: str, data: bytes) -> None:
        self.kind = kind_of(path)
        self.reached("before")
        super().replace(path, data)
        self.reached("after")


def captions(part: int) -> pa.Table:
    """One part of the captions table: two rows accepted, one rejected."""
    rows: list[dict[str, object]] = [
        {"record_id": f"{part}-{i}", "caption": f"number {i}", "outcome": "accepted" if i else "rejected",
         "reason": None if i else "blank"}
        for i in range(3)
    ]  # fmt: skip
    return records.rows_to_table("captions", rows)


def drive(store: LocalStore) -> None:
    """What a driver does, in two rounds, from wherever it stands."""
    table = Table(store, "captions")
    for num_parts in (FIRST_ROUND, PARTS):
        table.require(FINGERPRINT)
        for part in table.missing(num_parts):
            table.commit(part, captions(part))
        manifest = table.manifest()
        if manifest is None or len(manifest.parts) < num_parts:
            table.seal(num_parts, FINGERPRINT, {})


def main(folder: Path) -> None:
    for step in STEPS:
        child = os.fork()
        if not child:
            drive(Dying(folder / step, step))
            os._exit(0)  # the step was never reached: the test sees that it was not killed
        print(step, os.waitpid(child, 0)[1], sep="\t")


def files(root: Path) -> dict[str, bytes]:
    """All that a finished run is made of; what a killed one left staged is no part of it."""
    store = LocalStore(root)
    return {path: store.read(path) for path in store.list("")}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run for each step, all of whose writers were killed at it."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": str(Path(factory.__file__).parents[1])}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True, timeout=120)
    statuses = dict(line.split("\t") for line in done.stdout.splitlines())
    assert statuses == {step: str(int(signal.SIGKILL)) for step in STEPS}, done.stderr
    return folder


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("calm") / "run"
    drive(LocalStore(root))
    return files(root)


@pytest.mark.parametrize("step", STEPS)
def test_after_a_kill_at_any_step_nothing_is_torn_and_the_same_again_ends_as_if_there_had_been_none(
    killed: Path, calm: dict[str, bytes], step: str
) -> None:
    root = killed / step
    left = files(root)
    # What is in place is whole, and never anything else than it will be; only the first round's manifest is replaced.
    assert {path: data for path, data in left.items() if not path.endswith("_MANIFEST.json")}.items() <= calm.items()
    manifest = Table(LocalStore(root), "captions").manifest()
    if manifest is not None:
        assert len(manifest.parts) in (FIRST_ROUND, PARTS)
        assert Table(LocalStore(root), "captions").verify() == []
    moment, file = step.split()
    if file == "part":
        assert ("captions/part-000000.parquet" in left) == (moment in ("placed", "after"))

    kept = {path: (root / path).stat().st_mtime_ns for path in left if path.endswith(".parquet")}
    drive(LocalStore(root))
    assert files(root) == calm
    assert {path: (root / path).stat().st_mtime_ns for path in kept} == kept  # no part was made again
    assert Table(LocalStore(root), "captions").verify() == []
    staged = len(list((root / ".staging").iterdir()))
    # Beside nothing, what was staged at the kill is left: a link's second name, or a file that was never placed.
    assert staged == (moment == "staged" or step == "placed part" or step == "placed fingerprint"), step
    assert LocalStore(root).sweep(older_than_s=0.0) == staged


if __name__ == "__main__":
    main(Path(sys.argv[1]))
