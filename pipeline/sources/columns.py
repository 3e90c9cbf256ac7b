"""Arrays that grow on the disk: a listing of 100 million files takes 10 GB there, and a few MB of memory.

sizes = Column(np.int64)
sizes.extend([3, 4])
sizes.finish()             # int64[2], mapped from a temporary file that has no name
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

KEPT_IN_MEMORY = 1 << 20  # bytes of a column


class Column:
    """Values of one type, appended in pieces. What exceeds KEPT_IN_MEMORY lies in a temporary file."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        self._rest = bytearray()
        self._file: Any = None
        self._written = 0  # bytes in the file

    def __len__(self) -> int:
        return (self._written + len(self._rest)) // self._dtype.itemsize

    def extend(self, values: Iterable[Any] | np.ndarray | bytes) -> None:
        """Append values. Raises OSError as the disk does."""
        if isinstance(values, bytes):
            self._rest += values
        else:
            array = values if isinstance(values, np.ndarray) else np.array(list(values), self._dtype)
            self._rest += np.ascontiguousarray(array, self._dtype).tobytes()
        if len(self._rest) > KEPT_IN_MEMORY:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="siamstream-listing-")  # noqa: SIM115  # as long as the column
            self._file.write(self._rest)
            self._written += len(self._rest)
            self._rest.clear()

    def finish(self) -> np.ndarray:
        """All values, mapped; the column must not grow any more."""
        if self._file is None:
            return np.frombuffer(bytes(self._rest), self._dtype)
        self._file.write(self._rest)
        self._file.flush()
        self._written, self._rest = self._written + len(self._rest), bytearray()
        return np.memmap(self._file, self._dtype, "r").view(np.ndarray)


def scratch(count: int, dtype: DTypeLike) -> np.ndarray:
    """An array of zeros to be filled; a large one lies in a temporary file."""
    if count * np.dtype(dtype).itemsize <= KEPT_IN_MEMORY:
        return np.zeros(count, dtype)
    with tempfile.TemporaryFile(prefix="siamstream-listing-") as file:
        return np.memmap(file, dtype, "w+", shape=(count,)).view(np.ndarray)
