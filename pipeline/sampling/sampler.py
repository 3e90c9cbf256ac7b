"""Which samples a process reads, step by step: its part of every batch, and all that its machine reads.

``BatchSampler.batches`` gives a rank's micro-batches from any step on, so a run resumes from two integers (epoch and
step) on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray

from pipeline.sampling.order import Order, epoch_order


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Full global batches in an epoch; the remainder is dropped, and differs from epoch to epoch."""
    return num_samples // global_batch


def batch_ids(num_samples: int, seed: int, epoch: int, step: int, global_batch: int) -> NDArray[np.int64]:
    """The sample ids of global batch ``step`` of ``epoch``: int64 ``[global_batch]``, the same on every rank."""
    assert 0 <= step < steps_per_epoch(num_samples, global_batch)
    positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    return epoch_order(num_samples, seed, epoch, positions)


def batch_positions(step: int, global_batch: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """The positions in the epoch of one rank's part of global batch ``step``: int64 ``[global_batch / world_size]``.

    A rank asks the order for its own part alone, so that its cost does not grow with the number of ranks.
    """
    assert global_batch % world_size == 0
    rank_batch = global_batch // world_size
    return step * global_batch + rank * rank_batch + np.arange(rank_batch, dtype=np.int64)


def node_positions(
    step: int, global_batch: int, rank: int, world_size: int, local_world_size: int
) -> NDArray[np.int64]:
    """The positions of all ranks of ``rank``'s machine: int64 ``[global_batch / world_size * local_world_size]``.

    torchrun numbers the ranks of a machine in a row, so that these positions are contiguous.
    """
    assert global_batch % world_size == 0
    assert world_size % local_world_size == 0
    return batch_positions(step, global_batch, rank // local_world_size, world_size // local_world_size)


if TYPE_CHECKING:  # beartype, which checks the annotations under pytest, cannot read it on a method
    from typing_extensions import Self


class BatchIds(NamedTuple):
    """Which samples one micro-batch is made of."""

    epoch: int
    step: int  # within the epoch
    ids: NDArray[np.int64]  # [n]
    pair: int = 0  # which set of views of these samples, where a step has several (SimSiamConfig.pairs)


@dataclass(frozen=True)
class World:
    """One process among ``world_size``; ``local_*`` count within its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @classmethod
    def alone(cls, device: torch.device) -> Self:
        return cls(0, 1, 0, 1, device)


@dataclass(frozen=True)
class BatchSampler:
    """The steps from ``start_step`` of ``start_epoch`` to the end of ``epochs``."""

    seed: int  # of the order and of the views
    global_batch: int  # samples a step, over all processes
    epochs: int
    start_epoch: int = 0
    start_step: int = 0  # within its epoch
    accumulate: int = 1  # micro-batches a step; where they cannot be equal, the last ones have a sample less

    def micro_batch(self, world_size: int) -> int:
        """Samples of one process' largest micro-batch."""
        assert self.global_batch % world_size == 0
        return -(-self.global_batch // world_size // self.accumulate)

    def batches(self, num_samples: int, order: Order, world: World) -> Iterator[BatchIds]:
        """The micro-batches of one process, among ``num_samples`` samples that come in ``order``."""
        for epoch, step in self._steps(num_samples):
            ids = order(epoch, batch_positions(step, self.global_batch, world.rank, world.world_size))
            for part in np.array_split(ids, self.accumulate):
                yield BatchIds(epoch, step, part)

    def machine_ids(self, num_samples: int, order: Order, world: World) -> Iterator[Int64[np.ndarray, "_"]]:  # noqa: F821
        """For each step, the samples of all processes on this one's machine."""
        ranks = world.rank, world.world_size, world.local_world_size
        for epoch, step in self._steps(num_samples):
            yield order(epoch, node_positions(step, self.global_batch, *ranks))

    def _steps(self, num_samples: int) -> Iterator[tuple[int, int]]:
        for epoch in range(self.start_epoch, self.epochs):
            first = self.start_step if epoch == self.start_epoch else 0
            for step in range(first, steps_per_epoch(num_samples, self.global_batch)):
                yield epoch, step
