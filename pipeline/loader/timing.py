"""Where the time of a loader goes: reads by shard, and a GPU's stalls for batches that are not finished.

The host does not wait for the GPU, so a loader whose slow part runs on the GPU always has a batch to hand over: the
host's wait (``wait_s``) would stay near 0 while the model starves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray


class ReadCosts:
    """Seconds and reads of each shard, over one rank's threads. Thread-safe.

    Seconds count from request to result, checksum included; threads wait in parallel, so they add up to more than the
    wall clock shows.
    """

    def __init__(self, shards: int) -> None:
        """Nothing was read yet from any of ``shards`` shards."""
        self.seconds: NDArray[np.float64] = np.zeros(shards)  # [shards]
        self.reads: NDArray[np.int64] = np.zeros(shards, dtype=np.int64)  # [shards]
        self._lock = threading.Lock()

    def add(self, shards: ArrayLike, seconds: ArrayLike) -> None:
        """Count reads: the shard and the seconds of each."""
        with self._lock:
            np.add.at(self.seconds, np.asarray(shards, dtype=np.int64), seconds)
            np.add.at(self.reads, np.asarray(shards, dtype=np.int64), 1)


class Stalls:
    """The time that one CUDA stream waited for batches. Without a GPU it stays 0."""

    def __init__(self) -> None:
        """Nothing has stalled yet."""
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Count the time that ``stream`` is made to wait inside."""
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(stream)
        yield
        after.record(stream)
        self._marks.append((before, after))

    def read_s(self) -> float:
        """Seconds since the last reading. Waits for the device."""
        marks, self._marks = self._marks, []
        if marks:
            marks[-1][1].synchronize()
        return sum(before.elapsed_time(after) for before, after in marks) / 1e3
