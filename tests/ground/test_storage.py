"""Of any number of writers exactly one wins, and what it wrote is whole, on a local disk and on S3 over a socket."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import factory
from factory.storage import GCSStore, LocalStore, S3Store, StorageError, Store, open_store, relative

ROOT = Path(factory.__file__).parents[1]


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "run")
    found: Store = request.getfixturevalue("s3")
    return found


def test_a_first_put_writes_and_a_second_finds_it_done(store: Store) -> None:
    assert store.put_if_absent("table/part", b"first") is True
    assert store.put_if_absent("table/part", b"second") is False
    assert store.read("table/part") == b"first"


def test_replace_overwrites_and_delete_is_content_with_nothing(store: Store) -> None:
    store.replace("a", b"one")
    store.replace("a", b"three")
    assert (store.read("a"), store.size("a"), store.exists("a")) == (b"three", 5, True)
    store.delete("a")
    store.delete("a")
    assert not store.exists("a")


def test_what_is_missing_is_file_not_found(store: Store) -> None:
    for ask in (store.read, store.size):
        with pytest.raises(FileNotFoundError):
            ask("no/such")
    store.replace("folder/file", b"x")
    with pytest.raises(FileNotFoundError):
        store.read("folder/other")
    assert not store.exists("folder")
    assert store.list("no") == []


def test_a_listing_is_sorted_sees_new_files_and_keeps_to_its_folder(store: Store) -> None:
    for path in ("b/2", "b/1", "b/deep/3", "bb/4", "c"):
        store.replace(path, b"x")
    assert store.list("b") == ["b/1", "b/2", "b/deep/3"]
    assert store.list("") == ["b/1", "b/2", "b/deep/3", "bb/4", "c"]
    store.replace("b/0", b"x")  # a cached listing would miss it
    assert store.list("b")[0] == "b/0"


def test_an_open_file_is_read_from_anywhere(store: Store) -> None:
    store.replace("file", bytes(range(256)) * 40)
    with store.open("file") as file:
        file.seek(-3, os.SEEK_END)
        assert file.read() == b"\xfd\xfe\xff"
        file.seek(256)
        assert file.read(2) == b"\x00\x01"


def test_of_many_threads_exactly_one_wins(store: Store) -> None:
    for round_ in range(5):
        start = threading.Barrier(8)

        def write(writer: int, path: str = f"part-{round_}", start: threading.Barrier = start) -> bool:
            start.wait()
            return store.put_if_absent(path, b"%d" % writer * 1000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert won.count(True) == 1
        assert store.read(f"part-{round_}") == b"%d" % won.index(True) * 1000


RACE = """
import pathlib, sys, time
from factory.storage import open_store
root, writer = pathlib.Path(sys.argv[1]), sys.argv[2]
store = open_store(root / "run")
print("up", flush=True)
while not (root / "go").exists():
    time.sleep(0.001)
print([part for part in range(60) if store.put_if_absent(f"table/{part}", writer.encode() * 5000)])
"""


def started(code: str, *arguments: object, stderr: int | None = None) -> subprocess.Popen[str]:
    """A Python process on the same source tree."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)


def test_of_many_processes_exactly_one_wins_each_part(tmp_path: Path) -> None:
    writers = [started(RACE, tmp_path, i) for i in range(4)]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    (tmp_path / "go").touch()
    won = [json.loads(writer.communicate(timeout=20)[0]) for writer in writers]
    assert sorted(part for parts in won for part in parts) == list(range(60))
    for i, parts in enumerate(won):
        assert all((tmp_path / f"run/table/{part}").read_bytes() == b"%d" % i * 5000 for part in parts)
    assert list((tmp_path / "run/.staging").iterdir()) == []


def test_a_writer_killed_in_the_middle_leaves_nothing_torn(tmp_path: Path) -> None:
    code = (
        "import sys; from factory.storage import LocalStore; s = LocalStore(sys.argv[1]); print('up', flush=True)\n"
        "for i in range(100000): s.put_if_absent(f'table/{i}', b'%06d' % i * 200000)"
    )
    for wait in (0.05, 0.11, 0.17):
        root = tmp_path / str(wait)
        child = started(code, root)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        store = LocalStore(root)
        for path in store.list(""):  # and the staging folder is no part of a listing
            assert store.read(path) == b"%06d" % int(path.removeprefix("table/")) * 200000
        assert store.put_if_absent("after", b"x")


def test_what_a_killed_writer_left_staged_is_swept_by_age(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert store.sweep() == 0
    store.replace("a", b"x")
    old, fresh = tmp_path / ".staging/old", tmp_path / ".staging/fresh"
    old.write_bytes(b"x")
    fresh.write_bytes(b"x")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    assert store.sweep(3600) == 1
    assert (old.exists(), fresh.exists(), store.read("a")) == (False, True, b"x")


def test_a_link_that_worked_but_whose_reply_was_lost_is_a_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link
    for number in (errno.EEXIST, errno.EIO):  # NFS retries the request, and meets its own first success

        def lost_reply(staged: Any, target: Any, number: int = number) -> None:
            real(staged, target)
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "link", lost_reply)
        assert LocalStore(tmp_path).put_if_absent(f"part-{number}", b"x") is True


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "found no space left; free some and run again"),
        (errno.EROFS, "is not permitted: the folder is read-only"),
        (errno.EPERM, "needs hard links, which this file system refused"),
        (errno.EIO, "failed: "),
    ],
)
def test_a_disk_that_refuses_is_told_plainly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    def refuse(staged: object, target: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match=says) as caught:
        LocalStore(tmp_path).put_if_absent("table/part", b"12345")
    assert caught.value.errno == number
    assert "table/part (5 bytes)" in str(caught.value)
    assert list((tmp_path / ".staging").iterdir()) == []


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    """A file size limit is the full disk that needs no disk: the write itself fails, half way."""
    code = (
        "import resource, signal, sys; from factory.storage import LocalStore\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "LocalStore(sys.argv[1]).put_if_absent('table/part', b'x' * 5000)"
    )
    said = started(code, tmp_path, stderr=subprocess.PIPE).communicate()[1]
    assert "StorageError" in said
    assert "table/part (5,000 bytes)" in said
    assert LocalStore(tmp_path).list("") == []
    assert list((tmp_path / ".staging").iterdir()) == []


def test_a_file_where_the_run_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(StorageError, match="needs a folder where a file is"):
        LocalStore(tmp_path / "run").put_if_absent("table/part", b"x")


def test_files_are_readable_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        LocalStore(tmp_path).put_if_absent("part", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "part").stat().st_mode & 0o777 == 0o640


def test_append_adds_to_a_log(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.append("events/a", b"1\n")
    store.append("events/a", b"2\n")
    assert store.read("events/a") == b"1\n2\n"


@pytest.mark.parametrize("path", ["/etc/passwd", "../other", "a/../../b", "", "a\\b", "a\0b"])
def test_a_path_cannot_leave_the_run(tmp_path: Path, path: str) -> None:
    with pytest.raises(ValueError, match="path must be relative and stay inside the run"):
        LocalStore(tmp_path).read(path)


@given(st.text(alphabet="ab./", max_size=12))
def test_any_path_stays_inside_or_is_refused(path: str) -> None:
    try:
        inside = relative(path)
    except ValueError:
        return
    assert os.path.normpath(os.path.join("/run", inside)).startswith("/run/")


def test_local_uris_are_paths_that_outlive_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in ("runs/a", f"file://{tmp_path}/runs/a", f"file://localhost{tmp_path}/runs/a", tmp_path / "runs/a"):
        assert open_store(uri).uri == str(tmp_path / "runs/a")
    travelled = pickle.loads(pickle.dumps(open_store("runs/a")))
    monkeypatch.chdir("/")
    assert travelled.put_if_absent("x", b"1")
    assert (tmp_path / "runs/a/x").read_bytes() == b"1"


@pytest.mark.parametrize("uri", ["memory://x", "http://host/x", "abfs://box/x", "ssh://x", "az://x"])
def test_other_stores_are_refused_with_what_works(uri: str) -> None:
    with pytest.raises(
        ValueError, match="run must be a local path, file:///path, s3://bucket/path or gs://bucket/path"
    ):
        open_store(uri)


def test_near_misses_are_helped() -> None:
    with pytest.raises(ValueError, match="write s3://bucket/x"):
        open_store("s3a://bucket/x")
    with pytest.raises(ValueError, match="got nothing"):
        open_store(" ")
    with pytest.raises(ValueError, match="run must name a bucket"):
        open_store("s3://")


def test_gcs_without_its_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    store = open_store("gcs://bucket/run")
    assert isinstance(store, GCSStore)
    with pytest.raises(ValueError, match=r"pip install 'dermafactory\[gcs\]'"):
        store.read("x")


# S3 over the socket.


def test_s3_puts_carry_the_condition(server: Any, s3: S3Store) -> None:
    s3.put_if_absent("part", b"x")
    last = server.puts[-1]
    assert last["PATH_INFO"].endswith("/run/part")
    assert last["HTTP_IF_NONE_MATCH"] == "*"


def test_s3_large_parts_go_up_in_pieces_and_still_only_once(server: Any, s3: S3Store) -> None:
    s3.chunk_bytes = 5 * 2**20  # the least that S3 accepts
    data = os.urandom(11 * 2**20)
    assert s3.put_if_absent("large", data) is True
    finish = server.puts[-1]
    assert finish["REQUEST_METHOD"] == "POST"
    assert "uploadId" in finish["QUERY_STRING"]
    assert finish["HTTP_IF_NONE_MATCH"] == "*"
    assert s3.put_if_absent("large", bytes(11 * 2**20)) is False
    assert s3.read("large") == data


def test_s3_look_alikes_that_ignore_the_condition_are_refused(server: Any, s3: S3Store) -> None:
    server.forget_condition = True
    with pytest.raises(StorageError, match="overwrote an object despite If-None-Match"):
        s3.put_if_absent("part", b"x")
    assert not s3.exists("part")


def test_s3_a_bare_412_is_a_lost_race(server: Any, s3: S3Store) -> None:
    s3.put_if_absent("other", b"x")
    body = b"<Error><Code>PreconditionFailed</Code><Message>no</Message></Error>"  # MinIO names no condition
    server.answer = lambda environ: ("412 Precondition Failed", body)
    assert s3.put_if_absent("part", b"x") is False


def test_s3_a_409_is_tried_again(server: Any, s3: S3Store) -> None:
    s3.put_if_absent("other", b"x")
    body = b"<Error><Code>ConditionalRequestConflict</Code><Message>busy</Message></Error>"
    times = iter(range(100))
    server.answer = lambda environ: ("409 Conflict", body) if next(times) < 2 else None
    assert s3.put_if_absent("part", b"x") is True
    server.answer = lambda environ: ("409 Conflict", body)
    s3.conflict_wait_s = 0.0
    with pytest.raises(StorageError, match="met another writer six times"):
        s3.put_if_absent("part2", b"x")


def test_s3_other_refusals_stay_errors(server: Any, s3: S3Store) -> None:
    s3.put_if_absent("other", b"x")
    server.answer = lambda environ: ("403 Forbidden", b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
    with pytest.raises(StorageError, match="access denied"):
        s3.put_if_absent("part", b"x")
    server.answer = lambda environ: ("400 Bad", b"<Error><Code>Odd</Code><Message>no</Message></Error>")
    with pytest.raises(OSError, match="Odd"):
        s3.put_if_absent("part", b"x")


def test_s3_a_bucket_that_is_not_there_is_told(server: Any) -> None:
    with pytest.raises(StorageError, match="bucket does not exist; create the bucket"):
        S3Store("s3://no-such-bucket/run").put_if_absent("part", b"x")


def test_s3_without_credentials_is_told(server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import s3fs

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="check the credentials and the endpoint"):
        S3Store("s3://factory-test/run").read("part")
    s3fs.S3FileSystem.clear_instance_cache()


def test_s3_stores_travel_to_workers(s3: S3Store) -> None:
    s3.put_if_absent("part", b"x")
    travelled = pickle.loads(pickle.dumps(s3))
    assert travelled.read("part") == b"x"
    assert travelled.sweep() == 0
