"""Where a run lives: a local or NFS folder, S3 or GCS, behind one small interface.

Everything rests on one operation, `put_if_absent`: of any number of writers exactly one wins, and what it wrote
appears whole or not at all. Stores that cannot promise this are refused.

    local, NFS   staged under RUN/.staging, synced, put in place by link(2), which fails if the name exists
    S3           a put with `If-None-Match: *`; large objects send it when the multipart upload completes
    GCS          a put with `ifGenerationMatch=0`

The S3 endpoint and credentials come from the usual AWS environment (AWS_ENDPOINT_URL and so on). Some S3
look-alikes ignore the condition, so a store tries it once on an empty probe object before it trusts it.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar, Protocol, cast

WHAT_WORKS = "a local path, file:///path, s3://bucket/path or gs://bucket/path"
_STAGING = ".staging"
_PROBE = ".probe-put-if-absent"


class StorageError(OSError):
    """The store could not do what was asked, in one sentence with the remedy. `errno` is kept where there is one."""

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


class Store(Protocol):
    """Files by relative POSIX path under one URI. A missing file is a FileNotFoundError on every store."""

    uri: str

    def read(self, path: str) -> bytes: ...
    def open(self, path: str) -> BinaryIO:
        """A seekable reader, so that a few columns of a large part need not fetch all of it."""
        ...

    def put_if_absent(self, path: str, data: bytes) -> bool:
        """True if this call wrote the file, False if it was there. It never appears torn, and never changes."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Write or overwrite atomically: a reader sees the old bytes or the new ones."""
        ...

    def exists(self, path: str) -> bool: ...
    def list(self, prefix: str) -> list[str]:
        """Every file below the folder `prefix` ("" for all), sorted; empty if there is no such folder."""
        ...

    def size(self, path: str) -> int:
        """Bytes."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file; one that is not there is no error."""
        ...

    def sweep(self, older_than_s: float = 3600.0) -> int:
        """Remove what killed writers left staged; the number of files removed."""
        ...


def open_store(uri: str | Path) -> Store:
    """The store of a run's URI; an unknown kind is a ValueError that says what works."""
    text = str(uri).strip()
    scheme, separator, rest = text.partition("://")
    if not text:
        raise ValueError(f"run must be {WHAT_WORKS}, got nothing; give it with --run")
    if not separator:
        return LocalStore(text)
    if scheme == "file":
        return LocalStore("/" + rest.removeprefix("localhost").lstrip("/"))
    if scheme == "s3":
        return S3Store(text)
    if scheme in ("gs", "gcs"):
        return GCSStore(f"gs://{rest}")
    hint = f"write s3://{rest}" if scheme in ("s3a", "s3n") else "other stores cannot promise put-if-absent"
    raise ValueError(f"run must be {WHAT_WORKS}, got {text!r}; {hint}")


def relative(path: str) -> str:
    """The path, if it stays inside its store: relative, no `..`; else a ValueError. A manifest is not trusted."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise ValueError(f"path must be relative and stay inside the run, got {path!r}; use folder/file")
    return "/".join(parts)


class LocalStore:
    """A folder on a local disk or NFS. It is created by the first write."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.uri = str(self.root)  # absolute: a worker has another working directory

    def read(self, path: str) -> bytes:
        return self._target(path).read_bytes()

    def open(self, path: str) -> BinaryIO:
        return self._target(path).open("rb")

    def exists(self, path: str) -> bool:
        return self._target(path).is_file()

    def size(self, path: str) -> int:
        return self._target(path).stat().st_size

    def list(self, prefix: str) -> list[str]:
        folder = self._target(prefix) if prefix else self.root
        found = []
        for parent, folders, files in os.walk(folder):
            if Path(parent) == self.root and _STAGING in folders:
                folders.remove(_STAGING)
            found += [(Path(parent) / name).relative_to(self.root).as_posix() for name in files]
        return sorted(found)

    def put_if_absent(self, path: str, data: bytes) -> bool:
        target = self._target(path)
        if target.exists():
            return False
        with self._explained(path, len(data)), self._staged(data) as staged:
            _make_folder(target.parent)
            written = _link(staged, target)
            _sync_folder(target.parent)
        return written

    def replace(self, path: str, data: bytes) -> None:
        target = self._target(path)
        with self._explained(path, len(data)), self._staged(data) as staged:
            _make_folder(target.parent)
            os.replace(staged, target)
            _sync_folder(target.parent)

    def append(self, path: str, data: bytes) -> None:
        """Add to the end of a log file. Not on object stores, and not synced."""
        target = self._target(path)
        with self._explained(path, len(data)):
            _make_folder(target.parent)
            with target.open("ab") as file:
                file.write(data)

    def delete(self, path: str) -> None:
        with self._explained(path, 0):
            self._target(path).unlink(missing_ok=True)

    def sweep(self, older_than_s: float = 3600.0) -> int:
        folder = self.root / _STAGING
        if not folder.is_dir():
            return 0
        with self._explained(_STAGING, 0), self._staged(b"") as fresh:  # the disk's own clock: on NFS it is not ours
            before = fresh.stat().st_mtime - older_than_s
            old = [file for file in folder.iterdir() if file != fresh and _modified(file) <= before]
            for file in old:
                file.unlink(missing_ok=True)
        return len(old)

    def _target(self, path: str) -> Path:
        return self.root / relative(path)

    @contextmanager
    def _staged(self, data: bytes) -> Iterator[Path]:
        """The bytes in a synced file beside the tables, gone afterwards whatever happens."""
        folder = self.root / _STAGING
        _make_folder(folder)
        handle, name = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield Path(name)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)

    @contextmanager
    def _explained(self, path: str, num_bytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(_explanation(error, self.uri, path, num_bytes), error.errno) from error


def _explanation(error: OSError, uri: str, path: str, num_bytes: int) -> str:
    what = f"{uri}: writing {path} ({num_bytes:,} bytes)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what} found no space left; free some and run again (finished parts are safe), or use another --run"
    if error.errno in (errno.EROFS, errno.EACCES):
        return f"{what} is not permitted: the folder is read-only for this user; use another --run"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{what} needs a folder where a file is; use another --run"
    if error.errno in (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK):
        return f"{what} needs hard links, which this file system refused; use a local disk, NFS, s3:// or gs://"
    return f"{what} failed: {error.strerror or error}"


def _link(staged: Path, target: Path) -> bool:
    """link(2). Over NFS a lost reply can make success look like failure; the link count tells the truth."""
    try:
        os.link(staged, target)
    except FileExistsError:
        return os.stat(staged).st_nlink == 2
    except OSError:
        if os.stat(staged).st_nlink != 2:
            raise
    return True


def _make_folder(folder: Path) -> None:
    """mkdir -p, with each new name synced into its parent."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _umask() -> int:
    """The process's umask, read without changing it (setting it, even briefly, races other threads)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0o022
    return next((int(line.split()[1], 8) for line in status.splitlines() if line.startswith("Umask:")), 0o022)


class ObjectStore:
    """What S3 and GCS share: fsspec, with listings never cached, and put-if-absent by a conditional put."""

    scheme: ClassVar[str]
    extra: ClassVar[str]
    conflict_wait_s = 0.05  # doubled at each try
    chunk_bytes = 50 * 2**20  # objects of twice this or more go up in parts of this size

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._root = uri.removeprefix(f"{self.scheme}://").strip("/")
        if not self._root:
            raise ValueError(f"run must name a bucket, got {uri!r}; write {self.scheme}://bucket/path")
        self._session: tuple[int, Any] | None = None
        self._honours_condition = False

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str]]:
        return type(self), (self.uri,)  # connections do not travel to workers

    def _connect(self) -> Any:
        raise NotImplementedError

    def _filesystem(self) -> Any:
        """One connection per process; fsspec lets threads share it."""
        if self._session is None or self._session[0] != os.getpid():
            try:
                self._session = (os.getpid(), self._connect())
            except ImportError as error:
                remedy = f"pip install 'dermafactory[{self.extra}]'"
                raise ValueError(
                    f"run must be on a store whose client is installed, got {self.uri}; {remedy}"
                ) from error
        return self._session[1]

    def _key(self, path: str) -> str:
        return f"{self._root}/{relative(path)}"

    def read(self, path: str) -> bytes:
        with self._explained():
            return cast(bytes, self._filesystem().cat_file(self._key(path)))

    def open(self, path: str) -> BinaryIO:
        with self._explained():
            return cast(BinaryIO, self._filesystem().open(self._key(path), "rb", block_size=2**22))

    def exists(self, path: str) -> bool:
        try:
            self.size(path)
        except FileNotFoundError:
            return False
        return True

    def size(self, path: str) -> int:
        with self._explained():
            info = self._filesystem().info(self._key(path))
        if info["type"] != "file":
            raise FileNotFoundError(path)
        return int(info["size"])

    def list(self, prefix: str) -> list[str]:
        folder = self._key(prefix) if prefix else self._root
        with self._explained():
            found = self._filesystem().find(folder)
        return sorted(k.removeprefix(self._root + "/") for k in found if k.startswith(folder + "/") and k[-1] != "/")

    def put_if_absent(self, path: str, data: bytes) -> bool:
        if not self._honours_condition:
            if self._create(_PROBE, b"") and self._create(_PROBE, b""):
                raise StorageError(
                    f"{self.uri}: this endpoint overwrote an object despite If-None-Match, so two writers could "
                    "both win; use a store with conditional writes, a local disk or NFS"
                )
            self._honours_condition = True
        return self._create(path, data)

    def _create(self, path: str, data: bytes) -> bool:
        for attempt in range(6):
            try:
                with self._explained():
                    self._filesystem().pipe_file(self._key(path), data, mode="create", chunksize=self.chunk_bytes)
                return True
            except FileExistsError:
                return False
            except OSError as error:
                if _http_status(error) == 412:  # a look-alike that leaves out which condition failed
                    return False
                if _http_status(error) != 409:  # 409: another put is under way; S3 asks to try again
                    raise
            time.sleep(self.conflict_wait_s * 2**attempt)
        raise StorageError(f"{self.uri}: writing {path} met another writer six times; run again to resume")

    def replace(self, path: str, data: bytes) -> None:
        with self._explained():
            self._filesystem().pipe_file(self._key(path), data, chunksize=self.chunk_bytes)

    def delete(self, path: str) -> None:
        with self._explained(), suppress(FileNotFoundError):
            self._filesystem().rm_file(self._key(path))

    def sweep(self, older_than_s: float = 3600.0) -> int:
        """Nothing: a put appears whole or not at all. Abandoned multipart uploads are for a bucket lifecycle rule."""
        return 0

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as error:
            raise StorageError(f"{self.uri}: access denied ({error}); check the credentials and the policy") from error
        except FileNotFoundError as error:
            if "bucket" not in str(error):
                raise
            raise StorageError(f"{self.uri}: {error}; create the bucket, or use another --run") from error
        except OSError:
            raise
        except ImportError:
            raise
        except Exception as error:  # the clients' own families: no credentials, no route to the endpoint
            if type(error).__module__.partition(".")[0] not in (
                "botocore",
                "aiobotocore",
                "aiohttp",
                "gcsfs",
                "google",
            ):
                raise
            raise StorageError(f"{self.uri}: {error}; check the credentials and the endpoint") from error


def _http_status(error: BaseException) -> int | None:
    """The HTTP status behind an s3fs error, if a response came."""
    response = getattr(error.__cause__, "response", None) or {}
    return cast("int | None", response.get("ResponseMetadata", {}).get("HTTPStatusCode"))


class S3Store(ObjectStore):
    """S3 and its look-alikes, by s3fs: `pipe_file(mode="create")` sends If-None-Match on single and multipart puts."""

    scheme, extra = "s3", "s3"

    def _connect(self) -> Any:
        import s3fs

        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        return s3fs.S3FileSystem(endpoint_url=endpoint, use_listings_cache=False)


class GCSStore(ObjectStore):
    """Google Cloud Storage, by gcsfs (`mode="create"` sends ifGenerationMatch=0).

    Untested here: it is written from gcsfs's interface and has not met a real bucket. The probe of
    `put_if_absent` still refuses to go on if the condition were not honoured.
    """

    scheme, extra = "gs", "gcs"

    def _connect(self) -> Any:
        import gcsfs

        return gcsfs.GCSFileSystem(use_listings_cache=False)
