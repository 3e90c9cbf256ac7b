"""Owns the account of waiting: which rank waited longest for its data, and which shard cost most to read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.read_costs import ReadCosts
from pipeline.shards import ShardSet
from train.dist import Dist, sum_over_ranks

RANKS_SHOWN = 8  # more than that are summed up in the progress line


@dataclass(frozen=True)
class Waits:
    """How long each rank waited for the loader, out of a stretch of the loop."""

    seconds: tuple[float, ...]  # of each rank
    of_s: float  # the stretch, in seconds

    @property
    def shares(self) -> list[float]:
        """data_wait of each rank: 0 to 1."""
        return [min(seconds / max(self.of_s, 1e-9), 1.0) for seconds in self.seconds]

    @property
    def slowest(self) -> int:
        """The rank that waited longest; the others wait for it in turn, when gradients are averaged."""
        return int(np.argmax(self.seconds))

    def __str__(self) -> str:
        """The shares of the ranks, for the progress line; of many ranks the longest and the mean."""
        shares, slowest = self.shares, self.slowest
        if len(shares) == 1:
            return f"{shares[0]:.0%}"
        if len(shares) <= RANKS_SHOWN:
            return f"{shares[slowest]:.0%} (ranks {' '.join(f'{share:.0%}' for share in shares)})"
        return f"{shares[slowest]:.0%} (rank {slowest}; mean {np.mean(shares):.0%})"


def describe_waits(waits: Waits) -> str:
    """One line for the end of a session."""
    line = f"data_wait: {waits}"
    if len(waits.seconds) > 1:
        line += f"; rank {waits.slowest} waited longest"
    return f"{line}, {waits.seconds[waits.slowest]:.1f} s of {waits.of_s:.1f} s"


@dataclass(frozen=True)
class ShardCost:
    """The shard whose samples took longest to read."""

    name: str
    reads: int
    ms: float  # a sample, mean
    mean_ms: float  # a sample, over all shards


def costliest_shard(dist: Dist, dataset: ShardSet, costs: ReadCosts) -> ShardCost | None:
    """By the time that all ranks together spent on reading it; None if nothing was read. A collective."""
    both = torch.from_numpy(np.stack([costs.seconds, costs.reads.astype(np.float64)])).to(dist.device)
    with dist.activity.waiting("adding up what all ranks have read"):
        seconds, reads = sum_over_ranks(dist, both).cpu().numpy()
    if not reads.any():
        return None
    worst = int(np.argmax(seconds))
    return ShardCost(
        dataset.shards[worst].name,
        round(reads[worst]),
        float(1e3 * seconds[worst] / reads[worst]),
        float(1e3 * seconds.sum() / reads.sum()),
    )


def describe_shard(cost: ShardCost) -> str:
    """One line for the end of a session."""
    return (
        f"reading: {cost.name} cost most, {cost.ms:.2f} ms a sample over {cost.reads:,} reads; "
        f"the mean of all shards is {cost.mean_ms:.2f} ms"
    )
