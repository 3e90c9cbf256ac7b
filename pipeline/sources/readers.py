"""Readers of image i in a folder or container file, and the spool: one copy of a source without random access."""

from __future__ import annotations

import os
import shutil
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, Any, Protocol

from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, open_regular, read_json, read_regular, write_json
from pipeline.common.locations import Url
from pipeline.common.system import progress
from pipeline.dataset.format import PARTIAL_DIR
from pipeline.dataset.out_folder import RemoteOut
from pipeline.sources.image_file import IMAGE_SUFFIXES
from pipeline.sources.listing import SYSTEM_FOLDER, Listing, ListingBuilder, is_system_folder
from pipeline.sources.remote_path import FileStatus, Handle, RemoteFile, RemotePath, SourcePath, pread

_MOST_OF_DISK = 0.5  # of the free room, for a copy that may also go to a bucket
_LISTED_AT_ONCE = 1024  # files
_MOST_OPEN = 256  # files of a ContainerReader; Linux usually allows a process 1024
SPOOL_FILE = "spool.json"  # says of what the spool is a copy


class Reader(Protocol):
    """Reads images of a listing. Small and picklable: every worker process gets a copy.

    One whose ``is_remote`` is there and true is called in several threads: its reads are requests over a network, of
    which several should be under way.
    """

    def read(self, listing: Listing, index: int) -> bytes:
        """The encoded bytes of image ``index``. Raises OSError."""


@dataclass(frozen=True)
class Source:
    """Images in a fixed order (sorted by name), not yet shuffled."""

    listing: Listing
    reader: Reader
    labels_from: str | None = None  # what the labels are from, for people: "folders"; None: there are none yet
    has_folders: bool = True  # whether the folders in the names may be classes
    notes: tuple[str, ...] = ()  # choices made while listing that the user should know, one line each


@dataclass(frozen=True)
class FolderReader:
    """Images as files below ``root``."""

    root: Path

    def read(self, listing: Listing, index: int) -> bytes:
        return read_regular(os.path.join(self.root, listing.name(index)))


@dataclass(frozen=True)
class RemoteFolderReader:
    """Images as files below a URL."""

    root: RemotePath
    is_remote = True

    def read(self, listing: Listing, index: int) -> bytes:
        """One file's bytes. Raises UserError, also if it has changed since it was listed."""
        status = FileStatus(int(listing.lengths[index]), listing.version(index))
        file = self.root / listing.name(index)
        return RemotePath(file.inner, file.root, status).read(0, status.st_size)


@dataclass(frozen=True)
class ContainerReader:
    """Images as byte ranges of one file, or of several whose offsets go on from one to the next."""

    paths: tuple[SourcePath, ...]
    starts: tuple[int, ...] = (0,)  # offset of the first byte of each file, ascending

    @property
    def is_remote(self) -> bool:
        """Whether reads are requests over a network, of which several should be under way."""
        return any(isinstance(path, RemotePath) for path in self.paths)

    @cached_property
    def _handles(self) -> OrderedDict[int, Handle]:
        return OrderedDict()

    @cached_property
    def _lock(self) -> threading.Lock:
        return threading.Lock()

    def locate(self, offset: int) -> tuple[Handle, int]:
        """(open file, byte in it) of an offset in a listing. Raises OSError."""
        number = bisect_right(self.starts, offset) - 1
        with self._lock:
            if number not in self._handles:
                if len(self._handles) >= _MOST_OPEN:
                    _, oldest = self._handles.popitem(last=False)
                    if isinstance(oldest, int):
                        os.close(oldest)
                path = self.paths[number]
                if isinstance(path, RemotePath):
                    self._handles[number] = RemoteFile(path, ahead=False)
                else:
                    self._handles[number] = open_regular(path)
            return self._handles[number], offset - self.starts[number]

    def read(self, listing: Listing, index: int) -> bytes:
        handle, offset = self.locate(int(listing.offsets[index]))
        return pread(handle, int(listing.lengths[index]), offset)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the paths only: an open handle has no meaning in another process."""
        return {"paths": self.paths, "starts": self.starts}


def list_folder(top: Path, quiet: bool, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> ListingBuilder:
    """All files below a folder; ``suffixes``: those of images. Hidden files are skipped; a link to a folder above is
    not followed.
    """
    builder = ListingBuilder(str(top), suffixes)
    try:
        with progress(quiet, unit=" files", desc=f"listing {top}") as bar:
            files = _walk(top, "", (), builder)
            while some := list(islice(files, _LISTED_AT_ONCE)):
                builder.add_files(*zip(*some, strict=True))
                bar.update(len(some))
    except PermissionError as error:
        raise UserError(f"cannot list {error.filename}: permission denied; change its permissions") from error
    return builder


def _walk(
    folder: Path, prefix: str, above: tuple[tuple[int, int], ...], builder: ListingBuilder
) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every file below ``folder``. ``above``: (device, inode) of its parents, to find loops."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        builder.reject(prefix.rstrip("/"), "a link to a folder above it")
        return
    with os.scandir(folder) as entries:
        # In the order of the whole paths' bytes, in which a folder's name is followed by a slash
        ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name) + (b"/" if _is_folder(entry) else b""))
        for entry in ordered:
            if entry.name.startswith("."):
                continue
            name = prefix + entry.name
            try:
                if entry.is_dir() and is_system_folder(entry.name):
                    builder.reject(name, SYSTEM_FOLDER)
                elif entry.is_dir():
                    yield from _walk(folder / entry.name, f"{name}/", (*above, identity), builder)
                elif entry.is_file():
                    yield name, entry.stat().st_size
                else:
                    builder.reject(name, "a broken link" if entry.is_symlink() else "neither a file nor a folder")
            except FileNotFoundError:
                builder.reject(name, "vanished while the folder was listed")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # reported when it is looked at again


def check_room(folder: Path, needed: int, doing: str) -> None:
    """Raise UserError if the disk of ``folder`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{doing} needs at least {needed / 1e6:,.0f} MB in {folder}, where {free / 1e6:,.0f} MB are free: "
            "free some space or choose another disk for OUT"
        )


@dataclass(frozen=True)
class Spool:
    """Where the copy of a source without random access is put: in ``folder``, or in OUT if it is in a bucket.

    In the bucket where the copy would take more than half of the room that is free in ``folder``.
    """

    folder: Path
    bucket: RemoteOut | None = None
    prefix: str = ""  # of names in the bucket; parts of a dataset that are made side by side have copies of their own

    def fits(self, needed: int, doing: str) -> bool:
        """Whether a copy of ``needed`` bytes goes into the folder. Raises UserError if it has no room anywhere."""
        if self.bucket is not None and needed > shutil.disk_usage(self.folder).free * _MOST_OF_DISK:
            return False
        check_room(self.folder, needed, doing)
        return True

    def file(self, name: str, local: bool) -> tuple[AbstractContextManager[IO[bytes]], SourcePath]:
        """(what opens a file of the copy for writing, where it is then); ``local``: as ``fits`` says."""
        if local:
            return atomic_file(self.folder / name), self.folder / name
        assert self.bucket is not None
        assert isinstance(self.bucket.place, Url)
        inside = f"{PARTIAL_DIR}/{self.prefix}{name}"
        return self.bucket.writer(inside), RemotePath(inside, self.bucket.place)


def spool_state(files: Sequence[SourcePath], *choices: str) -> list[Any]:
    """Identity of a spool's contents: the files (name, bytes, time of change) and the options it depends on."""
    return [[[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files], list(choices)]


def spooled(spool: Path, state: list[Any]) -> bool:
    """Whether an earlier run filled ``spool`` completely from this state."""
    try:
        return bool(read_json(spool / SPOOL_FILE) == state)
    except (OSError, ValueError):  # not there, or damaged: the copy is made again
        return False


def mark_spooled(spool: Path, state: list[Any]) -> None:
    """Record that ``spool`` is complete."""
    write_json(spool / SPOOL_FILE, state)
