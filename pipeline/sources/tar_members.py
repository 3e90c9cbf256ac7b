"""List the members of a tar that may be damaged or hostile: names, offsets, lengths; contents are not read.

Sharding, check_shards and its repair all read foreign and own tars through ``scan_tar``. Python's tarfile is not used
here: for crafted headers it has looped for ever (CVE-2025-8194) and raised a dozen kinds of errors, it ends silently at
the first end mark of concatenated tars, and it takes ten times as long. Every header is checked before it is used,
offsets only grow, and any damage is one UserError. Formats: POSIX.1-1988 (ustar), POSIX.1-2001 (pax), GNU, v7.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pipeline.common.errors import UserError
from pipeline.dataset.shard_tar import BLOCK
from pipeline.sources.remote_path import Handle, SourcePath, handle_of, open_file, pread

_ZEROS = bytes(BLOCK)
_PIECE = 1 << 20  # bytes read at once behind an end mark
_LONGEST_NAME = 1 << 16  # bytes; Linux allows 4096 in a path
_LONGEST_PAX = 1 << 20  # bytes of one extended header
_MOST_EXTENSIONS = 16  # extended headers before one member; three are usual
_OCTAL = re.compile(rb" *([0-7]*)(?:[ \0].*)?", re.DOTALL)
_PAX_RECORD = re.compile(rb"([1-9][0-9]{0,7}) ([^=]*)=")
_DECIMAL = re.compile(rb"[0-9]{1,19}")
_REGULAR, _FOLDER, _LINKS, _SPARSE = b"0\0007", b"5", b"12", b"S"
_WITHOUT_CONTENTS = b"123456"  # links, devices, folders, FIFOs: whatever size their header says
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"xX", b"g", b"L", b"K"
_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"(\xb5/\xfd", "Zstandard", "unzstd"),
    (b"\x04\x22\x4d\x18", "LZ4", "unlz4"),
    (b"\x1f\x9d", "compress", "uncompress"),
)


@dataclass(frozen=True)
class Member:
    """One member of a tar. ``refusal`` is the reason why it cannot be used, or None."""

    name: str  # as stored: may be absolute, contain "..", or bytes that are not UTF-8 (surrogate-escaped)
    offset: int  # bytes from the start of the file to the contents
    length: int  # bytes
    refusal: str | None


class _Header(NamedTuple):
    name: bytes
    kind: bytes  # one byte, the typeflag
    size: int  # bytes of contents


class _DamagedError(Exception):
    """The reason why a header or an archive cannot be read."""


def scan_tar(path: SourcePath) -> Iterator[Member]:
    """Every file, link and device of a plain tar, in order, without folders. Concatenated tars are read to the end.

    Raises UserError for a damaged, cut off or compressed tar.
    """
    with open_file(path) as file:
        if (kind := compression_name(path)) is not None:
            raise UserError(
                f"{path} is compressed with {kind[0]}, and its images are to be read in place: decompress it first "
                f"({kind[1]} {path.name})"
            )
        yield from members_within(handle_of(file), 0, file.seek(0, os.SEEK_END), str(path))


def members_within(handle: Handle, start: int, length: int, where: str) -> Iterator[Member]:
    """As ``scan_tar``, for ``length`` bytes at ``start`` of an open file; ``where`` names them in messages."""
    try:
        yield from _members(handle, start, start + length)
    except _DamagedError as error:
        raise UserError(f"the tar {where} is damaged or cut off: {error}; fetch it again") from error


def is_plain_tar(path: SourcePath) -> bool:
    """Whether ``path`` starts with the header of an uncompressed tar."""
    with open_file(path) as file:
        block = file.read(BLOCK)
    try:
        return block == _ZEROS or _parse(block, 0) is not None
    except _DamagedError:
        return False


def compression_name(path: SourcePath) -> tuple[str, str] | None:
    """(compression of ``path``, command that undoes it) by the first bytes; None if it is not compressed."""
    with open_file(path) as file:
        start = file.read(8)
    return next(((name, command) for magic, name, command in _COMPRESSED if start.startswith(magic)), None)


def _members(handle: Handle, start: int, end: int) -> Iterator[Member]:
    at, ended = start, False
    while at < end:
        block = _read(handle, at, BLOCK, end)
        if block == _ZEROS:
            at, ended = _behind_zeros(handle, at, end), True
            continue
        ended = False
        extended, header, contents = _extended_header(handle, at, block, start, end)
        name, size, sparse = extended.name or header.name, header.size, extended.sparse
        if header.kind in _SPARSE:
            sparse, contents = True, _behind_sparse_map(handle, contents, end)
        is_folder = header.kind == _FOLDER or (header.kind == b"\0" and name.endswith(b"/"))
        if header.kind in _WITHOUT_CONTENTS or is_folder:
            size = 0
        elif extended.size is not None:
            size = extended.size
        at = contents + _padded(size)
        if at > end:
            raise _DamagedError(f"{_shown(name)} ends {at - end:,} bytes behind the end of the file")
        if not is_folder:
            refusal = "a sparse file inside an archive" if sparse else _refusal(header.kind)
            yield Member(name.decode("utf-8", "surrogateescape"), contents, size, refusal)
    if not ended:
        raise _DamagedError("its end mark, two blocks of zeros, is missing")


class _Extended(NamedTuple):
    """What extended headers say about the member behind them; None: nothing."""

    name: bytes | None = None
    size: int | None = None
    sparse: bool = False


def _extended_header(handle: Handle, at: int, block: bytes, start: int, end: int) -> tuple[_Extended, _Header, int]:
    """(extensions, header, where the contents begin) of the member whose first header, ``block``, lies at ``at``."""
    extended = _Extended()
    for _ in range(_MOST_EXTENSIONS):
        header = _parse(block, at - start)
        contents = at + BLOCK
        if header.kind in _PAX:
            extended = _with_pax(extended, _read(handle, contents, _limited(header, _LONGEST_PAX), end))
        elif header.kind == _LONG_NAME:
            name = _read(handle, contents, _limited(header, _LONGEST_NAME), end)
            extended = extended._replace(name=name.partition(b"\0")[0])
        elif header.kind not in (_LONG_LINK, _PAX_GLOBAL):
            return extended, header, contents
        at = contents + _padded(_limited(header, _LONGEST_PAX))
        block = _read(handle, at, BLOCK, end)
    raise _DamagedError(f"more than {_MOST_EXTENSIONS} extended headers before byte {at - start}")


def _parse(block: bytes, at: int) -> _Header:
    """A header block. Raises _DamagedError, which names byte ``at``, unless its checksum is right."""
    if len(block) < BLOCK:
        raise _DamagedError(f"the header at byte {at} is cut off")
    recorded = _octal(block[148:156])
    counted = block[:148] + b" " * 8 + block[156:]
    if recorded != sum(counted) and recorded != sum(counted) - 256 * sum(b > 127 for b in counted):  # signed bytes: old
        raise _DamagedError(f"no valid header at byte {at}")
    size = _number(block[124:136])
    if size is None:
        raise _DamagedError(f"the header at byte {at} has no valid size")
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return _Header(name, block[156:157], size)


def _number(field: bytes) -> int | None:
    """A size: octal digits, or GNU's base 256. None if it is neither, or negative."""
    if field[0] & 0x80:
        return None if field[0] & 0x40 else int.from_bytes(field, "big") - (1 << 95)
    return _octal(field)


def _octal(field: bytes) -> int | None:
    digits = _OCTAL.fullmatch(field)
    return None if digits is None else int(digits[1] or b"0", 8)


def _with_pax(extended: _Extended, content: bytes) -> _Extended:
    at = 0
    while at < len(content) and content[at] != 0:
        record = _PAX_RECORD.match(content, at)
        end = at + int(record[1]) if record is not None else 0
        if record is None or not record.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise _DamagedError("an extended header is malformed")
        key, value = record[2], content[record.end() : end - 1]
        if key in (b"path", b"GNU.sparse.name"):
            extended = extended._replace(name=value[:_LONGEST_NAME])
        elif key == b"size":
            if _DECIMAL.fullmatch(value) is None:
                raise _DamagedError(f"an extended header has the size {_shown(value)}")
            extended = extended._replace(size=int(value))
        if key.startswith(b"GNU.sparse."):
            extended = extended._replace(sparse=True)
        at = end
    return extended


def _behind_sparse_map(handle: Handle, at: int, end: int) -> int:
    """Where the contents of an old GNU sparse file begin: behind the blocks that continue its map."""
    continues = _read(handle, at - BLOCK, BLOCK, end)[482]
    while continues:
        continues = _read(handle, at, BLOCK, end)[504]
        at += BLOCK
    return at


def _behind_zeros(handle: Handle, at: int, end: int) -> int:
    """The first block from ``at`` on that is not all zero, where another tar was appended; else ``end``."""
    while at < end:
        piece = _read(handle, at, min(_PIECE, end - at), end)
        used = len(piece) - len(piece.lstrip(b"\0"))
        if used < len(piece):
            return at + used // BLOCK * BLOCK
        at += len(piece)
    return end


def _read(handle: Handle, at: int, length: int, end: int) -> bytes:
    data = pread(handle, length, at) if at + length <= end else b""
    if len(data) < length:
        raise _DamagedError("it ends inside a header")
    return data


def _limited(header: _Header, limit: int) -> int:
    if header.size > limit:
        raise _DamagedError(f"an extended header of {header.size:,} bytes")
    return header.size


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _refusal(kind: bytes) -> str | None:
    if kind in _REGULAR:
        return None
    return "a link inside an archive" if kind in _LINKS else "a device or other special file inside an archive"


def _shown(name: bytes) -> str:
    return ascii(name[:100].decode("utf-8", "surrogateescape"))
