"""Owns how long a GPU stood still for batches that the host had handed over before they were finished.

The host does not wait for the GPU, so a loader whose slow part runs on the GPU always has a batch to hand over: what
the host waits for it (``wait_s``) would stay near 0 while the model starves.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float64, Int64
from numpy.typing import ArrayLike


class ReadCosts:
    """Seconds and reads of each shard, as one rank's threads report them. Thread-safe.

    Seconds count from asking to having, checksum included; threads wait side by side, so they add up to more than the
    wall clock shows.
    """

    def __init__(self, shards: int) -> None:
        """Nothing was read yet from any of ``shards`` shards."""
        self.seconds: Float64[np.ndarray, " shards"] = np.zeros(shards)
        self.reads: Int64[np.ndarray, " shards"] = np.zeros(shards, dtype=np.int64)
        self._lock = threading.Lock()

    def add(self, shards: ArrayLike, seconds: ArrayLike) -> None:
        """Count reads: the shard and the seconds of each."""
        with self._lock:
            np.add.at(self.seconds, np.asarray(shards, dtype=np.int64), seconds)
            np.add.at(self.reads, np.asarray(shards, dtype=np.int64), 1)


class Stalls:
    """Adds up the stalls of one stream. Without a GPU there are none."""

    def __init__(self) -> None:
        """Nothing has stalled yet."""
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Whatever ``stream`` is made to wait for inside is a stall."""
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
