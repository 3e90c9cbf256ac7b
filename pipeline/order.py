"""Owns the epoch order: which samples make up a batch, as a pure function of small integers.

The order is a keyed permutation that answers for any position in constant time and memory, so a billion samples cost
a rank no more than a thousand. It is a Feistel network over pairs (Black & Rogaway 2002, "Ciphers with arbitrary
finite domains"): a sample number is written as left * columns + right, and each round adds to one half a hash of the
other. The few values that land outside the data set are permuted again until they land inside ("cycle walking").
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.counter_rng import philox4x32, seed_key, splitmix64

FEISTEL_ROUNDS = 12  # six per half; four in all are proven enough for large halves (Luby & Rackoff 1988)
ORDER_STREAM = 0x0D0E  # keeps the order's counters apart from those of the views


def epoch_order(num_samples: int, seed: int, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sample ids at some positions of an epoch.

    ``positions``: int64 ``[n]`` in ``0 .. num_samples - 1``. Returns int64 ``[n]``; over all positions it is a
    permutation of ``0 .. num_samples - 1``, another one for each seed and epoch.
    """
    assert num_samples > 0
    assert positions.size == 0 or (positions.min() >= 0 and positions.max() < num_samples)
    rows = math.isqrt(num_samples - 1) + 1
    columns = -(-num_samples // rows)
    keys = _round_keys(seed, epoch)
    ids = _permute_grid(positions.astype(np.uint64), rows, columns, keys)
    outside = np.flatnonzero(ids >= num_samples)
    while outside.size:
        ids[outside] = _permute_grid(ids[outside], rows, columns, keys)
        outside = outside[ids[outside] >= num_samples]
    return ids.astype(np.int64)


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Full global batches in an epoch; the remainder is dropped, and differs from epoch to epoch."""
    return num_samples // global_batch


def batch_ids(num_samples: int, seed: int, epoch: int, step: int, global_batch: int) -> NDArray[np.int64]:
    """The sample ids of global batch ``step`` of ``epoch``: int64 ``[global_batch]``, the same on every rank."""
    assert 0 <= step < steps_per_epoch(num_samples, global_batch)
    positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    return epoch_order(num_samples, seed, epoch, positions)


def rank_slice(ids: NDArray[np.int64], rank: int, world_size: int) -> NDArray[np.int64]:
    """One rank's contiguous part of a global batch: int64 ``[len(ids) / world_size]``."""
    assert len(ids) % world_size == 0
    rank_batch = len(ids) // world_size
    return ids[rank * rank_batch : (rank + 1) * rank_batch]


def _round_keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    """One 64-bit key for each Feistel round: uint64 ``[FEISTEL_ROUNDS]``."""
    counters = np.zeros((FEISTEL_ROUNDS, 4), dtype=np.uint32)
    counters[:, 0] = np.arange(FEISTEL_ROUNDS)
    counters[:, 2] = epoch
    counters[:, 3] = ORDER_STREAM << 16
    words = philox4x32(counters, seed_key(seed)).astype(np.uint64)
    return words[:, 0] << np.uint64(32) | words[:, 1]


def _permute_grid(values: NDArray[np.uint64], rows: int, columns: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A keyed permutation of ``0 .. rows * columns - 1``."""
    left, right = np.divmod(values, np.uint64(columns))
    for index, key in enumerate(keys):
        if index % 2 == 0:
            left = (left + splitmix64(right ^ key) % np.uint64(rows)) % np.uint64(rows)
        else:
            right = (right + splitmix64(left ^ key) % np.uint64(columns)) % np.uint64(columns)
    return left * np.uint64(columns) + right
