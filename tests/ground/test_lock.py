"""Two drivers do not share a run by accident, and a dead one does not keep it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import factory
from factory.lock import LOCK_PATH, RunLock, RunLocked, _home, lock
from factory.storage import LocalStore, StorageError

ROOT = Path(factory.__file__).parents[1]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def quick(store: Any) -> RunLock:
    return RunLock(store, interval_s=0.05, stale_s=0.4)


def content(store: LocalStore) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.read(LOCK_PATH))
    return found


def test_a_lock_is_there_while_it_is_held_and_gone_afterwards(store: LocalStore) -> None:
    with quick(store) as held:
        assert content(store)["nonce"] == held.nonce
    assert not store.exists(LOCK_PATH)


def test_a_held_lock_beats_and_refuses_another_driver_by_name(store: LocalStore) -> None:
    with quick(store) as held:
        with pytest.raises(
            RunLocked, match=rf"is in use by another driver \(process {os.getpid()} on .*use another --run"
        ):
            RunLock(store, interval_s=0.05, stale_s=20).__enter__()
        assert content(store)["beat"] > 0
        assert not held.lost
    with quick(store):
        pass


def test_a_lock_from_elsewhere_that_never_moves_is_taken_over_when_stale(store: LocalStore) -> None:
    store.replace(
        LOCK_PATH, json.dumps({"nonce": "x", "beat": 3, "host": "elsewhere", "pid": 1, "home": "b/n/1"}).encode()
    )
    began = time.monotonic()
    with quick(store) as held:
        assert time.monotonic() - began >= 0.4
        assert content(store)["nonce"] == held.nonce


@pytest.mark.parametrize("junk", [b"", b"{", b"[]"])
def test_a_lock_file_that_cannot_be_read_goes_stale_too(store: LocalStore, junk: bytes) -> None:
    store.replace(LOCK_PATH, junk)
    with quick(store) as held:
        assert content(store)["nonce"] == held.nonce


@pytest.mark.skipif(_home(os.getpid()) is None, reason="needs /proc to tell whether a process is alive")
def test_the_lock_of_a_killed_driver_here_is_taken_at_once(store: LocalStore) -> None:
    code = (
        "import sys, time; from factory.lock import lock; from factory.storage import LocalStore\n"
        "with lock(LocalStore(sys.argv[1])): print('up', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", code, str(store.root)], stdout=subprocess.PIPE, env=environment)
    assert child.stdout is not None
    child.stdout.readline()
    child.kill()
    child.communicate()
    began = time.monotonic()
    with RunLock(store, interval_s=0.1, stale_s=30):
        assert time.monotonic() - began < 5


def test_a_lock_let_go_while_another_waits_is_handed_on(store: LocalStore) -> None:
    store.replace(LOCK_PATH, json.dumps({"nonce": "x", "beat": 3}).encode())
    threading.Timer(0.1, store.delete, [LOCK_PATH]).start()
    began = time.monotonic()
    with RunLock(store, interval_s=0.05, stale_s=20):
        assert time.monotonic() - began < 10


def test_of_many_that_find_a_stale_lock_not_two_keep_it(store: LocalStore) -> None:
    store.replace(LOCK_PATH, b"{}")
    start, release, outcomes = threading.Barrier(4), threading.Event(), []

    def drive() -> None:
        start.wait()
        try:
            with RunLock(store, interval_s=1.0, stale_s=0.3):
                outcomes.append("held")
                release.wait(10)
        except RunLocked:
            outcomes.append("refused")

    drivers = [threading.Thread(target=drive) for _ in range(4)]
    for driver in drivers:
        driver.start()
    deadline = time.monotonic() + 10
    while len(outcomes) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    release.set()
    for driver in drivers:
        driver.join()
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]


def test_a_holder_that_was_taken_over_notices_and_leaves_the_new_lock_alone(store: LocalStore) -> None:
    with quick(store) as held:
        store.replace(LOCK_PATH, json.dumps({"nonce": "other", "beat": 0}).encode())
        deadline = time.monotonic() + 5
        while not held.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        assert held.lost
    assert content(store)["nonce"] == "other"


class Flaky(LocalStore):
    """A store whose third write fails."""

    writes = 0

    def replace(self, path: str, data: bytes) -> None:
        self.writes += 1
        if self.writes == 1:
            raise StorageError("briefly away")
        super().replace(path, data)


def test_a_store_that_is_briefly_away_costs_a_beat_and_not_the_run(tmp_path: Path) -> None:
    store = Flaky(tmp_path)
    with quick(store) as held:
        deadline = time.monotonic() + 5
        while content(store)["beat"] < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert content(store)["beat"] >= 2
        assert not held.lost


def test_the_usual_lock_goes_stale_after_a_minute(store: LocalStore) -> None:
    assert lock(store).stale_s == 60.0
