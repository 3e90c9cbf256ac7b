"""Recognise PNGs that every decoder reads alike, by their structure alone, and PNGs that lack rows.

Most PNGs are of this kind, and the check inflates the pixels once, as decoding does, so that no decoder has to run:
8 bits a sample, no palette, no interlacing, only known chunks in their order with the right checksums, a zlib stream
that ends with its checksum and holds all rows, and known filters. Nothing after that can fail (PNG specification,
https://www.w3.org/TR/png-3/). Other PNGs need not be bad: they are decoded and compared. PIL decodes a PNG whose zlib
stream ends before the last row, and leaves the rest black.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type: gray, RGB, palette, gray and RGB with alpha
_PALETTE = 3
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
_HARMLESS = frozenset({b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"tIME", b"iCCP", b"eXIf"})  # without influence on pixels
_FILTERS = 5
_PIECE = 1 << 20  # bytes


def is_plain_png(data: bytes) -> bool:
    """Whether ``data`` is such a PNG, from its signature to its end."""
    if not data.startswith(_SIGNATURE) or data[12:16] != b"IHDR" or len(data) < 45:
        return False
    length, width, height, bits, colour, compression, filtering, interlace = struct.unpack(">I4xIIBBBBB", data[8:29])
    if length != 13 or (bits, compression, filtering, interlace) != (8, 0, 0, 0):
        return False
    if colour not in _CHANNELS or colour == _PALETTE:
        return False
    parts = _pixel_parts(data)
    row = 1 + width * _CHANNELS[colour]  # bytes: the filter's number and the samples
    return parts is not None and _holds_rows(parts, height, row)


def _pixel_parts(data: bytes) -> list[memoryview] | None:
    """The contents of the IDAT chunks; None unless the chunks are as described above."""
    parts: list[memoryview] = []
    at, ended, view = len(_SIGNATURE), False, memoryview(data)
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        if end > len(data) or zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return None
        match kind:
            case b"IHDR" if at == len(_SIGNATURE):
                pass
            case b"IDAT" if not ended:
                parts.append(view[at + 8 : end - 4])
            case b"IEND":
                return parts if length == 0 and end == len(data) else None
            case _ if kind in _HARMLESS:
                ended = bool(parts)  # all IDAT chunks follow each other
            case _:
                return None
        at = end
    return None


def _holds_rows(parts: list[memoryview], height: int, row: int) -> bool:
    """Whether the zlib stream in ``parts`` ends properly after exactly ``height`` rows of ``row`` bytes."""
    stream, left = zlib.decompressobj(), height * row
    at = 0  # bytes so far
    for part in parts:
        waiting: bytes | memoryview = part
        while len(waiting):
            if stream.eof:
                return False
            try:
                piece = stream.decompress(waiting, min(left, _PIECE) + 1)
            except zlib.error:
                return False
            waiting = stream.unconsumed_tail
            left -= len(piece)
            first = -at % row  # position in the piece of its first filter number
            if left < 0 or (np.frombuffer(piece, np.uint8)[first::row] >= _FILTERS).any():
                return False
            at += len(piece)
    return stream.eof and left == 0 and not stream.unused_data


def lacks_rows(data: bytes) -> bool:
    """Whether the pixels of a PNG, which PIL has opened, end before its last row."""
    if data[12:16] != b"IHDR":
        return False
    width, height, bits, colour, interlace = struct.unpack(">IIBB2xB", data[16:29])
    if colour not in _CHANNELS:
        return False
    passes = _ADAM7 if interlace else ((0, 0, 1, 1),)  # (first row, first column, every n-th row, every n-th column)
    sizes = ((len(range(top, height, down)), len(range(left, width, right))) for top, left, down, right in passes)
    needed = sum(rows * (1 + (columns * bits * _CHANNELS[colour] + 7) // 8) for rows, columns in sizes if columns)
    stream, at = zlib.decompressobj(), len(_SIGNATURE)
    while needed > 0 and at + 8 <= len(data) and not stream.eof:
        length = int.from_bytes(data[at : at + 4], "big")
        waiting: bytes = data[at + 8 : at + 8 + length] if data[at + 4 : at + 8] == b"IDAT" else b""
        while waiting and needed > 0:
            try:
                needed -= len(stream.decompress(waiting, min(needed, _PIECE)))
            except zlib.error:
                return False  # not this kind of damage; decoders say what it is
            waiting = stream.unconsumed_tail
        at += 12 + length
    return needed > 0
