"""Owns how the ranks agree between steps, on whether to stop for instance, without the host waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as td

from train.dist import Dist

GPU_LAG = 2  # steps; the host prepares about as many while the device computes, so that these votes are counted already


class Agreement:
    """Flags that any rank may raise, and that all ranks hear of at the same step.

    On GPUs the votes of each step are summed behind its work and read ``lag`` steps later, on every rank alike: the
    host waits for a step that the device has most likely done, and never lets it run dry. On CPUs there is no lag.
    """

    def __init__(self, dist: Dist, lag: int | None = None) -> None:
        """``lag`` in steps; None: as the device needs it."""
        self._dist = dist
        self._lag = lag if lag is not None else GPU_LAG if dist.device.type == "cuda" else 0
        self._counts: deque[Callable[[], tuple[bool, ...]]] = deque()

    def ask(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it was raised on any rank ``lag`` steps ago. To be called every step; a collective.

        A flag that is heard is heard once: the votes of the steps since are forgotten, on every rank.
        """
        if self._dist.world_size == 1:
            return flags
        self._counts.append(self._vote(flags))
        if len(self._counts) <= self._lag:
            return (False,) * len(flags)
        with self._dist.activity.waiting("agreeing on whether to stop"):
            heard = self._counts.popleft()()
        if any(heard):
            self._counts.clear()
        return heard

    def _vote(self, flags: tuple[bool, ...]) -> Callable[[], tuple[bool, ...]]:
        """Sum the votes; returns what waits for the sum."""
        device = self._dist.device
        votes = torch.zeros(len(flags), dtype=torch.int32, device=device)
        for index, flag in enumerate(flags):
            if flag:
                votes[index].fill_(1)  # a kernel; a tensor made of the host's flags would wait for the device
        work = td.all_reduce(votes, async_op=True)
        assert work is not None
        counted: Callable[[], object] = work.wait
        if device.type == "cuda":
            work.wait()  # lets the device's queue wait, not the host
            votes = torch.empty_like(votes, device="cpu", pin_memory=True).copy_(votes, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            counted = copied.synchronize

        def count() -> tuple[bool, ...]:
            counted()
            return tuple(vote > 0 for vote in votes.tolist())

        return count
