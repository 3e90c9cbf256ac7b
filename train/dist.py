"""Owns the processes of a run: who this one is, how they talk, and that they fail together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as td
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.span import Process
from train.activity import Activity

T = TypeVar("T")

SILENT_S = 10.0  # by which one process of a machine may be behind another before they first meet: imports


class SharedError(UserError):
    """A user's mistake that every rank has found or been told of. ``speaks`` is true on the one that prints it."""

    def __init__(self, message: str, speaks: bool) -> None:
        """``message`` is the same on all ranks."""
        super().__init__(message)
        self.speaks = speaks


@contextmanager
def told_once() -> Iterator[None]:
    """Let a SharedError through on the rank that prints it; the others leave with its exit code in silence.

    They leave later: torchrun ends all processes once one has left, and the one that speaks may not have spoken yet.
    """
    try:
        yield
    except SharedError as error:
        if not error.speaks:
            time.sleep(SILENT_S)
            sys.exit(2)
        raise


@dataclass(frozen=True)
class Dist(Process):
    """This process, and how it talks with the others. Read from torchrun's variables once."""

    store: td.Store | None = field(default=None, compare=False, repr=False)  # where several processes leave notes
    activity: Activity = field(default_factory=Activity, compare=False, repr=False)  # what this process is doing

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


@contextmanager
def distributed(device: Literal["auto", "cuda", "cpu"], timeout: timedelta = timedelta(minutes=30)) -> Iterator[Dist]:
    """Join the run's processes (NCCL on GPUs, gloo on CPUs) and leave them at the end.

    A collective of ``timeout`` ends the process, without a word on who is to blame: train/hangs.py finds that out
    before. Without torchrun there is one process and nothing to join. Raises SharedError if the device cannot be had.
    """
    rank, world_size, local_rank, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    try:
        dist = Dist(rank, world_size, local_rank, local_world_size, _device(device, local_rank, local_world_size))
    except UserError as error:
        raise SharedError(str(error), speaks=rank == 0) from None
    if dist.device.type == "cuda":
        torch.cuda.set_device(dist.device)
    if world_size == 1:
        yield dist
        return
    store = _fresh_store()
    options: dict[str, Any] = {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}
    if dist.device.type == "cuda":
        td.init_process_group("nccl", device_id=dist.device, **options)
    else:
        td.init_process_group("gloo", **options)
    try:
        yield replace(dist, store=store)
        td.barrier()  # torchrun ends the others as soon as one has left with an exit code of its own
    except SharedError:  # of all ranks
        td.destroy_process_group()
        raise
    except BaseException:
        # Of this rank, maybe alone. NCCL would wait for the others, which wait for this one in some other collective,
        # and what went wrong would never be told.
        if dist.device.type != "cuda":
            td.destroy_process_group()
        raise
    td.destroy_process_group()


def _fresh_store() -> td.Store:
    """Where the processes find each other, without the addresses of processes that torchrun has restarted since.

    torchrun's agents keep one store for all restarts (unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), and whoever reads
    a dead process' address from it waits for half an hour. Agents of several machines do not count restarts alike, so
    there that variable is the only remedy.
    """
    store, _, _ = next(td.rendezvous("env://"))
    alone = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return td.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if alone else 0}", store)


def _device(choice: str, local_rank: int, local_world_size: int) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if choice == "cpu" or (choice == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise UserError(
            "--device cuda, but PyTorch finds no GPU here: check `nvidia-smi` and that torch.version.cuda "
            f"({torch.version.cuda}) fits the driver, or take --device cpu"
        )
    if local_world_size > gpus:
        raise UserError(f"{local_world_size} processes for {gpus} GPUs: start at most {gpus} with --nproc-per-node")
    return torch.device("cuda", local_rank)


def say(dist: Dist, message: str) -> None:
    """Print a line for people, once per run."""
    if dist.is_main:
        print(message, flush=True)


def together(dist: Dist, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; a UserError on any is a SharedError on all, so that none waits for another.

    ``action`` must contain no collective of its own.
    """
    error: UserError | None = None
    try:
        result = action()
    except UserError as raised:
        error = raised
    if dist.world_size == 1:
        if error is not None:
            raise error
        return result
    messages: list[str | None] = [None] * dist.world_size
    with dist.activity.waiting("hearing whether every rank could do the same"):
        td.all_gather_object(messages, None if error is None else str(error))
    for rank, message in enumerate(messages):
        if message is not None:
            where = f" (on rank {rank})" if rank > 0 else ""
            raise SharedError(message + where, dist.is_main) from error
    return result


def on_main(dist: Dist, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 alone and return its (picklable) result on every rank; its UserError reaches all."""
    result = together(dist, lambda: action() if dist.is_main else None)
    if dist.world_size == 1:
        return result  # type: ignore[return-value]
    box = [result]
    with dist.activity.waiting("hearing what rank 0 found"):
        td.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def any_rank(dist: Dist, *flags: bool) -> tuple[bool, ...]:
    """For each flag, whether it is set on any rank. A collective and, on a GPU, a host sync."""
    if dist.world_size == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.int32, device=dist.device)
    with dist.activity.waiting("asking all ranks"):
        td.all_reduce(votes, op=td.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes.tolist())


def sum_over_ranks(dist: Dist, values: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """``values`` added up over the ranks, on the device. A collective."""
    if dist.world_size > 1:
        td.all_reduce(values)
    return values


def mean_over_ranks(dist: Dist, values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The mean of ``values`` over the ranks, on the device. A collective."""
    return sum_over_ranks(dist, values) / dist.world_size


def gather_rows(dist: Dist, rows: Shaped[Tensor, "n *rest"], counts: list[int]) -> Shaped[Tensor, "total *rest"]:  # noqa: F821
    """All ranks' rows in the order of the ranks, on every rank; ``counts[r]`` is how many rank r has."""
    assert len(rows) == counts[dist.rank]
    if dist.world_size == 1:
        return rows
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    td.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def share_buffers(dist: Dist, module: nn.Module) -> None:
    """Give every rank rank 0's BN statistics. They differ only where BN is local (--no-sync-bn)."""
    if dist.world_size > 1:
        with dist.activity.waiting("sharing rank 0's batch statistics"):
            for buffer in module.buffers():
                td.broadcast(buffer, src=0)
