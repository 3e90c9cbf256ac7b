"""Collectives for people's errors, flags and small sums; on GPUs without the host waiting for the device where it can.

Raise a user's mistake inside ``on_all_ranks`` or ``on_rank0``: every rank then raises it, and one prints it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as td
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pipeline.common.errors import UserError
from train.distributed.process_group import DistContext, SharedError, T

GPU_LAG = 2  # steps; about as far as the host runs ahead of the device, so the votes are counted when they are read


def default_lag(dist: DistContext) -> int:
    """Steps after which numbers are read so that the host does not wait: GPU_LAG; 0 on a CPU."""
    return GPU_LAG if dist.device.type == "cuda" else 0


class FlagConsensus:
    """Flags that any rank may raise, and that all ranks read at the same step.

    On GPUs the flags of each step are summed after its work and read ``lag`` steps later, on every rank alike: by then
    the device has most likely done that step, so the host rarely waits and the device's queue stays full. On CPUs there
    is no lag.
    """

    def __init__(self, dist: DistContext, lag: int | None = None) -> None:
        """``lag`` in steps; None: GPU_LAG on a GPU, 0 on a CPU."""
        self._dist = dist
        self._lag = default_lag(dist) if lag is None else lag
        self._counts: deque[Callable[[], tuple[bool, ...]]] = deque()

    def any_rank(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it was raised on any rank ``lag`` steps ago. To be called every step; a collective.

        When a flag is reported, pending votes are discarded on every rank, so it is reported once.
        """
        if self._dist.world_size == 1:
            return flags
        self._counts.append(self._vote(flags))
        if len(self._counts) <= self._lag:
            return (False,) * len(flags)
        with self._dist.status.waiting("agreeing on whether to stop"):
            flags = self._counts.popleft()()
        if any(flags):
            self._counts.clear()
        return flags

    def _vote(self, flags: tuple[bool, ...]) -> Callable[[], tuple[bool, ...]]:
        """Start summing the votes; the function returned waits for the sum."""
        device = self._dist.device
        votes = torch.zeros(len(flags), dtype=torch.int32, device=device)
        for index, flag in enumerate(flags):
            if flag:
                votes[index].fill_(1)  # a kernel; a tensor made of the host's flags would wait for the device
        work = td.all_reduce(votes, async_op=True)
        assert work is not None
        read: Callable[[], list[Any]]
        if device.type == "cuda":
            work.wait()  # lets the device's queue wait, not the host
            read = HostCopy(votes).read
        else:

            def read() -> list[Any]:
                work.wait()
                return votes.tolist()

        return lambda: tuple(vote > 0 for vote in read())


class HostCopy:
    """Numbers on their way from the device to the host. Who reads them some steps later does not wait."""

    def __init__(self, values: Shaped[Tensor, " n"]) -> None:
        """Start the copy, after the work that the current stream has been given."""
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            self._copied = torch.cuda.current_stream().record_event()
        self._values = values

    def is_here(self) -> bool:
        """Whether ``read`` need not wait."""
        return self._copied is None or self._copied.query()

    def read(self) -> list[Any]:
        """The numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


def print0(dist: DistContext, message: str) -> None:
    """Print a line for people, once per run."""
    if dist.is_main:
        print(message, flush=True)


@dataclass(frozen=True)
class Mark:
    """What must be equal on all ranks, and the message for the user of a rank where it is not."""

    value: str
    if_other: str


def on_all_ranks(dist: DistContext, action: Callable[[], T], mark: Callable[[T], Mark] | None = None) -> T:
    """Run ``action`` on every rank; a UserError on any is a SharedError on all, so that none waits for another.

    ``mark`` names what must be as on rank 0 in the results; where it is not, that is such an error too. ``action`` must
    contain no collective of its own.
    """
    error: UserError | None = None
    own: Mark | None = None
    try:
        result = action()
        own = mark(result) if mark is not None else None
    except UserError as raised:
        error = raised
    if dist.world_size == 1:
        if error is not None:
            raise error
        return result
    reports: list[tuple[str | None, Mark | None]] = [(None, None)] * dist.world_size
    with dist.status.waiting("collecting the errors of all ranks"):
        td.all_gather_object(reports, (None if error is None else str(error), own))
    reference = reports[0][1]
    for rank, (message, their) in enumerate(reports):
        if message is None and their is not None and reference is not None and their.value != reference.value:
            message = their.if_other
        if message is not None:
            where = f" (on rank {rank})" if rank > 0 else ""
            raise SharedError(message + where, dist.is_main) from error
    return result


def on_rank0(dist: DistContext, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 alone and return its (picklable) result on every rank; its UserError reaches all."""
    result = on_all_ranks(dist, lambda: action() if dist.is_main else None)
    if dist.world_size == 1:
        return result  # type: ignore[return-value]
    box = [result]
    with dist.status.waiting("receiving the result of rank 0"):
        td.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def any_rank(dist: DistContext, *flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set on any rank. A collective and, on a GPU, a host sync."""
    if dist.world_size == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32, device=dist.device)
    with dist.status.waiting("collecting the flags of all ranks"):
        td.all_reduce(votes, op=td.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes.tolist())


def sum_over_ranks(dist: DistContext, values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """``values`` added up over the ranks, on the device. A collective."""
    if dist.world_size > 1:
        td.all_reduce(values)
    return values


def mean_over_ranks(dist: DistContext, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The mean of ``values`` over the ranks, on the device. A collective."""
    return sum_over_ranks(dist, values) / dist.world_size


def gather_rows(dist: DistContext, rows: Shaped[Tensor, "n *rest"], counts: list[int]) -> Shaped[Tensor, "total *rest"]:  # noqa: F821
    """All ranks' rows in the order of the ranks, on every rank; ``counts[r]`` is how many rank r has."""
    assert len(rows) == counts[dist.rank]
    if dist.world_size == 1:
        return rows
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    td.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def share_buffers(dist: DistContext, module: nn.Module) -> None:
    """Give every rank rank 0's BN statistics. They differ only where BN is local (--no-sync-bn)."""
    if dist.world_size > 1:
        with dist.status.waiting("sharing rank 0's batch statistics"):
            for buffer in module.buffers():
                td.broadcast(buffer, src=0)
