"""One writer per folder: a lock file with the holder's name, also where several machines share a file system.

    with exclusive_lock(run_dir / "run.lock", shared=False, folder=run_dir) as lock:
        ...                # now and then: lock.check()

On one machine flock decides, which the system releases when the process dies. Not every network file system carries
flock to other machines, so the holder also touches its file every BEAT_S seconds. A process on another machine takes
the lock over once the file has been silent for SILENT_BEATS of them, and the former holder finds its name gone.

The file holds two lines for each holder, a title and JSON. Who holds it alone replaces what is there; who shares it
appends, also the line that says that it has ended, since two of them may write at the same time.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.common.errors import UserError
from pipeline.common.text import printable

BEAT_S = 5.0  # between two touches of the lock file
SILENT_BEATS = 6  # without a touch, after which another machine's holder counts as dead
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP})
_LARGEST = 1 << 16  # bytes of a lock file that are read, its last ones


class FolderLock:
    """A lock that is held. ``check`` says whether it still is; ``file`` is the lock file."""

    def __init__(self, path: Path, file: IO[bytes], shared: bool, folder: Path) -> None:
        """Write the holder's name into the flock'd ``file`` and begin to touch it. ``folder``: for messages."""
        self.file = file
        self._path, self._shared, self._folder = path, shared, folder
        # Tells this holder from one of the same number, on a machine of the same name
        self._id = secrets.token_hex(8)
        self._text = _describe_this_process(shared, self._id)
        self._lost: str | None = None
        self._ended = threading.Event()
        if shared:
            dead = [holder.id for holder in _holders(_read(path)) if not holder.shared]
            file.write(b"".join(map(_ended, dead)) + self._text)
        else:
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
        """End the beats, and take the name out of the file, so that nobody waits for this process."""
        self._ended.set()
        self._thread.join()
        if self._shared:
            with suppress(OSError):  # as a full disk; the beats have ended, so nobody waits for long
                self.file.write(_ended(self._id))
        elif _read(self._path) == self._text:
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
                self._lost = f"{_named(found)} has taken over {self._path}"
            if self._lost is not None:
                return


@dataclass(frozen=True)
class _Holder:
    """One that a lock file names."""

    title: str
    machine: list[str]
    pid: int
    shared: bool
    id: str


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
        raise _held(_named(_read(path)), folder) from None
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
    return UserError(f"{title} is writing to {folder}: wait for it, or end it, then try again")


def _wait_for_silence(path: Path, shared: bool, flocked: bool, folder: Path) -> None:
    """Return when no process of another machine holds the lock; raise UserError as soon as one is seen to live."""
    holders = _holders(_read(path))
    if shared and all(holder.shared for holder in holders):
        return
    here = _machine()
    others = [holder for holder in holders if holder.machine != here or (not flocked and _lives(holder.pid))]
    if not others:
        return
    title = others[-1].title
    touched, now = _times(path)
    seen = time.monotonic()
    left_s = BEAT_S * SILENT_BEATS - (now - touched)
    if left_s > 0:
        print(
            f"note: {title} may still be writing to {folder}: waiting up to {left_s:.0f} s to see whether it is",
            file=sys.stderr,
            flush=True,
        )
    while time.monotonic() - seen < left_s:
        time.sleep(min(0.2 * BEAT_S, left_s))
        if _times(path)[0] != touched:
            raise _held(title, folder)


def _times(path: Path) -> tuple[float, float]:
    """When the file was touched, and now: seconds, both by the clock of its file system."""
    with open(path, "rb") as file:  # opening it makes a network file system ask its server
        touched = os.fstat(file.fileno()).st_mtime
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.tmp-") as probe:
        return touched, os.fstat(probe.fileno()).st_mtime


def _describe_this_process(shared: bool, id: str) -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    title = f"{Path(sys.argv[0]).name} (process {os.getpid()} on {socket.gethostname()}, since {since})"
    about = {"machine": _machine(), "pid": os.getpid(), "shared": shared, "id": id}
    return f"{title}\n{json.dumps(about)}\n".encode()


def _ended(id: str) -> bytes:
    return f"{json.dumps({'ended': id})}\n".encode()


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
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LARGEST))
            return file.read(_LARGEST)
    except FileNotFoundError:
        return b""


def _named(text: bytes) -> str:
    """Who holds the lock by what its file says, the last of several."""
    holders = _holders(text)
    if holders:
        return holders[-1].title
    first = text.partition(b"\n")[0]  # of a version that had no beats
    # Nothing, or that all have ended: the holder has not written its name yet
    return "another process" if not first or first.startswith(b"{") else _title(first)


def _title(line: bytes) -> str:
    return printable(line.decode(errors="replace"))


def _holders(text: bytes) -> list[_Holder]:
    """The holders that a lock file names and that have not ended; none for one of a version that had no beats."""
    found: dict[str, _Holder] = {}
    title = b""
    for line in text.splitlines():
        try:
            about = json.loads(line)
            if "ended" in about:
                found.pop(str(about["ended"]), None)
            else:
                machine, pid, shared, id = (about[key] for key in ("machine", "pid", "shared", "id"))
                found[str(id)] = _Holder(_title(title), list(machine), int(pid), bool(shared), str(id))
        except (ValueError, TypeError, KeyError, RecursionError):
            title = line
    return list(found.values())
