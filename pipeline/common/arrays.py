"""Images of any number of channels as .npy files: what ``make_shards --channels N`` stores, and back ends read.

The format is numpy's own (numpy.lib.format), without objects: uint8 or uint16, ``[h, w]`` or ``[h, w, channels]``.
"""

from __future__ import annotations

import io
from tokenize import TokenError

import numpy as np
from numpy.typing import NDArray

MAGIC = b"\x93NUMPY"
HEADER_BYTES = 4096  # at most; numpy writes 128 for three axes
KINDS = (np.dtype(np.uint8), np.dtype(np.uint16))


def is_array(data: bytes) -> bool:
    """Whether ``data`` is the content of a .npy file."""
    return data.startswith(MAGIC)


def array_shape(data: bytes) -> tuple[tuple[int, int, int], bool, np.dtype, int]:
    """(height, width, channels; whether columns lie together; type; where the values begin) from the header alone.

    Raises ValueError for what is no image.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"a .npy file of version {version[0]}.{version[1]}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file, max_header_size=HEADER_BYTES)
    except (ValueError, SyntaxError, TypeError, EOFError, TokenError):  # what numpy raises for a damaged header
        raise ValueError("damaged header of a .npy file") from None
    if dtype.newbyteorder("=") not in KINDS:
        raise ValueError(f".npy file of {dtype}: an image has uint8 or uint16")
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f".npy file of shape {shape}: an image is height x width x channels")
    height, width, channels = (*shape, 1)[:3]
    if len(data) != file.tell() + height * width * channels * dtype.itemsize:
        raise ValueError("truncated, or longer than its header says")
    return (height, width, channels), fortran_order, dtype, file.tell()


def read_array(data: bytes) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The values, ``[h, w, channels]`` in the machine's byte order. Raises ValueError as ``array_shape``."""
    shape, fortran_order, dtype, start = array_shape(data)
    values = np.frombuffer(data, dtype, offset=start).reshape(shape, order="F" if fortran_order else "C")
    return np.ascontiguousarray(values, dtype.newbyteorder("="))


def write_array(values: NDArray[np.uint8] | NDArray[np.uint16]) -> bytes:
    """The .npy file of ``[h, w, channels]``: little-endian, so that every machine writes the same bytes."""
    out = io.BytesIO()
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    np.lib.format.write_array(out, little, version=(1, 0), allow_pickle=False)
    return out.getvalue()
