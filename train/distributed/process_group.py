"""The processes of a run: their ranks, how they communicate, and how a user's mistake ends all of them.

A command reads torchrun's variables with ``read_launch``, and works inside ``exit_once`` and ``distributed``.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as td

from pipeline.common import torchrun
from pipeline.common.errors import UserError
from pipeline.sampling.sampler import World


@dataclass(frozen=True)
class RankActivity:
    """What a process is doing."""

    what: str
    waiting: bool  # for the other ranks, in a collective
    waits: int  # collectives entered so far, this one included; equal on ranks that are equally far
    since_s: float  # by the process' clock


class RankStatus:
    """The current activity of a process, for train/distributed/watchdog.py. A change costs about a microsecond."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds."""
        self._clock = clock
        self.now = RankActivity("preparing the run", waiting=False, waits=0, since_s=clock())
        self._compiling = 0  # compilations that have begun and are not over

    def work(self, what: str) -> None:
        """Begin something that depends on no other rank."""
        self.now = RankActivity(what, False, self.now.waits, self._clock())

    def wait(self, what: str) -> None:
        """Begin something that may wait for the other ranks."""
        self.now = RankActivity(what, True, self.now.waits + 1, self._clock())

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """``wait`` inside the context; afterwards the activity before is resumed."""
        before = self.now.what
        self.wait(what)
        yield
        self.work(before)

    def age_s(self) -> float:
        """Seconds since the current activity began; 0 while torch.compile compiles, which is no hang."""
        return 0.0 if self._compiling else self._clock() - self.now.since_s

    def follow_compiler(self) -> None:
        """Let ``age_s`` know of every compilation of this process from now on."""
        from torch._dynamo.callback import callback_handler as callbacks  # imports the compiler: a second and more

        callbacks.register_start_callback(lambda _: self._compiles(1))
        callbacks.register_end_callback(lambda _: self._compiles(-1))

    def _compiles(self, more: int) -> None:
        self._compiling += more
        self.now = replace(self.now, since_s=self._clock())


T = TypeVar("T")
SILENT_S = 10.0  # the ranks of a machine start at different times, by imports of different length


@dataclass(frozen=True)
class Launch:
    """How this process was started: torchrun's variables, or one process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def read_launch(environment: Mapping[str, str] = os.environ) -> Launch:
    """Read the variables. Raises UserError if some are missing or make no sense, or if Slurm started several processes.

    Each of several processes would otherwise take itself for the only one, and all would write to the same files.
    """
    missing = [name for name in VARIABLES if name not in environment]
    remedy = "start with torchrun, which sets them all, or unset them for a single process"
    if len(missing) == len(VARIABLES):
        tasks = environment.get("SLURM_NTASKS", "1")
        if tasks != "1":
            raise UserError(
                f"SLURM_NTASKS is {tasks}, but torchrun's RANK is not set: start one torchrun per machine "
                "(`srun --ntasks-per-node=1 torchrun ...`), or set SLURM_NTASKS=1 for a single process"
            )
        return Launch()
    if missing:
        present = ", ".join(f"{name}={environment[name]}" for name in VARIABLES if name in environment)
        raise UserError(f"{present}, but {', '.join(missing)} not set: {remedy}")
    try:
        rank, world_size, local_rank, local_world_size = (int(environment[name]) for name in VARIABLES)
        valid = 0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size
    except ValueError:
        valid = False
    if not valid:
        present = ", ".join(f"{name}={environment[name]}" for name in VARIABLES)
        raise UserError(f"{present} describe no process of a run: {remedy}")
    return Launch(rank, world_size, local_rank, local_world_size)


class SharedError(UserError):
    """A user's mistake that is known to every rank; the one where ``prints`` is true prints it."""

    def __init__(self, message: str, prints: bool) -> None:
        """``message`` is the same on all ranks."""
        super().__init__(message)
        self.prints = prints


@contextmanager
def found_by_every_rank(launch: Launch) -> Iterator[None]:
    """Turn a UserError that all ranks raise alike into a SharedError, which rank 0 prints.

    Under torchrun also what tyro prints of a wrong flag, for torchrun's report of the root cause.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed) if torchrun.is_above() else contextlib.nullcontext():
            yield
    except UserError as error:
        raise SharedError(str(error), launch.is_main) from error
    except SystemExit as end:
        if end.code == 2 and torchrun.is_above():
            raise SharedError(_without_box(printed.getvalue()), launch.is_main) from end
        raise


def _without_box(text: str) -> str:
    """The lines of tyro's box of an error."""
    lines = [line.strip(" │╭╮╰╯─") for line in text.splitlines()]
    return "\n".join(line for line in lines if line) or "the command line is wrong"


@contextmanager
def exit_once() -> Iterator[None]:
    """Let a SharedError pass on the rank that prints it; the other ranks exit with code 2 and print nothing.

    They exit 10 s later: torchrun kills all ranks when one exits, possibly before rank 0 has printed the error.
    """
    try:
        yield
    except SharedError as error:
        if not error.prints:
            time.sleep(SILENT_S)
            sys.exit(2)
        raise
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


@dataclass(frozen=True)
class DistContext(World):
    """This process among those of the run."""

    store: td.Store | None = field(default=None, compare=False, repr=False)  # the rendezvous' store; None: one process
    status: RankStatus = field(default_factory=RankStatus, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0


@contextmanager
def distributed(
    device: Literal["auto", "cuda", "cpu"],
    timeout: timedelta = timedelta(minutes=30),
    launch: Launch | None = None,
    *,
    captures: bool = False,
) -> Iterator[DistContext]:
    """Join the processes of the run (NCCL on GPUs, gloo on CPUs), and leave the group at the end.

    A collective that takes longer than ``timeout`` ends the process without naming the rank at fault;
    train/distributed/watchdog.py does that earlier. A single process joins nothing. ``launch`` is read from the
    environment by default. ``captures``: collectives will be captured in CUDA graphs. Raises SharedError if there is no
    such device.
    """
    launch = launch or read_launch()
    with found_by_every_rank(launch):
        own_device = choose_device(device, launch.local_rank, launch.local_world_size)
    dist = DistContext(launch.rank, launch.world_size, launch.local_rank, launch.local_world_size, own_device)
    if dist.device.type == "cuda":
        torch.cuda.set_device(dist.device)
    if dist.world_size == 1:
        yield dist
        return
    store = _fresh_store()
    options: dict[str, Any] = {"store": store, "rank": dist.rank, "world_size": dist.world_size, "timeout": timeout}
    if captures:  # torch's documentation asks for it; the watchdog ends a run whose collectives hang
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    if dist.device.type == "cuda":
        td.init_process_group("nccl", device_id=dist.device, **options)
    else:
        td.init_process_group("gloo", **options)
    try:
        yield replace(dist, store=store)
        td.barrier()  # torchrun kills the other ranks as soon as one exits with an error
    except SharedError:  # of all ranks
        td.destroy_process_group()
        raise
    except BaseException:
        # Perhaps of this rank alone. Destroying NCCL's group would wait for the other ranks, which wait for this one
        # in another collective, and the error would never be printed.
        if dist.device.type != "cuda":
            td.destroy_process_group()
        raise
    td.destroy_process_group()


def _fresh_store() -> td.Store:
    """The rendezvous' store, without the addresses of processes that torchrun has replaced by restarting.

    torchrun's agents keep one store for all restarts (unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), and a process that
    reads a dead one's address there waits for half an hour. The agents of several machines count restarts differently,
    so there the variable is the only remedy. Raises UserError without MASTER_ADDR and MASTER_PORT.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is set, but not {' and '.join(missing)}: start with torchrun, which sets them all")
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
