"""The epoch order: which samples make up a batch, as a pure function of small integers.

The order is a keyed permutation, computed for any position in constant time and memory, so a billion samples cost a
rank no more than a thousand. It is a Feistel network over pairs (Black & Rogaway 2002, "Ciphers with arbitrary
finite domains"): a sample number is written as left * columns + right, and each round adds to one half a hash of the
other. The few values that land outside the data set are permuted again until they land inside ("cycle walking").

For storage with slow random reads there is a second order, by blocks: the shards are permuted, and samples are shuffled
only within groups of a few shards. It keeps a few numbers for each shard, none for a sample. Its epoch can be divided
into parallel streams, each through shards of its own, so that a machine reads its streams' shards and no others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import assert_never

from pipeline.common.errors import UserError, require
from pipeline.common.flags import own_flags
from pipeline.sampling.counter_rng import philox4x32, seed_key, splitmix64

FEISTEL_ROUNDS = 12  # six per half; four in all are proven enough for large halves (Luby & Rackoff 1988)
SHARDING_STREAM = 0x0D5D  # the order in which sharding writes images
ORDER_STREAM = 0x0D0E  # keeps the order's counters apart from those of the views
SHARD_STREAM = 0x0D5A  # the permutation of shards
BLOCK_STREAM = 0x0D81  # those within groups of shards
ONLY_ONE = np.zeros(1, dtype=np.int64)  # number of a stream's permutation that has no siblings
# (epoch, positions in it) -> sample ids; of a mixture plus num_samples for each time before in the epoch
Order = Callable[[int, NDArray[np.int64]], NDArray[np.int64]]


@own_flags
@dataclass(frozen=True)
class OrderConfig:
    """In which order an epoch visits the samples."""

    # Order of the samples in an epoch. random: over the whole dataset; blocks: a few shards at a time, for storage with
    # slow random reads.
    epoch_order: Literal["random", "blocks"] = "random"
    # Shards whose samples are shuffled together with --epoch-order blocks; 16 of 2048 ImageNet images are 3.6 GB.
    block_shards: int = 16
    # Parts of a batch that come from shards of their own, with --epoch-order blocks. If the number of machines divides
    # it, each machine reads only its part of the shards.
    block_streams: int = 1

    def __post_init__(self) -> None:
        require("--block-shards", self.block_shards, self.block_shards >= 1, "a group has at least 1 shard")
        require("--block-streams", self.block_streams, self.block_streams >= 1, "a batch has at least 1 part")
        if self.block_streams > 1 and self.epoch_order != "blocks":
            raise UserError(
                f"--block-streams {self.block_streams} with --epoch-order {self.epoch_order}: streams divide the order "
                "by blocks, and a random order needs every shard on every machine; add --epoch-order blocks, or leave "
                "--block-streams out"
            )

    def check(self, global_batch: int) -> None:
        """Raise UserError unless a batch can be divided into the streams' parts."""
        if global_batch % self.block_streams:
            below = max(global_batch // self.block_streams, 1) * self.block_streams
            raise UserError(
                f"--block-streams {self.block_streams} cannot divide a global batch of {global_batch} into equal "
                f"parts: take a divisor of it, or a multiple of {self.block_streams} for the batch, {below} or "
                f"{below + self.block_streams} for instance"
            )

    def identity(self) -> dict[str, Any]:
        """The fields that decide the order, and so a run's numbers."""
        match self.epoch_order:
            case "random":
                return {"epoch_order": self.epoch_order}
            case "blocks":
                streams = {} if self.block_streams == 1 else {"block_streams": self.block_streams}
                return {"epoch_order": self.epoch_order, "block_shards": self.block_shards, **streams}
            case _:
                assert_never(self.epoch_order)


def choose_order(config: OrderConfig, seed: int, shard_samples: NDArray[np.int64], global_batch: int) -> Order:
    """The order of a dataset whose shard ``s`` holds ``shard_samples[s]`` samples, numbered on from shard to shard.

    It depends on ``global_batch`` only with several streams, and then covers full batches only. Raises UserError if the
    streams do not divide the batch.
    """
    config.check(global_batch)
    num_samples = int(shard_samples.sum())
    match config.epoch_order:
        case "random":
            return partial(epoch_order, num_samples, seed)
        case "blocks":
            blocks, streams = BlockOrder(shard_samples, config.block_shards, seed), config.block_streams
            if streams == 1:
                return blocks
            return lambda epoch, at: blocks(epoch, stream_positions(at, num_samples, global_batch, streams))
        case _:
            assert_never(config.epoch_order)


def epoch_order(num_samples: int, seed: int, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sample ids at some positions of an epoch.

    ``positions``: int64 ``[n]`` in ``0 .. num_samples - 1``. Returns int64 ``[n]``; over all positions it is a
    permutation of ``0 .. num_samples - 1``, another one for each seed and epoch.
    """
    return _permute_one(num_samples, _round_keys(seed, epoch, ORDER_STREAM), positions)


def sharding_order(num_images: int, seed: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The images at some positions of a dataset that is written: int64 ``[n]`` both, over all a permutation."""
    return _permute_one(num_images, _round_keys(seed, 0, SHARDING_STREAM), positions)


class BlockOrder:
    """``(epoch, positions) -> sample ids``: shards permuted, samples shuffled within groups of ``group`` shards.

    Keeps a few numbers for each shard, of the last epoch asked for. Thread-safe.
    """

    def __init__(self, shard_samples: NDArray[np.int64], group: int, seed: int) -> None:
        """``shard_samples``: int64 ``[shards]``, samples of each; sample ids count on from shard to shard."""
        self._samples = shard_samples
        self._first = np.cumsum(shard_samples) - shard_samples
        self._group = group
        self._seed = seed
        self._newest = (-1, (self._first, self._first))  # no epoch yet

    def __call__(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample ids at ``positions`` of ``epoch``: int64 ``[n]`` both; over all positions a permutation."""
        known, layout = self._newest
        if known != epoch:
            layout = self._lay_out(epoch)
            self._newest = (epoch, layout)
        shards, starts = layout
        groups = (np.searchsorted(starts, positions, side="right") - 1) // self._group
        numbers, which = np.unique(groups, return_inverse=True)  # all groups are permuted in one pass
        begin = starts[numbers * self._group]
        sizes = starts[np.minimum((numbers + 1) * self._group, len(shards))] - begin
        keys = _round_keys(self._seed, epoch, BLOCK_STREAM, numbers)
        permuted = begin[which] + _permute(sizes, keys, positions - begin[which], which)
        at = np.searchsorted(starts, permuted, side="right") - 1
        return self._first[shards[at]] + permuted - starts[at]

    def _lay_out(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards in the order of an epoch, without empty ones, and where each starts and the last ends."""
        keys = _round_keys(self._seed, epoch, SHARD_STREAM)
        shards = _permute_one(len(self._samples), keys, np.arange(len(self._samples)))
        shards = shards[self._samples[shards] > 0]
        return shards, np.concatenate([[0], np.cumsum(self._samples[shards])])


def stream_positions(
    positions: NDArray[np.int64], num_samples: int, global_batch: int, streams: int
) -> NDArray[np.int64]:
    """The ``positions`` of an epoch, mapped so that part ``j`` of every batch comes from stretch ``j`` of the epoch.

    There are ``streams`` stretches of ``num_samples // streams`` positions; each step takes the next part of a batch
    from each. int64 ``[n]`` both; different positions of full batches are mapped to different ones.
    """
    assert global_batch % streams == 0
    assert positions.size == 0 or positions.max() < num_samples // global_batch * global_batch
    part = global_batch // streams
    steps, offsets = np.divmod(positions, global_batch)
    stretches, within = np.divmod(offsets, part)
    return stretches * (num_samples // streams) + steps * part + within


def permute_each(
    sizes: NDArray[np.int64],
    seed: int,
    epoch: int,
    stream: int,
    numbers: NDArray[np.int64],
    positions: NDArray[np.int64],
    which: NDArray[np.intp],
) -> NDArray[np.int64]:
    """Position ``i`` under permutation ``numbers[which[i]]`` of a stream, over ``0 .. sizes[which[i]] - 1``.

    ``sizes`` and ``numbers`` int64 ``[permutations]``; the others and the result int64 ``[n]``.
    """
    return _permute(sizes, _round_keys(seed, epoch, stream, numbers), positions, which)


def _permute(
    sizes: NDArray[np.int64], keys: NDArray[np.uint64], positions: NDArray[np.int64], which: NDArray[np.intp]
) -> NDArray[np.int64]:
    """Keyed permutations at some positions: position ``i`` under that of ``0 .. sizes[which[i]] - 1``.

    ``sizes`` int64 ``[permutations]``, ``keys`` uint64 ``[FEISTEL_ROUNDS, permutations]``; the others and the result
    int64 ``[n]``.
    """
    assert (sizes > 0).all()
    assert positions.size == 0 or (positions.min() >= 0 and (positions < sizes[which]).all())
    rows = np.array([math.isqrt(size - 1) + 1 for size in sizes.tolist()], dtype=np.int64)
    grids = _Grids(rows.astype(np.uint64), (-(-sizes // rows)).astype(np.uint64), keys)
    limits = sizes.astype(np.uint64)
    ids = grids.permute(positions.astype(np.uint64), which)
    outside = np.flatnonzero(ids >= limits[which])
    while outside.size:
        ids[outside] = grids.permute(ids[outside], which[outside])
        outside = outside[ids[outside] >= limits[which[outside]]]
    return ids.astype(np.int64)


def _permute_one(num_samples: int, keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """One keyed permutation of ``0 .. num_samples - 1`` at some positions: int64 ``[n]``."""
    return _permute(np.array([num_samples]), keys, positions, np.zeros(len(positions), dtype=np.intp))


def _round_keys(seed: int, epoch: int, stream: int, numbers: NDArray[np.int64] = ONLY_ONE) -> NDArray[np.uint64]:
    """A 64-bit key for each Feistel round of permutations ``numbers`` of a stream: ``[FEISTEL_ROUNDS, numbers]``."""
    counters = np.zeros((FEISTEL_ROUNDS, len(numbers), 4), dtype=np.uint32)
    counters[..., 0] = np.arange(FEISTEL_ROUNDS)[:, None]
    counters[..., 1] = numbers
    counters[..., 2] = epoch
    counters[..., 3] = stream << 16
    words = philox4x32(counters.reshape(-1, 4), seed_key(seed)).astype(np.uint64)
    return (words[:, 0] << np.uint64(32) | words[:, 1]).reshape(FEISTEL_ROUNDS, len(numbers))


@dataclass(frozen=True)
class _Grids:
    """Keyed permutations of ``0 .. rows * columns - 1``."""

    rows: NDArray[np.uint64]  # [permutations]
    columns: NDArray[np.uint64]  # [permutations]
    keys: NDArray[np.uint64]  # [FEISTEL_ROUNDS, permutations]

    def permute(self, values: NDArray[np.uint64], which: NDArray[np.intp]) -> NDArray[np.uint64]:
        """``values[i]`` under permutation ``which[i]``: all ``[n]``."""
        rows, columns = self.rows[which], self.columns[which]
        left, right = np.divmod(values, columns)
        for index, key in enumerate(self.keys):
            if index % 2 == 0:
                left = (left + splitmix64(right ^ key[which]) % rows) % rows
            else:
                right = (right + splitmix64(left ^ key[which]) % columns) % columns
        return left * columns + right
