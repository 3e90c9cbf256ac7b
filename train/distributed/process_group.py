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

from pipeline.common.errors import UserError
from pipeline.sampling.sampler import World


@dataclass(frozen=True)
class RankActivity:
    """One stretch of a process' life."""

    what: str
    waiting: bool  # for the other ranks, in a collective
    waits: int  # how many times it has waited for them so far, this time included: all ranks count alike
    since_s: float  # by the process' clock


class RankStatus:
    """The current stretch. Noting costs about a microsecond and nothing of the device."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds."""
        self._clock = clock
        self.now = RankActivity("preparing the run", waiting=False, waits=0, since_s=clock())

    def work(self, what: str) -> None:
        """From now on the process does something that depends on no other rank."""
        self.now = RankActivity(what, False, self.now.waits, self._clock())

    def wait(self, what: str) -> None:
        """From now on it may have to wait for the other ranks."""
        self.now = RankActivity(what, True, self.now.waits + 1, self._clock())

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Wait inside, then go on with what was before."""
        before = self.now.what
        self.wait(what)
        yield
        self.work(before)

    def age_s(self) -> float:
        """How long the current stretch lasts."""
        return self._clock() - self.now.since_s


T = TypeVar("T")
SILENT_S = 10.0  # by which one process of a machine may be behind another before they first meet: imports


class SharedError(UserError):
    """A user's mistake that every rank has found or been told of. ``speaks`` is true on the one that prints it."""

    def __init__(self, message: str, speaks: bool) -> None:
        """``message`` is the same on all ranks."""
        super().__init__(message)
        self.speaks = speaks


@contextmanager
def exit_once() -> Iterator[None]:
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
class DistContext(World):
    """This process, and how it talks with the others. Read from torchrun's variables once."""

    store: td.Store | None = field(default=None, compare=False, repr=False)  # where several processes leave notes
    activity: RankStatus = field(default_factory=RankStatus, compare=False, repr=False)  # what this process is doing

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


@contextmanager
def distributed(
    device: Literal["auto", "cuda", "cpu"], timeout: timedelta = timedelta(minutes=30)
) -> Iterator[DistContext]:
    """Join the run's processes (NCCL on GPUs, gloo on CPUs) and leave them at the end.

    A collective of ``timeout`` ends the process, without a word on who is to blame: train/distributed/watchdog.py
    finds that out before. Without torchrun there is one process and nothing to join. Raises SharedError if the device
    cannot be had.
    """
    rank, world_size, local_rank, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    try:
        dist = DistContext(
            rank, world_size, local_rank, local_world_size, choose_device(device, local_rank, local_world_size)
        )
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


def choose_device(
    choice: Literal["auto", "cuda", "cpu"], local_rank: int = 0, local_world_size: int = 1
) -> torch.device:
    """The device of one of a machine's ranks. Raises UserError if it cannot be had."""
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
