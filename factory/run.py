"""A run: the directory, on any store, that holds everything one recipe made.

run = Run("s3://bucket/runs/first")
with run.lock(), run.events() as events:
    run.write_header(recipe)
    table = run.table("samples")
"""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import factory
from factory import records
from factory.lock import RunLock
from factory.parts import canonical_json, sha256
from factory.recipe import Recipe
from factory.storage import LocalStore, Store, open_store
from factory.tables import DamagedTable, Manifest, Table

HEADER_PATH = "run.json"
CARD = "card.json"
# What a part's bytes or pixels can depend on. Versions are read from metadata; nothing is imported.
LIBRARIES = (
    "ray", "torch", "torchvision", "diffusers", "peft", "transformers", "timm", "pyarrow", "pillow", "numpy", "scipy",
    "scikit-learn", "opencv-python-headless", "safetensors", "pydantic",
)  # fmt: skip


class Run:
    """A run by its URI (see storage.open_store). Opening one writes nothing."""

    def __init__(self, uri: str | Path) -> None:
        self.store = open_store(uri)
        self.uri = self.store.uri

    def table(self, name: str) -> Table:
        return Table(self.store, name)

    def tables(self) -> list[str]:
        """Names of the sealed tables, parents before children."""
        found = {
            path.removesuffix("/_MANIFEST.json") for path in self.store.list("") if path.endswith("/_MANIFEST.json")
        }
        return [name for name in records.SCHEMAS if name in found]  # a release inside the run has a manifest of its own

    def lock(self, interval_s: float = 5.0, stale_s: float = 60.0) -> RunLock:
        """The courtesy lock, not yet taken."""
        return RunLock(self.store, interval_s, stale_s)

    def events(self) -> Events:
        """A fresh log of what this driver does."""
        return Events(self.store)

    def local_dir(self, what: str, remedy: str = "use a run on a disk that all nodes mount") -> Path:
        """The run's folder, for what needs files; a ValueError for a run on an object store."""
        if not isinstance(self.store, LocalStore):
            raise ValueError(f"{what} must have a run on a file system, got {self.uri}; {remedy}.")
        return self.store.root

    # The header.

    def write_header(self, recipe: Recipe) -> dict[str, Any]:
        """Write run.json: the recipe as resolved, its fingerprint, the code's and the libraries' versions."""
        content = recipe.model_dump(mode="json")
        header = {
            "recipe": content,
            "fingerprint": sha256(canonical_json(content)),
            "versions": library_versions(),
        }
        self.store.replace(HEADER_PATH, json.dumps(header, indent=1, sort_keys=True).encode())
        return header

    def restore_header(self, header: dict[str, Any] | None) -> None:
        """Put back what `header` once returned."""
        if header is None:
            self.store.delete(HEADER_PATH)
        else:
            self.store.replace(HEADER_PATH, json.dumps(header, indent=1, sort_keys=True).encode())

    def header(self) -> dict[str, Any] | None:
        """run.json, or None if the run has none."""
        try:
            content = json.loads(self.store.read(HEADER_PATH))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise DamagedTable(f"{self.uri}/{HEADER_PATH} is not JSON ({error}); remove it and run again") from error
        return dict(content)

    def recipe(self) -> Recipe | None:
        """What the run was last worked on with, or None for a new run."""
        header = self.header()
        return None if header is None else Recipe.model_validate_json(json.dumps(header["recipe"]))

    # Weights.

    def weights(self) -> list[str]:
        """Names of the complete weights of this run."""
        paths = (path.split("/") for path in self.store.list("weights"))
        return sorted(path[1] for path in paths if len(path) == 3 and path[2] == CARD)

    def card(self, name: str) -> dict[str, Any]:
        """The card of weights `name`; a ValueError that lists those there are, if they are not."""
        try:
            return dict(json.loads(self.store.read(f"weights/{name}/{CARD}")))
        except FileNotFoundError as error:
            known = ", ".join(self.weights()) or "none yet"
            raise ValueError(
                f"weights must be among those of {self.uri} ({known}), got {name!r}; make them with `factory fit`"
            ) from error

    def put_weights(self, name: str, directory: Path) -> None:
        """Publish a local directory, which must hold card.json, as weights `name`: the card goes last."""
        if not (directory / CARD).is_file():
            raise ValueError(f"weights must come with a {CARD}, got {directory}; write it before publishing them")
        put_tree(self.store, directory, f"weights/{name}", last=CARD)

    def weights_dir(self, name: str) -> Path:
        """A local directory to read weights `name` from: the run's own, or a copy kept per content for a remote run."""
        self.card(name)
        if isinstance(self.store, LocalStore):
            return self.store.root / "weights" / name
        content = self.store.read(f"weights/{name}/{CARD}")
        key = hashlib.sha256(f"{self.uri}/{name}/".encode() + content).hexdigest()[:24]
        cache = Path(tempfile.gettempdir()) / f"dermafactory-{_user()}" / key
        if not (cache / CARD).is_file():
            get_tree(self.store, f"weights/{name}", cache, last=CARD)
        return cache

    # Checking.

    def verify(self) -> list[str]:
        """Every problem of every sealed table, every child whose parent is no longer what it was made from, and every
        group of the corpus that lies in more than one split."""
        names = self.tables()
        problems = [problem for name in names for problem in self.table(name).verify()]
        manifests = {name: manifest for name in names if (manifest := self._trusted(name)) is not None}
        for name, manifest in manifests.items():
            for parent, digest in manifest.parents.items():
                known = manifests.get(parent)
                if known is None or digest not in (known.digest, *known.predecessors):
                    problems.append(
                        f"{name} was made from {parent} {digest[:12]}, which is not what {self.uri} holds now; "
                        f"remove {name} and make it again, or restore {parent}"
                    )
        return problems if problems or "corpus" not in manifests else self._leaks()

    def _leaks(self) -> list[str]:
        """Groups of accepted rows that cross splits: what is learned of one split would be known in the other."""
        held = (
            self.table("corpus").read(["group_id", "split"]).drop_null().group_by(["group_id", "split"]).aggregate([])
        )
        shared = [pair for pair in held["group_id"].value_counts().to_pylist() if pair["counts"] > 1]
        return [
            f"corpus has group {pair['values']} in {pair['counts']} splits; remove {self.uri}/corpus and "
            f"{self.uri}/.parts/corpus and run `factory ingest --run {self.uri}` again"
            for pair in shared
        ]

    def _trusted(self, name: str) -> Manifest | None:
        try:
            return self.table(name).manifest()
        except DamagedTable:
            return None  # verify has already said so


def library_versions() -> dict[str, str]:
    """Versions of the code, Python and the installed libraries that matter, without importing any."""
    found = {"dermafactory": factory.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class Events:
    """What one driver did, as lines of JSON in RUN/events/<nonce>.jsonl. A log, not a record: nothing reads it to
    decide. Local lines are appended as they come; an object store gets the whole file at most every flush_s."""

    def __init__(self, store: Store, flush_s: float = 10.0) -> None:
        self.store, self.flush_s = store, flush_s
        self.path = f"events/{uuid.uuid4().hex}.jsonl"
        self._lines: list[bytes] = []
        self._flushed = time.monotonic()

    def write(self, event: str, **fields: object) -> None:
        """One line: the event's name, the time (UTC) and whatever else is told. Values JSON lacks become text."""
        line = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fields}
        data = json.dumps(line, default=str).encode() + b"\n"
        if isinstance(self.store, LocalStore):
            self.store.append(self.path, data)
            return
        self._lines.append(data)
        if time.monotonic() - self._flushed >= self.flush_s:
            self.flush()

    def flush(self) -> None:
        """Put what is buffered on an object store."""
        if self._lines:
            self.store.replace(self.path, b"".join(self._lines))
            self._flushed = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError) if error is not None else nullcontext():  # a log must not hide what it would tell
            if error is not None:
                self.write("stopped", error=f"{type(error).__name__}: {error}")
            self.flush()


def read_events(store: Store) -> Iterator[dict[str, Any]]:
    """All events of a run, file by file; a line that a crash tore is skipped."""
    for path in store.list("events"):
        for line in store.read(path).splitlines():
            try:
                yield dict(json.loads(line))
            except (ValueError, TypeError):
                continue


def put_tree(store: Store, directory: Path, prefix: str, last: str) -> None:
    """Copy the files of a local directory to `prefix`, file `last` at the end: where it is, the tree is whole.

    A tree that is there already is first unmade by removing `last`; files that the new one lacks are removed.
    """
    files = sorted(file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file())
    store.delete(f"{prefix}/{last}")
    for old in set(store.list(prefix)) - {f"{prefix}/{name}" for name in files}:
        store.delete(old)
    for name in sorted(files, key=lambda name: name == last):
        store.replace(f"{prefix}/{name}", (directory / name).read_bytes())


def get_tree(store: Store, prefix: str, directory: Path, last: str) -> None:
    """Copy the files below `prefix` into a local directory, which appears whole or not at all."""
    names = [path.removeprefix(prefix + "/") for path in store.list(prefix)]
    if last not in names:
        raise ValueError(f"{prefix} must be complete, got no {last} in {store.uri}; run what makes it again")
    directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    staged = Path(tempfile.mkdtemp(dir=directory.parent))
    try:
        for name in names:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_bytes(store.read(f"{prefix}/{name}"))
        _place(staged, directory, last)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _place(staged: Path, directory: Path, last: str) -> None:
    try:
        os.replace(staged, directory)
    except OSError:
        if not (directory / last).is_file():  # else another process was first, with the same content
            raise


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
