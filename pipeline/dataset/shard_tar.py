"""Writes a shard's tar: the bytes of webdataset's TarWriter, at a sixth of its cost.

Every header is a copy of one that TarWriter made, with another name, length and checksum; contents are written and
hashed in one piece. TarWriter itself makes a Python object for each member and writes pieces of 10 KB.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import IO

from pipeline.common.files import start_writing_back


def write_index(file: IO[bytes], samples: Iterable[list[Component]]) -> None:
    """Write DALI's index of a tar."""
    file.write(index_bytes(samples))


def index_bytes(samples: Iterable[list[Component]]) -> bytes:
    """DALI's index, as its wds2idx tool writes it: one line a sample, `extension offset length name` a member."""
    lines = [" ".join(f"{c.extension} {c.offset} {c.length} {c.name}" for c in sample) for sample in samples]
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""]).encode("utf-8", "surrogateescape")


BLOCK = 512  # bytes of a tar header; contents are padded to a multiple
_RECORD = 20 * BLOCK  # a tar is padded to a multiple of this
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)  # fields of a ustar header: POSIX.1-1988
_WRITE_BACK = 8 << 20  # bytes between two hints to the kernel


@dataclass(frozen=True)
class Component:
    """One member of a sample in a tar, as DALI's index lists it."""

    extension: str
    offset: int  # bytes from the start of the tar to the contents
    length: int  # bytes
    name: str  # of the member


class ShardTar:
    """A tar that grows by samples; ``size`` is its length so far."""

    def __init__(self, file: IO[bytes]) -> None:
        """``file`` is empty and open for writing."""
        self._file = file
        self._digest = hashlib.sha256()
        self._sent = 0  # bytes whose write-back has been requested
        self.size = 0  # bytes

    def add(self, key: str, members: dict[str, bytes]) -> list[Component]:
        """Append one sample: ``members`` by extension. Returns the offset of each. Raises OSError as the disk does."""
        components = []
        for extension in sorted(members):
            data, name = members[extension], f"{key}.{extension}"
            self._put(_header(name, len(data)))
            components.append(Component(extension, self.size, len(data), name))
            self._put(data)
            self._put(bytes(-len(data) % BLOCK))
        if self.size - self._sent >= _WRITE_BACK:
            start_writing_back(self._file, self._sent, self.size - self._sent)
            self._sent = self.size
        return components

    def end(self) -> str:
        """Write the end of the tar; returns its sha256. Raises OSError as the disk does."""
        self._put(bytes(2 * BLOCK))
        self._put(bytes(-self.size % _RECORD))
        return self._digest.hexdigest()

    def _put(self, data: bytes) -> None:
        self._digest.update(data)
        self.size += len(data)
        self._file.write(data)


def _header(name: str, length: int) -> bytes:
    model, its_sum = _model_header()
    header, plain, size = bytearray(model), name.encode("ascii"), b"%011o\0" % length
    assert len(plain) <= 100, name
    header[_NAME] = plain.ljust(100, b"\0")
    header[_SIZE] = size
    header[_CHECKSUM] = b"%06o\0 " % (its_sum + sum(plain) + sum(size))
    return bytes(header)


@cache
def _model_header() -> tuple[bytes, int]:
    """A header as webdataset's TarWriter makes it: user, mode, modification time; and the sum of its kept bytes."""
    from webdataset import (
        TarWriter,
    )  # imported late: it imports torch unless that is prevented, see sharding/workers.py

    tar = io.BytesIO()
    with TarWriter(tar, encoder=False, compress=False, mtime=0) as writer:
        writer.write({"__key__": "key", "bin": b""})
    header = bytearray(tar.getvalue()[:BLOCK])
    header[_NAME], header[_SIZE], header[_CHECKSUM] = bytes(100), bytes(12), b" " * 8  # blanks count in the sum
    return bytes(header), sum(header)


def split_key(member: str) -> tuple[str, str]:
    """(key, extension) as WebDataset splits them: at the first dot of the base name."""
    folder, slash, base = member.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension
