"""The original path of each sample: names.bin has the names, names.npy where each begins.

    dataset.names[sample_id]               # "train/cat/0001.jpg", as SOURCE named it

names.bin     UTF-8 (bytes that are not UTF-8 as they are), each name ended by a zero byte, in the order of samples.npy
names.npy     int64[num_samples + 1]: the byte at which each name begins, and the length of names.bin

Both are memory-mapped. names.npy can be rebuilt from names.bin. ``names`` of dataset.json records the bytes of
names.bin and the sha256 of both. Datasets of earlier versions have neither.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, check_regular, map_array, open_regular

NAMES_FILE, NAME_STARTS_FILE = "names.bin", "names.npy"
_PIECE = 1 << 22  # bytes
_REMEDY = "tools/check_shards.py --repair mends it where it can"


def encode_names(names: Iterable[str]) -> bytes:
    """Names as names.bin holds them."""
    return b"".join(name.replace("\0", "\ufffd").encode("utf-8", "surrogateescape") + b"\0" for name in names)


def decode_names(encoded: bytes) -> list[str]:
    """The names that ``encode_names`` joined."""
    return [name.decode("utf-8", "surrogateescape") for name in encoded.split(b"\0")[:-1]]


class Names(Sequence[str]):
    """The names of all samples, read when asked for."""

    def __init__(self, text: np.ndarray, starts: np.ndarray) -> None:
        """``text`` (uint8[bytes]) and ``starts`` (int64[samples + 1]) are names.bin and names.npy, mapped."""
        self._text, self._starts = text, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, sample_id: int) -> str: ...
    @overload
    def __getitem__(self, sample_id: slice) -> list[str]: ...
    def __getitem__(self, sample_id: int | slice) -> str | list[str]:
        """The name of a sample, or those of a slice. Raises IndexError."""
        if isinstance(sample_id, slice):
            return [self[number] for number in range(*sample_id.indices(len(self)))]
        if not -len(self) <= sample_id < len(self):
            raise IndexError(sample_id)
        number = sample_id % len(self)
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        return bytes(self._text[start : max(start, end - 1)]).decode("utf-8", "surrogateescape")


def open_names(folder: Path, info: dict[str, Any]) -> Names | None:
    """Map the names of the dataset in ``folder``, whose dataset.json is ``info``; None if it was made without.

    Raises UserError if the files are missing or do not fit each other. Their contents are not hashed.
    """
    if "names" not in info:
        return None
    try:
        for each in (folder / NAME_STARTS_FILE, folder / NAMES_FILE):
            check_regular(each)
    except OSError:
        raise _unusable(folder / NAME_STARTS_FILE) from None
    return map_names(folder / NAMES_FILE, folder / NAME_STARTS_FILE, info)


def map_names(file: Path, starts_file: Path, info: dict[str, Any]) -> Names:
    """Map names.bin and names.npy, wherever they are. Raises UserError if they are damaged or do not fit each other."""
    try:
        starts = map_array(starts_file)
        size = file.stat().st_size
        if starts.dtype != np.int64 or starts.shape != (info["num_samples"] + 1,) or starts[-1] != size:
            raise ValueError
        text = np.memmap(file, np.uint8, "r") if size else np.zeros(0, np.uint8)
    except (OSError, ValueError):
        raise _unusable(starts_file) from None
    return Names(text.view(np.ndarray), starts.view(np.ndarray))


def _unusable(starts_file: Path) -> UserError:
    return UserError(f"{starts_file} or {NAMES_FILE} is missing, damaged or of another dataset: {_REMEDY}")


def name_starts_bytes(samples: int) -> int:
    """Bytes of names.npy."""
    return len(_starts_header(samples)) + 8 * (samples + 1)


def _starts_header(samples: int) -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_2_0(header, {"descr": "<i8", "fortran_order": False, "shape": (samples + 1,)})
    return header.getvalue()


def write_name_starts(folder: Path, samples: int, workshop: Path) -> dict[str, Any]:
    """Write names.npy for names.bin; returns ``names`` of dataset.json. Raises ValueError for another count."""
    with atomic_file(folder / NAME_STARTS_FILE, workshop) as starts:
        return join_names(None, starts, read_pieces(folder / NAMES_FILE), samples)


def join_names(text: IO[bytes] | None, starts: IO[bytes], parts: Iterable[bytes], samples: int) -> dict[str, Any]:
    """Write encoded names that come in ``parts`` as names.bin (None: it is there) and names.npy, both open and empty.

    Returns ``names`` of dataset.json. Raises ValueError for another number of names than ``samples``.
    """
    digest, starts_digest, at, found = hashlib.sha256(), hashlib.sha256(), 0, 0

    def put(data: bytes) -> None:
        starts_digest.update(data)
        starts.write(data)

    put(_starts_header(samples))
    put(np.zeros(1, "<i8").tobytes())
    for part in parts:
        digest.update(part)
        ends = np.flatnonzero(np.frombuffer(part, np.uint8) == 0)
        put((ends + (at + 1)).astype("<i8").tobytes())
        at, found = at + len(part), found + len(ends)
        if text is not None:
            text.write(part)
    if found != samples:
        raise ValueError(f"{found} names for {samples} samples")
    return {"bytes": at, "sha256": digest.hexdigest(), "starts_sha256": starts_digest.hexdigest()}


def read_names(file: Path) -> Iterator[str]:
    """The names in names.bin, one after the other."""
    rest = b""
    for piece in read_pieces(file):
        *whole, rest = (rest + piece).split(b"\0")
        yield from (name.decode("utf-8", "surrogateescape") for name in whole)
    if rest:
        yield rest.decode("utf-8", "surrogateescape")


def read_pieces(file: Path) -> Iterator[bytes]:
    """A file in pieces."""
    with open(open_regular(file), "rb") as stream:
        while piece := stream.read(_PIECE):
            yield piece
