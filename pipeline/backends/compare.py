"""Decode one image by every installed back end and compare the pixels.

Back ends must train on the same pixels, so sharding and ``check_shards --decode full`` compare each image whose format
does not already guarantee it. The reference is the decoder of the torchvision back end (PIL).
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from pipeline.backends import reference
from pipeline.common.system import dali_installed

TOLERANCE = 2  # of 255: what JPEGs in CMYK and YCbCr TIFFs differ by through rounding
_ROWS_AT_ONCE = 256  # rows compared together: large images in less memory


class BackendComparison:
    """Compares the decoders of the installed back ends. Not for use by several threads at once."""

    def __init__(self) -> None:
        self._dali = None
        if dali_installed():
            from pipeline.backends.dali_backend import DaliDecoder

            self._dali = DaliDecoder()

    def fault(self, encoded: bytes) -> str | None:
        """Why an image cannot be used on every back end: it fails on one, or the pixels differ; None if it can."""
        try:
            expected = reference.decode(encoded).permute(1, 2, 0).numpy()
        except (OSError, ValueError, SyntaxError) as error:
            return f"PIL cannot decode it: {_grouped(str(error))}"
        if self._dali is None:
            return None
        from pipeline.backends.dali_backend import CodecError

        try:
            pixels = self._dali.decode(np.frombuffer(encoded, np.uint8))
        except CodecError as error:
            return f"DALI cannot decode it: {_grouped(str(error))}"
        return None if _agree(expected, pixels) else "DALI decodes it to other pixels than PIL"


def _grouped(message: str) -> str:
    """One line without numbers of several digits: the summary of sharding groups by reason."""
    lines = message.splitlines() or ["no message"]
    return re.sub(r"\d{2,}", "...", lines[0])[:200]


def _agree(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    if one.shape != other.shape:
        return False
    for top in range(0, len(one), _ROWS_AT_ONCE):
        rows = slice(top, top + _ROWS_AT_ONCE)
        if (np.abs(one[rows].astype(np.int16) - other[rows]) > TOLERANCE).any():
            return False
    return True
