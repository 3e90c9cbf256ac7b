"""Owns the account of reading: how long the samples of each shard took, so that a slow disk or shard can be named."""

from __future__ import annotations

import threading

import numpy as np
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
