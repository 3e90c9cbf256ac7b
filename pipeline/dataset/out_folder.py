"""The folder that a dataset is written to, on a disk or in a bucket: files appear whole or not at all.

    out = open_out(location("s3://bucket/photos"))
    with out.lock("make_shards.py", part=None), out.writer("dataset.json") as file:
        file.write(...)

A large file of a bucket is sent in parts, which become an object only with the last request; a killed process leaves
none. ``LocalOut`` does the same with a temporary file and a rename.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import os
import shutil
import socket
import stat
import sys
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol, cast

from pipeline.common.errors import UserError
from pipeline.common.files import (
    atomic_file,
    disk_errors,
    json_bytes,
    read_regular,
    real_folder,
)
from pipeline.common.locations import Url
from pipeline.common.locks import FolderLock, exclusive_lock, make_exclusive
from pipeline.dataset.format import PARTIAL_DIR
from pipeline.dataset.remote_files import RemoteFolder, write_error

PART = 16 << 20  # bytes of a part of a large file; S3 allows 10,000 parts of 5 MB or more
RETRY_MINUTES = 30.0  # of failures in a row before the work ends, as with datasets that are read
REQUESTS_AT_ONCE = 32
RENEW_S = 10.0  # between two signs of life in the lock of a bucket
LEASE_S = 60.0  # without a sign of life, after which a lock counts as left by a killed process
_READ_ONLY = frozenset({"http", "https", "hf"})
_LOCK, _COMPLETING = f"{PARTIAL_DIR}/lock", f"{PARTIAL_DIR}/lock-complete"


class Lock(Protocol):
    """The right to write to a folder, shared by the parts of one job."""

    def make_exclusive(self) -> None:
        """Wait until no other part writes."""

    def check(self) -> None:
        """Raise UserError if another process has taken the lock meanwhile."""


class OutFolder(Protocol):
    """Where a dataset is written; names are relative, with slashes. Raises OSError or UserError as the place does."""

    place: Path | Url

    def exists(self) -> bool:
        """Whether there is such a folder."""

    def has(self, name: str) -> bool:
        """Whether there is a file ``name``."""

    def read(self, name: str) -> bytes | None:
        """A small file; None if it is not there."""

    def read_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """Small files in this order, several ahead."""

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of every file directly in the folder ``below``, by name; {} if there is no such folder."""

    def writer(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file that appears when the block ends without an error."""

    def large(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """As ``writer``, for a file that fits on this machine's disk: it is sent again if that fails."""

    def remove(self, names: Iterable[str]) -> None:
        """Delete files; those that are not there do not matter."""

    def remove_partial(self) -> None:
        """Delete PARTIAL_DIR with all that is in it, and the folder if nothing else was."""

    def clear_partial(self, keep: str) -> None:
        """Delete what is in PARTIAL_DIR, but for the locks and the file ``keep``."""

    def lock(self, part: str | None) -> AbstractContextManager[Lock]:
        """Hold the folder against other writers; ``part``: as --part, against all but other parts."""


def open_out(place: Path | Url) -> OutFolder:
    """The folder ``place``, which need not exist. Raises UserError for a URL that nothing can be written to."""
    return RemoteOut(place) if isinstance(place, Url) else LocalOut(place)


def write_json(out: OutFolder, name: str, value: Any) -> None:
    """Write ``value`` as indented JSON, always with the same bytes."""
    with out.writer(name) as file:
        file.write(json_bytes(value))


class LocalOut:
    """A folder of a disk."""

    def __init__(self, place: Path) -> None:
        """Makes nothing."""
        self.place: Path | Url = place
        self._folder = place

    def exists(self) -> bool:
        """Whether there is such a folder."""
        return self._folder.exists()

    def has(self, name: str) -> bool:
        """Whether there is a file ``name``."""
        return (self._folder / name).exists()

    def read(self, name: str) -> bytes | None:
        """A small file; None if it is not there."""
        try:
            return read_regular(self._folder / name)
        except FileNotFoundError:
            return None

    def read_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """Small files in this order."""
        return map(self.read, names)

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of every file directly in the folder ``below``, by name."""
        folder = self._folder / below
        if not folder.is_dir():
            return {}
        with os.scandir(folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def writer(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file that appears when the block ends without an error."""
        path = self._folder / name
        if path.parent != self._folder:
            path.parent.mkdir(parents=True, exist_ok=True)
            return atomic_file(path)
        return atomic_file(path, self._folder / PARTIAL_DIR)

    large = writer

    def remove(self, names: Iterable[str]) -> None:
        """Delete files; those that are not there do not matter."""
        for name in names:
            (self._folder / name).unlink(missing_ok=True)

    def remove_partial(self) -> None:
        """Delete PARTIAL_DIR; and the folder itself if nothing else was in it."""
        if (self._folder / PARTIAL_DIR).exists():
            shutil.rmtree(self._folder / PARTIAL_DIR)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def clear_partial(self, keep: str) -> None:
        """Delete what is in PARTIAL_DIR, but for the lock and the file ``keep``."""
        for entry in (self._folder / PARTIAL_DIR).iterdir():
            if f"{PARTIAL_DIR}/{entry.name}" in (_LOCK, keep):
                continue
            if stat.S_ISDIR(entry.lstat().st_mode):
                shutil.rmtree(entry)
            else:
                entry.unlink()

    @contextmanager
    def lock(self, part: str | None) -> Iterator[Lock]:
        """Hold the folder, which is made, against other writers."""
        with disk_errors(f"making {self._folder}", f"OUT {self._folder} cannot be made", "name another folder"):
            self._folder.mkdir(parents=True, exist_ok=True)
            real_folder(self._folder / PARTIAL_DIR)
        with exclusive_lock(self._folder / _LOCK, shared=part is not None) as lock:
            if part is None:
                for left_over in (self._folder / PARTIAL_DIR).rglob("*.tmp-*"):
                    left_over.unlink()
            yield _FileLock(lock)


@dataclass(frozen=True)
class _FileLock:
    lock: FolderLock

    def make_exclusive(self) -> None:
        """Wait until no other part writes."""
        make_exclusive(self.lock.file)

    def check(self) -> None:
        """Raise UserError if another process has taken the lock meanwhile."""
        self.lock.check()


class RemoteOut:
    """A folder of a bucket. Picklable; thread-safe."""

    def __init__(self, place: Url) -> None:
        """Raises UserError for a URL that nothing can be written to, or whose file system is not installed."""
        if place.scheme in _READ_ONLY:
            raise UserError(f"OUT {place}: nothing can be written to {place.scheme}://; s3:// and gs:// can be written")
        self.place: Path | Url = place
        self._remote = RemoteFolder(place, RETRY_MINUTES)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens its own connections."""
        return RemoteOut, (self.place,)

    def exists(self) -> bool:
        """Whether there is anything below the URL."""
        return self.has("")

    def has(self, name: str) -> bool:
        """Whether there is a file ``name``."""
        return self._ask(name, lambda: bool(self._remote.fs.exists(self._remote.path(name))))

    def read(self, name: str) -> bytes | None:
        """A small file; None if it is not there."""

        def ask() -> bytes | None:
            try:
                return self._remote.fs.cat_file(self._remote.path(name))
            except FileNotFoundError:
                return None

        return self._ask(name, ask)

    def read_many(self, names: Iterable[str]) -> Iterator[bytes | None]:
        """Small files in this order, several ahead."""
        return ahead(self.read, names)

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of every file directly in the folder ``below``, by name; {} if there is no such folder."""
        path = self._remote.path(below)

        def ask() -> dict[str, int]:
            try:
                entries = self._remote.fs.ls(path, detail=True)
            except FileNotFoundError:
                return {}
            files = [entry for entry in entries if entry["type"] == "file"]
            return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in files}

        return self._ask(below or "its files", ask, "list")

    @contextmanager
    def writer(self, name: str) -> Iterator[IO[bytes]]:
        """A file that appears when the block ends without an error."""
        upload = _Upload(self._remote, name)
        try:
            yield cast(IO[bytes], upload)
            upload.commit()
        except BaseException:
            upload.discard()
            raise

    @contextmanager
    def large(self, name: str) -> Iterator[IO[bytes]]:
        """A file that is written to a temporary one, sent when the block ends without an error, and deleted."""
        with tempfile.TemporaryFile(buffering=1 << 20) as file:
            yield cast(IO[bytes], file)
            file.flush()
            self._ask(name, lambda: self._send(name, cast(IO[bytes], file)), "write")

    def _send(self, name: str, file: IO[bytes]) -> None:
        file.seek(0)
        upload = _Upload(self._remote, name, patient=False)
        try:
            shutil.copyfileobj(file, upload, PART)
            upload.commit()
        except BaseException:
            upload.discard()
            raise

    def remove(self, names: Iterable[str]) -> None:
        """Delete files; those that are not there do not matter."""

        def remove_one(name: str) -> None:
            def ask() -> None:
                with contextlib.suppress(FileNotFoundError):
                    self._remote.fs.rm_file(self._remote.path(name))

            self._ask(name, ask, "delete")

        for _ in ahead(remove_one, names):
            pass

    def remove_partial(self) -> None:
        """Delete all objects below PARTIAL_DIR."""
        self.remove(sorted(self._in_partial(), key=lambda name: name.startswith(_LOCK)))  # locks last

    def clear_partial(self, keep: str) -> None:
        """Delete what is in PARTIAL_DIR, but for the locks and the file ``keep``."""
        self.remove(name for name in self._in_partial() if name != keep and not name.startswith(_LOCK))

    def _in_partial(self) -> list[str]:
        root = self._remote.path(PARTIAL_DIR)
        found = self._ask(PARTIAL_DIR, lambda: list(self._remote.fs.find(root)), "list")
        return [PARTIAL_DIR + path.removeprefix(root) for path in found]

    @contextmanager
    def lock(self, part: str | None) -> Iterator[Lock]:
        """Hold the folder by an object with a sign of life, which others wait for."""
        others = [_LOCK] if part is not None else [f"{_LOCK}-part-*", _COMPLETING]
        for name in self.sizes(PARTIAL_DIR):
            if any(fnmatch.fnmatch(f"{PARTIAL_DIR}/{name}", other) for other in others):
                _Lease(self, f"{PARTIAL_DIR}/{name}").refuse_living()
        lease = _Lease(self, _LOCK if part is None else f"{_LOCK}-part-{part.replace('/', '-of-')}")
        lease.take(wait=False)
        completing = _Lease(self, _COMPLETING)
        try:
            yield _BucketLock(lease, completing)
        finally:
            completing.release()
            lease.release()

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that is not there yet; False if it is."""

        def ask() -> bool:
            try:
                self._remote.fs.pipe_file(self._remote.path(name), data, mode="create")
            except FileExistsError:
                return False
            return True

        return self._ask(name, ask, "write")

    def put(self, name: str, data: bytes) -> None:
        """Write a small file."""
        self._ask(name, lambda: self._remote.fs.pipe_file(self._remote.path(name), data), "write")

    def _ask(self, name: str, ask: Callable[[], Any], doing: str = "read") -> Any:
        return self._remote.request(name, ask, doing=doing)


def ahead(work: Callable[[Any], Any], names: Iterable[Any]) -> Iterator[Any]:
    """``work(name)`` of each in order, REQUESTS_AT_ONCE at a time, of which few results are kept."""
    todo = iter(names)
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        running = deque(pool.submit(work, name) for name in islice(todo, 2 * REQUESTS_AT_ONCE))
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(work, name) for name in islice(todo, 1))
            yield result


class _Upload(io.RawIOBase):
    """A file of a bucket that grows: a small one is sent whole, a larger one in parts of which nothing is seen yet."""

    def __init__(self, remote: RemoteFolder, name: str, patient: bool = True) -> None:
        """``patient``: a small file is sent again until it arrives."""
        super().__init__()
        self._remote, self._name, self._patient = remote, name, patient
        self._small = bytearray()
        self._parts: Any = None
        self._size = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        """Bytes written."""
        return self._size

    def write(self, data: Any) -> int:
        """Take all of ``data``."""
        view = memoryview(data).cast("B")
        self._size += len(view)
        if self._parts is None and len(self._small) + len(view) <= PART:
            self._small += view
            return len(view)
        with _write_errors(self._remote, self._name, self._patient):
            if self._parts is None:
                self._parts = self._remote.fs.open(
                    self._remote.path(self._name), "wb", block_size=PART, autocommit=False
                )
                self._parts.write(bytes(self._small))
                self._small.clear()
            for start in range(0, len(view), PART):
                self._parts.write(view[start : start + PART])
        return len(view)

    def commit(self) -> None:
        """Let the file appear."""
        if self._parts is not None:
            with _write_errors(self._remote, self._name, self._patient):
                self._parts.close()
                self._parts.commit()
                self._parts = None
        elif self._patient:
            path, data = self._remote.path(self._name), bytes(self._small)
            self._remote.request(self._name, lambda: self._remote.fs.pipe_file(path, data), doing="write")
        else:
            self._remote.fs.pipe_file(self._remote.path(self._name), bytes(self._small))

    def discard(self) -> None:
        """Forget the file, and what was sent of it."""
        if self._parts is not None:
            parts, self._parts = self._parts, None
            parts.forced = parts.closed = True  # or its destructor would send the rest
            try:
                parts.discard()
            except Exception as error:  # noqa: BLE001  each file system has errors of its own
                print(
                    f"note: parts of {self._name} are left in {self._remote.url} ({type(error).__name__}); a rule of "
                    "the bucket for incomplete uploads removes them",
                    file=sys.stderr,
                )


@contextmanager
def _write_errors(remote: RemoteFolder, name: str, patient: bool) -> Iterator[None]:
    """Describe the file system's errors as ``request`` does; the parts of a large file cannot be sent again by name."""
    try:
        yield
    except Exception as error:
        if not patient or isinstance(error, UserError):
            raise
        raise write_error(remote.url, name, error) from None


def _here() -> str:
    """This machine since it was started, and this container of it: within it, process numbers are unique."""
    parts = [socket.gethostname()]
    for file in ("/proc/sys/kernel/random/boot_id",):
        with contextlib.suppress(OSError):
            parts.append(Path(file).read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


class _Lease:
    """An object of a bucket that one process renews while it lives."""

    def __init__(self, out: RemoteOut, name: str) -> None:
        self._out, self._name = out, name
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost = ""  # who has taken it

    def refuse_living(self) -> None:
        """Raise UserError if a living process holds it; remove it otherwise."""
        if self._holder_lives():
            raise UserError(self._busy())
        self._out.remove([self._name])

    def take(self, wait: bool) -> None:
        """Hold it. Raises UserError if a living process does, unless ``wait``."""
        while not self._out.create(self._name, self._sign()):
            if self._holder_lives():
                if not wait:
                    raise UserError(self._busy())
                time.sleep(1.0)
            else:
                self._out.remove([self._name])
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise UserError if another process has it."""
        if self._lost:
            raise UserError(
                f"{self._lost} has begun to write to {self._out.place}, since this process gave no sign of life for "
                f"{LEASE_S:.0f} s: let it end, then run the same command again"
            )

    def release(self) -> None:
        """Let others have it."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None
            if not self._lost:
                self._out.remove([self._name])

    def _sign(self) -> bytes:
        holder = f"{Path(sys.argv[0]).name} (process {os.getpid()} on {socket.gethostname()})"
        sign = {"holder": holder, "token": self._token, "pid": os.getpid(), "where": _here(), "sign": uuid.uuid4().hex}
        return json.dumps(sign).encode()

    def _seen(self) -> dict[str, Any] | None:
        data = self._out.read(self._name)
        try:
            return None if data is None else dict(json.loads(data))
        except (ValueError, TypeError):
            return {}

    def _busy(self) -> str:
        holder = (self._seen() or {}).get("holder", "another process")
        return f"{holder} is writing to {self._out.place}: wait for it, or end it, then try again"

    def _holder_lives(self) -> bool:
        """Whether the lock is renewed within LEASE_S. A process of this machine that is gone is known at once."""
        first = self._seen()
        if first is None:
            return False
        if first.get("where") == _here() and not _runs(first.get("pid")):
            return False
        end = time.monotonic() + LEASE_S
        while time.monotonic() < end:
            time.sleep(RENEW_S / 10)
            now = self._seen()
            if now is None:
                return False
            if now.get("sign") != first.get("sign"):
                return True
        return False

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            try:
                now = self._seen()
                if now is not None and now.get("token") not in (None, self._token):
                    self._lost = str(now.get("holder"))
                    return
                self._out.put(self._name, self._sign())
            except UserError as error:  # the work itself meets the same failure
                print(f"note: the lock of {self._out.place} cannot be renewed: {error}", file=sys.stderr, flush=True)


def _runs(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, TypeError):
        return False
    except PermissionError:
        return True
    return True


@dataclass(frozen=True)
class _BucketLock:
    lease: _Lease
    completing: _Lease

    def make_exclusive(self) -> None:
        """Wait until no other part completes the dataset."""
        self.completing.take(wait=True)

    def check(self) -> None:
        """Raise UserError if another process has taken the lock meanwhile."""
        self.lease.check()
