"""Owns which samples a process reads, step by step: its part of every batch, and all that its machine reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int64

from pipeline.order import Order, batch_positions, node_positions, steps_per_epoch

if TYPE_CHECKING:
    from typing_extensions import Self

Place = tuple[int, int, Int64[np.ndarray, "_"]]  # epoch, step within the epoch, sample ids; each of its own length  # noqa: F821


@dataclass(frozen=True)
class Process:
    """One process among ``world_size``; ``local_*`` count within its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @classmethod
    def alone(cls, device: torch.device) -> Self:
        """The only one."""
        return cls(0, 1, 0, 1, device)


@dataclass(frozen=True)
class Span:
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

    def places(self, num_samples: int, order: Order, process: Process) -> Iterator[Place]:
        """The micro-batches of one process, among ``num_samples`` samples that come in ``order``."""
        for epoch, step in self._steps(num_samples):
            ids = order(epoch, batch_positions(step, self.global_batch, process.rank, process.world_size))
            for part in np.array_split(ids, self.accumulate):
                yield epoch, step, part

    def of_machine(self, num_samples: int, order: Order, process: Process) -> Iterator[Int64[np.ndarray, "_"]]:  # noqa: F821
        """For each step, the samples of all processes on this one's machine."""
        ranks = process.rank, process.world_size, process.local_world_size
        for epoch, step in self._steps(num_samples):
            yield order(epoch, node_positions(step, self.global_batch, *ranks))

    def _steps(self, num_samples: int) -> Iterator[tuple[int, int]]:
        for epoch in range(self.start_epoch, self.epochs):
            first = self.start_step if epoch == self.start_epoch else 0
            for step in range(first, steps_per_epoch(num_samples, self.global_batch)):
                yield epoch, step
