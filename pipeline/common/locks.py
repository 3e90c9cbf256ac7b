"""One writer per folder: a lock file with the holder's name, also where several machines share a file system.

    with exclusive_lock(run_dir / "run.lock", shared=False, folder=run_dir) as lock:
        ...                # now and then: lock.check()

On one machine flock decides, which the system releases when the process dies. Not every network file system carries
flock to other machines, so the holder also touches its file every BEAT_S seconds. A process on another machine takes
the lock over once the file has been silent for SILENT_BEATS of them, and the former holder finds its name gone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.common.errors import UserError
from pipeline.common.text import printable

BEAT_S = 5.0  # between two touches of the lock file
SILENT_BEATS = 6  # without a touch, after which another machine's holder counts as dead
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP})
_LARGEST = 1 << 16  # bytes of a lock file that are read


class FolderLock:
    """A lock that is held. ``check`` says whether it still is; ``file`` is the lock file."""

    def __init__(self, path: Path, file: IO[bytes], shared: bool, folder: Path) -> None:
        """Write the holder's name into the flock'd ``file`` and begin to touch it. ``folder``: for messages."""
        self.file = file
        self._path, self._shared, self._folder = path, shared, folder
        self._text = _describe_this_process(shared)
        self._lost: str | None = None
        self._ended = threading.Event()
        file.truncate(0)
        file.write(self._text)
        file.flush()
        os.fsync(file.fileno())
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    @property
    def is_lost(self) -> bool:
        """Whether the folder was deleted, or another process has taken over."""
        return self._lost is not None

    def check(self) -> None:
        """Raise UserError if the lock was lost: what this process writes from here on would mix with another's."""
        if self._lost is not None:
            raise UserError(f"{self._lost}: this process stops, so that only one writes to {self._folder}")

    def release(self) -> None:
        """End the beats, and empty the file, so that nobody waits for this process."""
        self._ended.set()
        self._thread.join()
        if not self._shared and _read(self._path) == self._text:
            self.file.truncate(0)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                os.utime(self.file.fileno())
                there = os.path.samestat(os.stat(self._path), os.fstat(self.file.fileno()))
                found = _read(self._path)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                    continue  # a disk that fails for a moment; a later beat may reach it
                there, found = False, b""
            if not there:
                self._lost = f"{self._folder} or its {self._path.name} was deleted or moved meanwhile"
            elif not self._shared and found != self._text:
                self._lost = f"{_title(found) or 'another process'} has taken over {self._path}"
            if self._lost is not None:
                return


@dataclass(frozen=True)
class _Holder:
    """Who wrote a lock file."""

    title: str
    machine: list[str]
    pid: int
    shared: bool


@contextmanager
def exclusive_lock(path: Path, *, shared: bool, folder: Path | None = None) -> Iterator[FolderLock]:
    """Hold the lock file ``path``, made if it is not there.

    ``shared`` lets others hold it shared as well. Raises UserError with the name of the program that holds it; the
    message names ``folder``, by default that above the lock's. Waits up to BEAT_S * SILENT_BEATS if the file names a
    process of another machine that may live. On a file system without flock a note is printed, and the beats decide.
    """
    folder = folder or path.parent.parent
    file, flocked = _open_locked(path, shared, folder)
    with file:
        _wait_for_silence(path, shared, flocked, folder)
        lock = FolderLock(path, file, shared, folder)
        try:
            yield lock
        finally:
            lock.release()


def make_exclusive(file: IO[bytes]) -> None:
    """Wait until a shared flock is exclusive; returns at once on a file system without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _open_locked(path: Path, shared: bool, folder: Path) -> tuple[IO[bytes], bool]:
    """The lock file, and whether flock holds it; False on file systems without. UserError if another holds it."""
    while True:
        try:
            file = _open_regular(path)
        except FileNotFoundError:
            raise UserError(f"{path.parent} was deleted meanwhile: try again") from None
        try:
            flocked = _try_flock(file, path, shared, folder)
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file, flocked
        except FileNotFoundError:
            pass  # the holder before has removed it with its folder, or is about to make it anew
        except BaseException:
            file.close()
            raise
        file.close()


def _open_regular(path: Path) -> IO[bytes]:
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        handle = os.open(path, flags, 0o644)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return open(handle, "r+b", buffering=0)
        os.close(handle)
    raise UserError(f"{path} is no regular file, but it is where a lock is kept: remove it, then try again")


def _try_flock(file: IO[bytes], path: Path, shared: bool, folder: Path) -> bool:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(_title(_read(path)), folder) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(
            f"note: no file locks at {path.parent} ({error.strerror}): start one process at a time that writes there",
            file=sys.stderr,
        )
        return False
    return True


def _held(title: str, folder: Path) -> UserError:
    holder = title or "another process"  # it has not written its name yet
    return UserError(f"{holder} is writing to {folder}: wait for it, or end it, then try again")


def _wait_for_silence(path: Path, shared: bool, flocked: bool, folder: Path) -> None:
    """Return when no process of another machine holds the lock; raise UserError as soon as one is seen to live."""
    holder = _parse(_read(path))
    if holder is None or (shared and holder.shared):
        return
    if holder.machine == _machine() and (flocked or not _lives(holder.pid)):
        return
    touched, now = _times(path)
    seen = time.monotonic()
    left_s = BEAT_S * SILENT_BEATS - (now - touched)
    if left_s > 0:
        print(
            f"note: {holder.title} may still be writing to {folder}: waiting up to {left_s:.0f} s to see whether it is",
            file=sys.stderr,
            flush=True,
        )
    while time.monotonic() - seen < left_s:
        time.sleep(min(0.2 * BEAT_S, left_s))
        if _times(path)[0] != touched:
            raise _held(holder.title, folder)


def _times(path: Path) -> tuple[float, float]:
    """When the file was touched, and now: seconds, both by the clock of its file system."""
    with open(path, "rb") as file:  # opening it makes a network file system ask its server
        touched = os.fstat(file.fileno()).st_mtime
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.tmp-") as probe:
        return touched, os.fstat(probe.fileno()).st_mtime


def _describe_this_process(shared: bool) -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    title = f"{Path(sys.argv[0]).name} (process {os.getpid()} on {socket.gethostname()}, since {since})"
    # The last entry tells this holder from one of the same number, on a machine of the same name
    about = {"machine": _machine(), "pid": os.getpid(), "shared": shared, "id": secrets.token_hex(8)}
    return f"{title}\n{json.dumps(about)}\n".encode()


def _machine() -> list[str]:
    """The machine's name, and what tells apart machines of one name where the system has it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return [socket.gethostname(), boot.read_text().strip() if boot.exists() else ""]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read(path: Path) -> bytes:
    """What a lock file says now; nothing if it is gone."""
    try:
        with open(path, "rb") as file:
            return file.read(_LARGEST)
    except FileNotFoundError:
        return b""


def _title(text: bytes) -> str:
    return printable(text.partition(b"\n")[0].decode(errors="replace"))


def _parse(text: bytes) -> _Holder | None:
    """The holder that a lock file names; None for an empty file, or one of a version that had no beats."""
    try:
        about = json.loads(text.partition(b"\n")[2])
        return _Holder(_title(text), list(about["machine"]), int(about["pid"]), bool(about["shared"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
