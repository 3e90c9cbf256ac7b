"""The order of a mixture of datasets: which dataset, and which of its samples, stands at a position of an epoch.

A weight says how often an epoch goes through its dataset, so an epoch has ``sum(round(weight * samples))`` positions.
Two steps, both pure functions of (seed, epoch, position):

1. Which dataset. Every global batch holds the datasets in the proportion of the epoch, to a sample; the places within
   the batch are a keyed permutation.
2. Which sample. Each dataset is an endless row of its own passes, pass after pass in its own order, and the epochs take
   one stretch of the row after the other. So with weight 0.3 no sample comes again before all have come.

A sample's views are drawn from its pass in the place of the epoch (``Mixture.draw_epochs``): where an epoch holds it
twice, the views differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.sampling.counter_rng import splitmix64
from pipeline.sampling.order import Order, OrderConfig, choose_order, permute_each

MIXTURE_STREAM = 0x0D3C  # keeps the counters of places within batches apart from the others of the order
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class MixturePart:
    """One dataset of a mixture."""

    shard_samples: NDArray[np.int64]  # [shards]
    epoch_samples: int  # positions of an epoch that are its samples'


class MixtureOrder:
    """``(epoch, positions) -> sample ids``, which are numbered on from dataset to dataset. Thread-safe."""

    def __init__(self, parts: Sequence[MixturePart], config: OrderConfig, seed: int, global_batch: int) -> None:
        """Each part's own order is that of ``config``. Raises UserError for what a mixture cannot have."""
        if config.block_streams > 1:
            raise UserError(
                f"--block-streams {config.block_streams} with several datasets: streams divide the shards of one; "
                "leave it out"
            )
        if global_batch < len(parts) * (len(parts) - 1):
            raise UserError(
                f"--global-batch {global_batch} cannot hold {len(parts)} datasets in their proportion: take at least "
                f"{len(parts) * (len(parts) - 1)}"
            )
        self._batch = global_batch
        self._seed = seed
        self._per_epoch = [part.epoch_samples for part in parts]
        self._samples = np.array([part.shard_samples.sum() for part in parts])
        self._first = np.cumsum(self._samples) - self._samples
        self._orders: list[Order] = [
            choose_order(config, part_seed(seed, number), part.shard_samples, global_batch)
            for number, part in enumerate(parts)
        ]

    def __call__(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample ids at ``positions``, in full batches of ``epoch``: int64 ``[n]`` both.

        A sample that the epoch holds several times has its id plus ``num_samples`` the second time, plus twice that the
        third time, so that all ids of an epoch differ.
        """
        parts, slots = self._places(epoch, positions)
        samples, begin = self._samples[parts], epoch * np.array(self._per_epoch)[parts]
        passes, places = np.divmod(begin + slots, samples)
        ids = (passes - begin // samples) * self._samples.sum()
        for part, number in np.unique(np.stack([parts, passes]), axis=1).T.tolist():
            mine = (parts == part) & (passes == number)
            ids[mine] += self._first[part] + self._orders[part](number, places[mine])
        return ids

    def _places(self, epoch: int, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The part of each position, and which of the part's positions in the epoch it is: int64 ``[n]`` both."""
        full = sum(self._per_epoch) // self._batch * self._batch  # smaller batches would not hold the proportion
        assert positions.size == 0 or positions.max() < full
        batches, offsets = np.divmod(positions, self._batch)
        numbers, which = np.unique(batches, return_inverse=True)
        begin = np.array([self._before(number * self._batch) for number in numbers.tolist()])  # [batches, parts]
        end = np.array([self._before((number + 1) * self._batch) for number in numbers.tolist()])
        counts = end - begin
        shuffled = permute_each(counts.sum(1), self._seed, epoch, MIXTURE_STREAM, numbers, offsets, which)
        edges = np.cumsum(counts, axis=1)[which]  # [n, parts]
        parts = (shuffled[:, None] >= edges).sum(1)
        row = np.arange(len(positions))
        return parts, begin[which, parts] + shuffled - (edges - counts[which])[row, parts]

    def _before(self, position: int) -> list[int]:
        """How many of the first ``position`` positions are each part's. The largest part takes what rounding leaves.

        In Python's integers, as the products exceed 64 bits.
        """
        total, largest = sum(self._per_epoch), self._per_epoch.index(max(self._per_epoch))
        counts = [position * count // total for count in self._per_epoch]
        counts[largest] += position - sum(counts)
        return counts


def part_seed(seed: int, number: int) -> int:
    """The seed of dataset ``number``'s own order; the first has the run's."""
    if number == 0:
        return seed
    return int(splitmix64(np.array([(seed + number * _SEED_STEP) % (1 << 64)], np.uint64))[0])
