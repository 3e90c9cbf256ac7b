"""List the images of a tar from elsewhere: name, offset and length of each member.

A plain tar is scanned once, header by header, and its images are then read as byte ranges; ImageNet's tar of class tars
is read in place in the same way. A compressed tar has no random access and is decompressed once. Member names are
labels only and never become paths.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file
from pipeline.common.system import progress
from pipeline.sources.listing import Listing, ListingBuilder
from pipeline.sources.readers import check_room, mark_spooled, spool_state, spooled

_COMPRESSED: tuple[tuple[bytes, Any], ...] = ((b"\x1f\x8b", gzip), (b"BZh", bz2), (b"\xfd7zXZ\x00", lzma))
_PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class Member:
    """One member of a tar. ``refusal`` is the reason why it cannot be used, or None."""

    name: str  # as stored: may be absolute, contain "..", or bytes that are not UTF-8 (surrogate-escaped)
    offset: int  # bytes from the start of the file to the contents
    length: int  # bytes
    refusal: str | None


class _Window(io.RawIOBase):
    """A byte range of an open file as a file of its own."""

    def __init__(self, handle: int, start: int, length: int) -> None:
        self._handle, self._start, self._length, self._position = handle, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(self._length - self._position, 0))
        data = os.pread(self._handle, wanted, self._start + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def scan_tar(path: Path) -> Iterator[Member]:
    """Every file, link and device of a plain tar, in order, without folders. Raises UserError for a damaged tar."""
    with open(path, "rb") as file:
        yield from _scan(file, 0, os.fstat(file.fileno()).st_size, str(path))


def _scan(file: IO[bytes], start: int, length: int, where: str) -> Iterator[Member]:
    window = _Window(file.fileno(), start, length)
    try:
        with tarfile.open(fileobj=window, mode="r:") as tar:
            for info in _entries(tar):
                yield Member(info.name, start + info.offset_data, info.size, _refusal(info))
            end = tar.offset
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UserError(f"the tar {where} is damaged or cut off ({error}): fetch it again") from error
    # tarfile takes a damaged header in the middle for the end, and would silently drop all later members
    window.seek(end)
    if any(window.read(tarfile.BLOCKSIZE) or b""):
        raise UserError(f"the tar {where} is damaged: no valid header at byte {end}; fetch it again")


def _entries(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All but folders."""
    while (info := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep about 1 KB a member
        if not info.isdir():
            yield info


def _refusal(info: tarfile.TarInfo) -> str | None:
    if info.issym() or info.islnk():
        return "a link inside an archive"
    if not info.isreg():
        return "a device or other special file inside an archive"
    if info.sparse is not None:
        return "a sparse file inside an archive"
    return None


def list_tar(path: Path, subtree: str, quiet: bool) -> Listing:
    """The images of a plain tar below ``subtree``; a tar inside counts as a folder named by its stem."""
    builder = ListingBuilder(f"{path}{f' below {subtree}' if subtree else ''}")
    below = plain_name(subtree)
    total, text = path.stat().st_size, f"listing {path.name}"
    with open(path, "rb") as file, progress(quiet, total=total, unit="B", unit_scale=True, desc=text) as bar:
        for member in scan_tar(path):
            bar.update(member.offset + member.length - bar.n)
            name = _inside(member.name, below)
            if name is None:
                continue
            if name.endswith(".tar") and member.refusal is None:
                _list_inner(file, member, name, builder, str(path))
            elif member.refusal is not None:
                builder.reject(name, member.refusal)
            else:
                builder.add(name, member.offset, member.length)
    return builder.build()


def _list_inner(file: IO[bytes], outer: Member, name: str, builder: ListingBuilder, where: str) -> None:
    for member in _scan(file, outer.offset, outer.length, f"{outer.name} inside {where}"):
        inner = _inside(member.name, "")
        if inner is None:
            continue
        if member.refusal is not None:
            builder.reject(f"{name[:-4]}/{inner}", member.refusal)
        else:
            builder.add(f"{name[:-4]}/{inner}", member.offset, member.length)


def plain_name(name: str) -> str:
    """A member's name without leading slash, "." and ".." components; used for display and labels, never as a path."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def _inside(name: str, below: str) -> str | None:
    """The plain name relative to folder ``below``; None if it is elsewhere or hidden."""
    name = plain_name(name)
    if below:
        if not name.startswith(f"{below}/"):
            return None
        name = name[len(below) + 1 :]
    return None if any(part.startswith(".") for part in name.split("/")) else name


def is_plain_tar(path: Path) -> bool:
    """Whether ``path`` starts like an uncompressed tar."""
    if compression(path) is not None:
        return False
    try:
        with tarfile.open(path, "r:"):
            return True
    except (tarfile.TarError, EOFError, ValueError):
        return False


def compression(path: Path) -> Any | None:
    """The module (gzip, bz2, lzma) that opens ``path``, by its first bytes; None if it is not compressed."""
    with open(path, "rb") as file:
        start = file.read(6)
    return next((module for magic, module in _COMPRESSED if start.startswith(magic)), None)


def unpack_tar(path: Path, spool: Path, quiet: bool) -> Path:
    """Decompress a tar into folder ``spool``, unless an earlier run did; returns the path of the plain tar.

    Raises UserError if the archive is damaged or the disk cannot hold it.
    """
    plain = spool / "unpacked.tar"
    state = spool_state([path])
    if spooled(spool, state) and plain.exists():
        return plain
    check_room(spool, path.stat().st_size, f"unpacking {path}")
    try:
        _decompress(path, plain, quiet)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut off ({error}): fetch it again") from error
    mark_spooled(spool, state)
    return plain


def _decompress(path: Path, plain: Path, quiet: bool) -> None:
    module = compression(path)
    assert module is not None
    text = f"unpacking {path.name} once into {plain.parent.name} (removed when the dataset is complete)"
    with (
        open(path, "rb") as packed,
        progress(quiet, total=path.stat().st_size, unit="B", unit_scale=True, desc=text) as bar,
        module.open(packed) as source,
        atomic_file(plain) as file,
    ):
        while piece := source.read(_PIECE):
            file.write(piece)
            bar.update(packed.tell() - bar.n)
