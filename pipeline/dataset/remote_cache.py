"""The local cache of remote shards: complete files, limited in total size, shared by processes.

A file is named by its sha256, so any process may use a file that another fetched, and no outdated file is mistaken for
a current one. The process that holds the lock of NAME.part fetches it, the others wait; the system releases the locks
of a dead process. Room is managed under one lock of the folder: a file's full size is reserved before its first byte is
fetched.

What lies in the folder is not trusted. It must belong to this user alone (--cache-shared: to users who trust one
another), no link is followed, only regular files are opened, and a process compares each file with its sha256 when it
opens it for the first time. The CRC-32 of single images finds what rots afterwards; it is no defence against intent.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pipeline.common.errors import UserError, require
from pipeline.common.files import disk_errors
from pipeline.common.flags import own_flags
from pipeline.common.locations import LocalPath
from pipeline.dataset.remote_files import FetchCancelledError, RemoteFolder

LEASE_S = (
    600.0  # a file that was used or renewed so recently is not removed by processes that do not know its future use
)
_BUSY_POLL_S = 0.05  # while another process or thread fetches the same file
WRONG_ATTEMPTS = 3  # whole downloads with another checksum before the source counts as wrong


_ROOM_LOCK = "room.lock"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[0-9a-f]{64}-(\d+)\.part")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class _Claim(Enum):
    BUSY = "another process or thread fetches the file"
    FULL = "there is no room for the file"


IsNeeded = Callable[[str], bool | None]  # sha256 -> needed (True), not needed (False), unknown (None)


@own_flags
@dataclass(frozen=True)
class CacheConfig:
    """The local cache of remote datasets."""

    # Folder on a disk of this machine for the shards of a remote dataset; default: siamstream in the user's cache
    # folder.
    cache_dir: LocalPath | None = None
    # Limit of that folder, such as 500MB or 1.5TB.
    cache_size: str = "200GB"
    # Shards that a machine fetches at a time.
    fetch_threads: int = 8
    # Minutes of failures in a row before a run ends.
    retry_minutes: float = 30.0
    # Accept a cache folder that other users can write to; all of them must be trusted.
    cache_shared: bool = False

    def __post_init__(self) -> None:
        _ = self.limit
        require("--fetch-threads", self.fetch_threads, self.fetch_threads >= 1, "at least 1 shard is fetched at a time")
        require("--retry-minutes", self.retry_minutes, self.retry_minutes >= 0, "it is 0 minutes or more")

    @property
    def limit(self) -> int:
        """``cache_size`` in bytes."""
        match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) ?([KMGT]?)B?", self.cache_size.strip(), re.IGNORECASE)
        size = 0 if match is None else int(float(match[1]) * _UNITS[match[2].upper()])
        if size <= 0:
            raise UserError(f"--cache-size {self.cache_size!r}: write it as 200GB, 500MB or 1.5TB")
        return size

    @property
    def folder(self) -> Path:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return self.cache_dir or base / "siamstream"


@dataclass(frozen=True)
class RemoteFile:
    """One file of a remote folder, with its expected size and checksum."""

    name: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Raise UserError unless ``sha256`` is a checksum: it becomes a file's name."""
        if not _SHA256.fullmatch(self.sha256):
            raise UserError(f"dataset.json gives {self.name} no sha256: write the dataset again with --overwrite")


class CacheFolder:
    """The folder of --cache-dir."""

    def __init__(self, config: CacheConfig) -> None:
        """Makes it. Raises UserError if it cannot be made or its file system has no locks."""
        self.path = config.folder
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o777 if config.cache_shared else 0o700, exist_ok=True)
            _check_owner(self.path, config.cache_shared)
            with self.locked(_ROOM_LOCK):
                pass
        except OSError as error:
            raise UserError(
                f"--cache-dir {self.path} cannot be used ({error.strerror}): name a folder on a disk of this machine"
            ) from error

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold lock file ``name`` of the folder; waits while another process or thread holds it."""
        handle = _open_regular(self.path / name, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


class ShardCache:
    """Files of one remote folder, through the cache's folder. Thread-safe."""

    def __init__(self, remote: RemoteFolder, config: CacheConfig) -> None:
        """Makes the folder. Raises UserError as ``CacheFolder``."""
        cache = CacheFolder(config)
        self.remote, self.limit, self.folder, self.locked = remote, config.limit, cache.path, cache.locked
        self._compared: set[tuple[int, int, int]] = set()  # device, inode and size of files whose sha256 was right

    def open(self, file: RemoteFile, needed: IsNeeded, cancelled: threading.Event) -> int | None:
        """A handle for reading ``file``, fetched if it is absent; the caller closes it. None: no room.

        Files that are ``needed`` are not removed. Raises UserError if the file cannot be fetched, FetchCancelledError
        if ``cancelled`` is set meanwhile.
        """
        with self._disk_trouble():
            while True:
                handle = self._open_whole(file)
                if handle is not None:
                    return handle
                part = self._claim(file, needed)
                if part is _Claim.FULL:
                    return None
                if isinstance(part, int):
                    return self._fill(part, file, cancelled)
                if cancelled.wait(_BUSY_POLL_S):
                    raise FetchCancelledError(file.name)

    def fetch(self, file: RemoteFile, needed: IsNeeded, cancelled: threading.Event) -> bool:
        """Fetch ``file`` unless it is there or being fetched; False if there is no room now. Raises as ``open``."""
        with self._disk_trouble():
            if self.has(file):
                self.renew_lease(file)
                return True
            part = self._claim(file, needed)
            if isinstance(part, int):
                os.close(self._fill(part, file, cancelled))
            return part is not _Claim.FULL

    def has(self, file: RemoteFile) -> bool:
        return self._path(file).exists()

    def discard(self, file: RemoteFile) -> None:
        """Remove a damaged file."""
        self._path(file).unlink(missing_ok=True)

    def renew_lease(self, file: RemoteFile) -> None:
        """Protect the file, if it is there, from processes that do not know that it will be needed."""
        with suppress(FileNotFoundError):  # removed or not there yet: it is fetched when it is needed
            os.utime(self._path(file))

    def _path(self, file: RemoteFile) -> Path:
        return self.folder / f"{file.sha256}{Path(file.name).suffix}"

    def _open_whole(self, file: RemoteFile) -> int | None:
        try:
            handle = _open_regular(self._path(file), os.O_RDONLY)
        except FileNotFoundError:
            return None
        found = os.fstat(handle)
        known = found.st_dev, found.st_ino, found.st_size
        if found.st_size == file.bytes and (known in self._compared or _sha256(handle) == file.sha256):
            self._compared.add(known)
            return handle
        os.close(handle)
        self.discard(file)
        return None

    def _claim(self, file: RemoteFile, needed: IsNeeded) -> int | _Claim:
        """The handle of NAME.part, locked and with room reserved for all of it, or why that is impossible."""
        path = self.folder / f"{file.sha256}-{file.bytes}.part"
        with self.locked(_ROOM_LOCK):
            part = _open_regular(path, os.O_RDWR | os.O_CREAT)
            outcome = None
            if not _try_lock(part):
                outcome = _Claim.BUSY
            elif self._path(file).exists():  # it was finished a moment ago, perhaps under this handle
                outcome = _Claim.BUSY
                path.unlink(missing_ok=True)
            elif not self._make_room(needed, keep=path.name):
                outcome = _Claim.FULL
                path.unlink()
            if outcome is not None:
                os.close(part)
                return outcome
        return part

    def _fill(self, part: int, file: RemoteFile, cancelled: threading.Event) -> int:
        """Fetch into ``part``, check it, rename it; returns its handle. Continues the part of a dead process."""
        path = self.folder / f"{file.sha256}-{file.bytes}.part"
        try:
            for _ in range(WRONG_ATTEMPTS):
                if self._fetch(part, file, cancelled) == file.sha256:
                    self._put_in_place(part, path, file)
                    found = os.fstat(part)
                    self._compared.add((found.st_dev, found.st_ino, found.st_size))
                    return part
                os.ftruncate(part, 0)
        except BaseException:
            os.close(part)
            raise
        path.unlink()
        os.close(part)
        raise UserError(
            f"{file.name} of {self.remote.url} is not what its dataset.json says: its sha256 differed "
            f"{WRONG_ATTEMPTS} times; upload it again from where the dataset was made"
        )

    def _put_in_place(self, part: int, path: Path, file: RemoteFile) -> None:
        with self.locked(_ROOM_LOCK):  # a process that measures the folder sees one of both names
            path.rename(self._path(file))
        fcntl.flock(part, fcntl.LOCK_UN)

    def _fetch(self, part: int, file: RemoteFile, cancelled: threading.Event) -> str:
        """Append the missing bytes; returns the sha256 of the complete file."""
        digest, offset = hashlib.sha256(), 0
        while piece := os.pread(part, 1 << 20, offset):
            digest.update(piece)
            offset += len(piece)
        for piece in self.remote.pieces(file.name, file.bytes, offset, cancelled):
            digest.update(piece)
            written = 0
            while written < len(piece):
                written += os.pwrite(part, memoryview(piece)[written:], offset + written)
            offset += len(piece)
        return digest.hexdigest()

    def _make_room(self, needed: IsNeeded, keep: str) -> bool:
        """Remove files, the longest unused first, until the folder is within the limit; False if that is impossible.

        A file stays if it is ``needed``, or if that is unknown and its lease has not ended.
        """
        entries, used = [], 0
        for entry in os.scandir(self.folder):
            size, changed = _size(entry)
            used += size
            if entry.name != keep:
                entries.append((changed, size, entry))
        now = time.time()
        for changed, size, entry in sorted(entries, key=lambda one: one[0]):
            if used <= self.limit:
                break
            ours = needed(entry.name[:64])
            if ours or (ours is None and now - changed < LEASE_S) or not _remove(entry):
                continue
            used -= size
        return used <= self.limit

    def _disk_trouble(self) -> AbstractContextManager[None]:
        """Turn errors of the cache's disk into UserError: an OSError would count as a bad sample."""
        doing = f"using --cache-dir {self.folder}"
        again = "then run the same command again (pretrain.py with --resume)"
        return disk_errors(doing, f"{doing} failed", f"check the disk or name another folder, {again}")


def _check_owner(folder: Path, shared: bool) -> None:
    """Raise UserError for a folder in which other users can put files, unless that is wanted."""
    found = folder.stat()
    if shared:
        return
    private_group = found.st_gid == found.st_uid  # each user's own group, which many systems make
    others = found.st_mode & stat.S_IWOTH or (found.st_mode & stat.S_IWGRP and not private_group)
    if found.st_uid != os.geteuid() or others:
        raise UserError(
            f"--cache-dir {folder} can be written by other users, who could put other images there: name a folder of "
            f"your own (or chmod go-w {folder}), or add --cache-shared if you trust all of them"
        )


def _open_regular(path: Path, flags: int) -> int:
    """A handle of a regular file. Raises UserError for anything else, and FileNotFoundError."""
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return handle
        os.close(handle)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
    raise UserError(f"{path} in the cache is no regular file: remove it, and look at who put it there")


def _sha256(handle: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while piece := os.pread(handle, 1 << 20, offset):
        digest.update(piece)
        offset += len(piece)
    return digest.hexdigest()


def _size(entry: os.DirEntry[str]) -> tuple[int, float]:
    """The size that a file of the cache has or reserves, and when it was last used or renewed."""
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return 0, 0.0  # renamed or removed meanwhile
    part = _PART.fullmatch(entry.name)
    return int(part[1]) if part else found.st_size, found.st_mtime


def _remove(entry: os.DirEntry[str]) -> bool:
    """Remove a file of the cache unless it is not one or is being fetched."""
    if not _SHA256.match(entry.name):
        return False
    try:
        handle = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if _PART.fullmatch(entry.name) and not _try_lock(handle):
                return False
            os.unlink(entry.path)
        finally:
            os.close(handle)
    except FileNotFoundError:
        return True  # another process was faster
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        return False  # no file of ours
    return True


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True
