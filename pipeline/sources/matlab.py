"""Read one array of structs from a MATLAB version 5 file, as ImageNet's devkit stores its synsets.

The format is from "MAT-File Format", The MathWorks, chapter 1: a file is a header of 128 bytes and data elements; an
element is a type, a length and that many bytes padded to 8; a matrix is an element that contains further elements
(flags, dimensions, name, contents).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from pipeline.common.errors import UserError

_FORMATS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}  # miINT8 ... miUINT64
_TEXT = {4: "utf-16-le", 16: "utf-8", 17: "utf-16-le", 18: "utf-32-le"}  # miUINT16, miUTF8, miUTF16, miUTF32
_MATRIX, _COMPRESSED = 14, 15
_LARGEST = 64 << 20  # bytes of one element; that of the devkit has 2 MB
_STRUCT_CLASS, _CHAR_CLASS, _CELL_CLASS = 2, 4, 1


def read_struct_array(data: bytes, name: str) -> list[dict[str, str | tuple[float, ...] | None]]:
    """The elements of struct array ``name`` of a .mat file: text as str, numbers as a tuple, anything else as None.

    Raises UserError if the file is damaged or has no such array.
    """
    try:
        if data[126:128] != b"IM":
            raise ValueError("not a little-endian version 5 file")
        for kind, content in _elements(data[128:]):
            if kind == _COMPRESSED:
                kind, content = next(_elements(_inflated(content)))
            parts = list(_elements(content)) if kind == _MATRIX else []
            if parts and parts[0][1][0] == _STRUCT_CLASS and parts[2][1].decode("ascii") == name:
                return _structs(parts)
    except (ValueError, KeyError, IndexError, OverflowError, struct.error, zlib.error, StopIteration) as error:
        raise UserError(f"the MATLAB file with {name!r} is damaged: {error}") from error
    raise UserError(f"the MATLAB file has no struct array {name!r}")


def _inflated(content: bytes) -> bytes:
    inflater = zlib.decompressobj()
    plain = inflater.decompress(content, _LARGEST)
    if not inflater.eof:
        raise ValueError("a compressed element is cut off or too large")
    return plain


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, contents) of the elements of ``data``."""
    position = 0
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<II", data, position)
        if kind >> 16:  # small form: the length in the upper half, four bytes of contents in place
            kind, length = kind & 0xFFFF, kind >> 16
            yield kind, data[position + 4 : position + 4 + length]
            position += 8
            continue
        yield kind, data[position + 8 : position + 8 + length]
        position += 8 + (length if kind == _COMPRESSED else -(-length // 8) * 8)


def _structs(parts: list[tuple[int, bytes]]) -> list[dict[str, str | tuple[float, ...] | None]]:
    width = struct.unpack("<i", parts[3][1])[0]
    names = [parts[4][1][i : i + width].split(b"\0")[0].decode("ascii") for i in range(0, len(parts[4][1]), width)]
    values = [_value(content) for _, content in parts[5:]]
    return [dict(zip(names, values[i : i + len(names)], strict=True)) for i in range(0, len(values), len(names))]


def _value(content: bytes) -> str | tuple[float, ...] | None:
    parts = list(_elements(content))
    if not parts or parts[0][1][0] in (_STRUCT_CLASS, _CELL_CLASS) or len(parts) < 4:
        return None
    kind, raw = parts[3]
    if parts[0][1][0] == _CHAR_CLASS:
        return raw.decode(_TEXT.get(kind, "latin-1"))
    return struct.unpack(f"<{len(raw) // struct.calcsize(_FORMATS[kind])}{_FORMATS[kind]}", raw)
