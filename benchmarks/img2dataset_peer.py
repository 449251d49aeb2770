"""img2dataset on a loopback server, as a peer of ingest: in an environment of its own, and at its best here.

It is no dependency of this project; `REMEDY` says how its environment is made.
"""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ingest_phases as phases

PROCESSES = os.cpu_count() or 1
FORMATS = {"png": 1, "jpg": 95}  # its encode_quality: PNG's fastest level that compresses, JPEG's default
REMEDY = "make one with `uv venv --python 3.11 i2d && uv pip install --python i2d/bin/python img2dataset`"

_DOWNLOAD = "import json, sys; from img2dataset import download; download(**json.loads(sys.argv[1]))"


class LoopbackServer(socketserver.TCPServer):
    """GET /NUMBER of a fixed list of files, from memory, on a few threads: as little as a server can cost."""

    allow_reuse_address, request_queue_size = True, 512

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(("127.0.0.1", 0), FileRequest)
        self.bodies = [file.read_bytes() for file in files]
        self.threads = ThreadPoolExecutor(32)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.threads.submit(self._answer, request, client_address)

    def _answer(self, request: Any, client_address: Any) -> None:
        try:
            self.finish_request(request, client_address)
        finally:
            self.shutdown_request(request)


class FileRequest(socketserver.StreamRequestHandler):
    server: LoopbackServer

    def handle(self) -> None:
        number = self.rfile.readline(1024).split()[1].rpartition(b"/")[2]
        while self.rfile.readline(8192).strip():
            pass  # its headers, which change nothing
        known = number.isdigit() and int(number) < len(self.server.bodies)
        status, body = (b"200 OK", self.server.bodies[int(number)]) if known else (b"404 Not Found", b"")
        head = b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body))
        self.wfile.write(head + body)


def _serve(files: Sequence[Path], told: Connection) -> None:
    with LoopbackServer(files) as server:
        told.send(server.server_address[1])
        server.serve_forever()


@contextmanager
def served(files: Sequence[Path]) -> Iterator[str]:
    """The address of a server of these files, in a process of its own."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(files, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def stored(
    work: Path, *, python: Path, address: str, count: int, side: int, encoding: str, threads: int
) -> dict[str, Any]:
    """The first `count` files, their short sides reduced to `side`, with a shard for each of its processes."""
    work.mkdir()
    (work / "urls.txt").write_text("".join(f"{address}/{number}\n" for number in range(count)))
    wanted = {
        "url_list": str(work / "urls.txt"), "output_folder": str(work / "out"), "input_format": "txt",
        "output_format": "parquet", "processes_count": PROCESSES, "thread_count": threads,
        "number_sample_per_shard": -(-count // PROCESSES), "image_size": side, "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True, "encode_format": encoding, "encode_quality": FORMATS[encoding],
        "compute_hash": "sha256",
    }  # fmt: skip
    began = time.perf_counter()
    done = subprocess.run(
        [python, "-c", _DOWNLOAD, json.dumps(wanted)], cwd=work, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": "", "NO_ALBUMENTATIONS_UPDATE": "1"},
    )  # fmt: skip
    spent = time.perf_counter() - began
    shards = [json.loads(file.read_text()) for file in sorted((work / "out").glob("*_stats.json"))]
    there = sum(shard["successes"] for shard in shards)
    if done.returncode or there != count:
        raise SystemExit(f"img2dataset must store all {count} images, got {there}: {done.stderr[-2000:]}")
    steady = max(shard["end_time"] for shard in shards) - min(shard["start_time"] for shard in shards)
    return {"images_per_s": count / steady, "wall_s": spent, "bytes": phases.stored_bytes(work / "out")}


def why_not(python: Path | None) -> str | None:
    """Why img2dataset cannot take part, or None."""
    if python is None:
        return f"--img2dataset-python must name its Python, got nothing; {REMEDY}"
    try:
        found = subprocess.run([python, "-c", "import importlib.util as i; print(i.find_spec('img2dataset') is None)"],
                               capture_output=True, text=True, check=False)  # fmt: skip
    except OSError as error:
        return f"--img2dataset-python must be a Python, got {python.name} ({error.strerror}); {REMEDY}"
    return None if found.stdout.strip() == "False" else f"--img2dataset-python must have img2dataset; {REMEDY}"


def version_of(python: Path) -> str:
    asked = "import importlib.metadata as m; print(m.version('img2dataset'))"
    return subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


def tuned(work: Path, download: Callable[..., dict[str, Any]], tried: Sequence[int]) -> dict[str, dict[int, float]]:
    """Images per second by encoding and number of threads; `download` is `stored` but for these."""
    found: dict[str, dict[int, float]] = {}
    for encoding in FORMATS:
        for threads in tried:
            done = download(work, encoding=encoding, threads=threads)
            shutil.rmtree(work)
            found.setdefault(encoding, {})[threads] = round(done["images_per_s"], 1)
    return found
