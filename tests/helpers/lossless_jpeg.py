"""A small encoder of lossless JPEG (ITU-T T.81, annex H), which PIL reads and cannot write."""

from __future__ import annotations

import struct

import numpy as np

_CATEGORIES = 9  # of differences of 8-bit samples: 0 .. 8 bits, and one more for the wrap
_CODE_BITS = 4  # every category gets a code of this length


def lossless_jpeg(pixels: np.ndarray) -> bytes:
    """uint8 ``[h, w, 3]`` as a lossless JPEG (SOF3) with predictor 1, the pixel on the left."""
    height, width, _ = pixels.shape
    values = pixels.astype(int)
    predicted = np.empty_like(values)
    predicted[:, 1:] = values[:, :-1]
    predicted[1:, 0] = values[:-1, 0]
    predicted[0, 0] = 128
    bits = []
    for difference in (values - predicted).reshape(-1).tolist():
        category = abs(difference).bit_length()
        bits.append(f"{category:0{_CODE_BITS}b}")
        if category:
            bits.append(f"{difference if difference > 0 else difference + (1 << category) - 1:0{category}b}")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    scan = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0")
    counts = bytes([0] * (_CODE_BITS - 1) + [_CATEGORIES + 1] + [0] * (16 - _CODE_BITS))
    return b"".join(
        [
            b"\xff\xd8",
            _segment(0xC3, struct.pack(">BHHB", 8, height, width, 3) + b"".join(bytes([c, 0x11, 0]) for c in b"RGB")),
            _segment(0xC4, b"\0" + counts + bytes(range(_CATEGORIES + 1))),
            _segment(0xDA, b"\3" + b"".join(bytes([c, 0]) for c in b"RGB") + b"\1\0\0"),
            scan,
            b"\xff\xd9",
        ]
    )


def _segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
