"""Writing files: complete or not at all; what a disk or a folder is at fault for is a UserError."""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from pipeline.common.errors import UserError

_REMEDY = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "your quota is used up: free some space or choose another disk",
    errno.EFBIG: "a file grew over the limit of this file system or of `ulimit -f`: make smaller shards or lift it",
    errno.EROFS: "the disk is mounted read-only: choose another folder",
    errno.EACCES: "check the permissions, or choose another folder",
    errno.EPERM: "check the permissions, or choose another folder",
}
# As above, but where the caller knows better what is the matter, its own words are taken
_IN_THE_WAY = {
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO), "check the disk, or choose another one"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "too many files are open: raise the limit with `ulimit -n`"),
    **dict.fromkeys(
        (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY, errno.ELOOP, errno.EINVAL),
        "a file or folder there was deleted, or something else is in its place: look at it",
    ),
    errno.ENAMETOOLONG: "the path is longer than the file system allows: choose a shorter one",
}
LARGEST_JSON = 1 << 28  # bytes; dataset.json of a million shards has 100 MB
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


_SYNC_FILE_RANGE: Any = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux only


def disk_error(error: OSError, doing: str) -> UserError | None:
    """The ``UserError`` for what a disk or a folder is at fault for; None for any other ``OSError``.

    Such as a full disk, a quota, a missing permission, a file in a folder's place, a folder that was deleted.
    """
    remedy = {**_REMEDY, **_IN_THE_WAY}.get(error.errno or 0)
    if remedy is None:
        return None
    where = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, (str, bytes, Path)) else ""
    again = "then run the same command again (training: with --resume)"
    return UserError(f"{doing} failed: {error.strerror}{where}; {remedy}, {again}")


@contextmanager
def disk_errors(doing: str, failed: str | None = None, remedy: str = "") -> Iterator[None]:
    """Turn what a disk or a folder is at fault for into a UserError that names what was being done, ``doing``.

    Any other OSError stays as it is, or becomes "``failed``: its reason; ``remedy``", a UserError too.
    """
    try:
        yield
    except OSError as error:
        if failed is not None and error.errno not in _REMEDY:
            raise UserError("; ".join(filter(None, (f"{failed}: {error.strerror}", remedy)))) from error
        user_error = disk_error(error, doing)
        if user_error is None:
            raise
        raise user_error from error


def check_writable(flag: str, path: Path) -> None:
    """Raise UserError unless a file can be written at ``path``. Call it before the work whose results it will hold."""
    there = path.exists()
    try:
        if path.is_symlink() and not there:  # a file takes its place; what it names is not made
            return
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        regular = stat.S_ISREG(os.fstat(handle).st_mode)
        os.close(handle)
        if not regular:  # a file would take the place of the device
            raise OSError(errno.EINVAL, "it is no regular file")
        if not there:
            path.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}; choose another place") from error


@contextmanager
def atomic_file(path: Path, workshop: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file that appears under ``path`` only when the block ends without an error, synced to disk.

    It is written in folder ``workshop`` (same file system; default: beside ``path``) under a name that no other process
    of any host uses; a killed process leaves files that match ``*.tmp-*``. Raises OSError as the disk does.
    """
    temporary = (workshop or path.parent) / f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}"
    try:
        with open(temporary, "wb", buffering=1 << 20, opener=_create) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _create(path: str, flags: int) -> int:
    """A new file: what a killed process of the same number left is removed, and no link is followed."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    return os.open(path, flags | os.O_EXCL | os.O_NOFOLLOW, 0o666)


def own_file(path: str, flags: int) -> int:
    """An ``opener`` for files that grow: no link is followed, and a pipe or a device is an OSError."""
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no regular file", path)
    return handle


def start_writing_back(file: IO[bytes], start: int, length: int) -> None:
    """Ask the kernel to start writing this part of a growing file to the disk, so that the final fsync waits less.

    A hint: errors of the disk are reported by fsync. Nothing happens on systems without this call.
    """
    if _SYNC_FILE_RANGE is not None:
        file.flush()
        _SYNC_FILE_RANGE(file.fileno(), ctypes.c_int64(start), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def sync_folder(path: Path) -> None:
    """Make renames inside ``path`` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any, workshop: Path | None = None) -> None:
    """Write ``value`` as indented JSON, atomically and always with the same bytes."""
    with atomic_file(path, workshop) as file:
        file.write(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """``value`` as indented JSON, always the same bytes."""
    return json.dumps(strict_json(value), indent=1, allow_nan=False).encode() + b"\n"


def strict_json(value: Any) -> Any:
    """``value`` with null in place of nan and inf, which JSON lacks: other readers refuse Python's NaN and Infinity."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: strict_json(entry) for key, entry in value.items()}
        case list() | tuple():
            return [strict_json(entry) for entry in value]
        case _:
            return value


def real_folder(path: Path) -> Path:
    """``path``, made if it is not there. Raises UserError if it is a link: work in it would end up elsewhere."""
    if path.is_symlink():
        raise UserError(f"{path} is a link to another folder: remove it, then try again")
    path.mkdir(exist_ok=True)
    return path


def open_regular(path: Path | str) -> int:
    """A handle for reading a file, which may be behind a link, as in the caches of download programs.

    Raises OSError, also at once for a pipe, a device or a folder: reading them may never end.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return handle


def check_regular(path: Path | str) -> None:
    """Raise OSError as ``open_regular``: for libraries that open files by themselves."""
    os.close(open_regular(path))


def read_regular(path: Path | str) -> bytes:
    """The contents of a file. Raises OSError as ``open_regular``."""
    with open(open_regular(path), "rb") as file:
        return file.read()


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises OSError as ``open_regular``, and ValueError for what is no JSON, or too much."""
    with open(open_regular(path), "rb") as file:
        text = file.read(LARGEST_JSON + 1)
    if len(text) > LARGEST_JSON:
        raise ValueError(f"{path} is larger than {LARGEST_JSON:,} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON, or damaged: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """As ``read_json``; ValueError for what is no object, too."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__} instead of an object")
    return value


def map_array(path: Path, mode: Literal["r", "r+"] = "r") -> np.memmap:
    """The array in a .npy file, memory-mapped. Raises OSError as ``open_regular``, and ValueError for a damaged one.

    To be written, r+, it must be no link.
    """
    if mode == "r+" and path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(path))
    check_regular(path)
    try:
        return np.load(path, mmap_mode=mode, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy raises anything on a garbled header: SyntaxError, TokenError, OverflowError
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path} holds no array, or a damaged one: {reason}") from error
