"""The state of a run, and its files: the run folder is checked and written, checkpoints are saved and taken up.

train/engine/build.py makes a ``Run``; train/engine/loop.py trains it.
"""

from __future__ import annotations

import platform
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

from model.methods.base import Method, StepInfo
from pipeline.common.errors import UserError
from pipeline.common.files import disk_errors, write_json
from pipeline.common.locks import FolderLock
from pipeline.common.system import versions
from pipeline.dataset.format import DATASET_FILE
from pipeline.dataset.mixture import Dataset
from train.config.config_file import INIT_WEIGHTS, SESSION
from train.config.run_config import PretrainConfig
from train.config.run_plan import RunPlan
from train.distributed.collectives import on_all_ranks, on_rank0, print0, share_buffers
from train.distributed.process_group import DistContext
from train.engine.sample_memory import SampleMemory
from train.engine.step_graph import StepGraph
from train.evaluation.knn_monitor import OnlineKnn
from train.evaluation.online_probe import OnlineProbe
from train.optimization.precision import Precision, SkipNonFinite
from train.storage.checkpoints import (
    CHECKPOINTS,
    HASH_DIGITS,
    CheckpointTimer,
    CheckpointWriter,
    check_same_run,
    find_checkpoint,
    host_copy,
    load_checkpoint,
    save_checkpoint,
)
from train.storage.run_folder import CONFIG_FILE, METRICS_FILE, PLAN_FILE, claim_run_dir, cut_off


@dataclass(frozen=True)
class Origins:
    """Where the parts of a run come from, for people."""

    weights: str
    optimizer: str  # which implementation, and why
    loader: str  # which back end, and why
    steps: str | None = None  # how --cuda-graph makes them, or why it does not


@dataclass
class Run:
    """One run on one rank. ``step`` and ``midway`` change; the rest stays."""

    config: PretrainConfig
    dist: DistContext
    dataset: Dataset
    plan: RunPlan
    precision: Precision
    model: Method
    parallel: nn.Module  # the model as the loop calls it: under DDP, compiled
    memory: SampleMemory | None  # for a method that asks for it
    optimizer: torch.optim.Optimizer
    knn: dict[str, OnlineKnn]  # by the names of a mixture's datasets, or ""; empty: switched off, or no labels
    probe: OnlineProbe | None  # with --probe
    timer: CheckpointTimer
    guard: SkipNonFinite  # of the optimizer's steps
    origins: Origins
    graph: StepGraph | None = None  # what replays the steps; None: Python launches each of them
    # Identity of the weights of --init; None without it, and of runs that began before it was recorded
    init_weights: str | None = None
    lock: FolderLock | None = None  # of the run folder, on rank 0
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)  # on rank 0
    step: int = 0  # optimizer steps done
    midway: bool = False  # the next one has begun

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the run's numbers: a checkpoint goes on where all of it is equal."""
        return self.config.identity(self.dataset.fingerprint, self.init_weights)

    @property
    def info(self) -> StepInfo:
        """The place of the next step, for the method."""
        plan = self.plan
        return StepInfo(self.step, plan.total_steps, plan.steps_per_epoch, plan.global_batch, self.dist.rank)


def check_run_dir(run: Run) -> None:
    """Check that the run folder is free, or to be resumed; nothing is written. Raises SharedError. A collective."""
    run_dir = run.config.run_dir

    def check() -> None:
        if (run_dir / DATASET_FILE).exists():
            raise UserError(f"--run-dir {run_dir} is a dataset: name another folder")
        taken = any((run_dir / name).exists() for name in (CONFIG_FILE, METRICS_FILE, CHECKPOINTS))
        if taken and not run.config.resume:
            raise UserError(f"--run-dir {run_dir} already holds a run: add --resume to go on with it, or name another")

    on_rank0(run.dist, check)


def write_run_files(run: Run) -> None:
    """Write config.json and plan.json, after all checks. Raises SharedError if the folder cannot be written."""
    run_dir = run.config.run_dir
    if run.memory is not None:
        memory = run.memory
        on_all_ranks(run.dist, lambda: memory.allocate(run_dir))

    def write() -> None:
        with disk_errors(f"writing {run_dir}", f"--run-dir {run_dir} cannot be made", "name another folder"):
            run_dir.mkdir(parents=True, exist_ok=True)
            weights = {} if run.init_weights is None else {INIT_WEIGHTS: run.init_weights}
            write_json(run_dir / CONFIG_FILE, {**run.config.as_json(), **weights, SESSION: _session()})
            write_json(run_dir / PLAN_FILE, run.plan.as_json())

    on_rank0(run.dist, write)


def _session() -> dict[str, Any]:
    """Where and with what a session runs, for config.json."""
    commit = (
        subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        if shutil.which("git")
        else None
    )
    names = ("torch", "torchvision", "numpy", "timm", "nvidia-dali-cuda130", "apex")
    return {
        "start": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "commit": commit.stdout.strip() or None if commit else None,
        "versions": {"python": platform.python_version(), **versions(names)},
    }


@contextmanager
def locked_run_dir(run: Run) -> Iterator[None]:
    """Hold the run folder for this run alone, by rank 0. Raises SharedError that names who holds it. A collective."""
    with ExitStack() as stack:

        def lock() -> None:
            run.lock = claim_run_dir(run.config.run_dir, stack)

        on_rank0(run.dist, lock)
        yield


def resume(run: Run) -> None:
    """Take up the newest intact checkpoint, or print that there is none. Raises SharedError if it is another run's."""
    folder = run.config.run_dir / CHECKPOINTS
    found = on_rank0(run.dist, lambda: find_checkpoint(folder))
    for path in found.damaged:
        print0(run.dist, f"warning: the checkpoint {path} is damaged; going back to the one before")
    if found.path is None:
        print0(run.dist, f"--resume: no checkpoint in {folder}; starting at step 0")
    else:
        path = found.path
        former_bn_batch = on_all_ranks(run.dist, lambda: _load(run, path))
        run.timer.saved(run.step)
        run.writer.newest = path
        print0(run.dist, f"--resume: going on after step {run.step:,} of {run.plan.total_steps:,} ({path.name})")
        log = run.config.run_dir / METRICS_FILE
        if run.step > 0 and not log.exists():
            print0(run.dist, f"warning: {log} is missing: losses and kNN accuracies up to step {run.step:,} are lost")
        if former_bn_batch != run.plan.bn_batch:
            now = f"over {run.plan.bn_batch:,} images at a time from here on, {former_bn_batch:,} before"
            print0(run.dist, f"note: batch norm takes its statistics {now} (--accumulate, --no-sync-bn, processes)")
    on_rank0(run.dist, lambda: _cut_off(run))


def _load(run: Run, path: Path) -> int:
    """Load a checkpoint; returns the former session's plan.bn_batch. Raises UserError."""
    state = load_checkpoint(path)
    try:
        identity = state["identity"]
        run.init_weights = _recorded_weights(identity.get("init"))
        if run.init_weights is None and run.config.init is not None and "init" in identity:
            identity = {**identity, "init": run.identity["init"]}  # two paths; the flag was compared by its content
        check_same_run(identity, run.identity, path)
        return _take_up(run, state, path.parent)
    except torch.OutOfMemoryError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[-1].strip()
        raise UserError(
            f"{path} is named after its checksum, but does not hold the state of this run ({type(error).__name__}: "
            f"{reason}): move it away to go on from the one before, or start again with another --run-dir"
        ) from error


def _take_up(run: Run, state: dict[str, Any], folder: Path) -> int:
    """Set the run to a checkpoint's state. Raises what a state of another form leads to."""
    run.model.load_state_dict(_method_state(state))
    _check_optimizer(run.optimizer, state["optimizer"])
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state["optimizer"]})
    if run.precision.scaler.is_enabled() and state["scaler"]:
        run.precision.scaler.load_state_dict(state["scaler"])
    if run.memory is not None:
        run.memory.allocate(run.config.run_dir)
        run.memory.load(state["targets"], folder)
    if run.probe is not None and "probe" in state:  # a run may take --probe up later
        run.probe.load(state["probe"])
    done = state["epoch"] * run.plan.steps_per_epoch + state["step"]
    if not (type(done) is int and 0 <= state["step"] < run.plan.steps_per_epoch and 0 <= done <= run.plan.total_steps):
        raise ValueError(f"epoch {state['epoch']}, step {state['step']} of {run.plan.steps_per_epoch}")
    run.step = done
    return int(state.get("bn_batch", run.plan.bn_batch))  # older checkpoints do not say


def _recorded_weights(init: str | None) -> str | None:
    """The identity of the weights of --init in a checkpoint; the first checkpoints hold their path instead."""
    return init if init is not None and re.fullmatch(f"[0-9a-f]{{{HASH_DIGITS}}}", init) else None


def _check_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """Raise ValueError or TypeError for a state that torch would take, and only the next step would fail at."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state.items():
        shape = parameters[number].shape
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape not in (shape, torch.Size()):
                raise ValueError(f"{name} of parameter {number} is {list(value.shape)} instead of {list(shape)}")
            if not isinstance(value, (Tensor, int, float, NoneType)):
                raise TypeError(f"{name} of parameter {number} is a {type(value).__name__}")


def _method_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """The method's weights and buffers. The first checkpoints of --targets frozen hold the copy apart from them."""
    frozen = state.get("targets", {}).get("frozen", {})
    return {**state["model"], **{f"frozen.module.{name}": value for name, value in frozen.items()}}


def _cut_off(run: Run) -> None:
    """Drop samples of steps after the checkpoint: they come again. MetricsLog does so with its own lines."""
    with disk_errors(f"writing {run.config.run_dir}"):
        for path in run.config.run_dir.glob("samples-rank*.jsonl"):
            cut_off(path, run.step)


def save(run: Run) -> None:
    """Copy the state after ``run.step`` steps; a thread writes it as a checkpoint while training goes on.

    Waits for the write before it, and raises SharedError if that has failed. A collective.
    """
    share_buffers(run.dist, run.model)
    wait_for_checkpoint(run)
    check_lock(run)
    on_rank0(run.dist, lambda: _start_write(run))
    run.timer.saved(run.step)


def check_lock(run: Run) -> None:
    """Raise SharedError if the run folder is no longer this run's alone, or was deleted. A collective."""
    on_rank0(run.dist, lambda: None if run.lock is None else run.lock.check())


def _start_write(run: Run) -> None:
    folder, keep, done = run.config.run_dir / CHECKPOINTS, run.config.keep_checkpoints, run.step
    epoch, step = divmod(done, run.plan.steps_per_epoch)
    numbers: dict[str, Any] = {
        "epoch": epoch,  # the next step to do is step ``step`` of epoch ``epoch``
        "step": step,
        "bn_batch": run.plan.bn_batch,
        "scaler": run.precision.scaler.state_dict(),
        "config": run.config.as_json(),
        "identity": run.identity,
    }
    probe = {} if run.probe is None else {"probe": run.probe.state()}
    tensors = host_copy({"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()["state"], **probe})
    rows: Callable[[], dict[str, Any]] = dict if run.memory is None else run.memory.save(folder, done)

    def write() -> Path:
        run.dataset.wait_until_verified()  # rows that are not the recorded ones must not leave a trace in a checkpoint
        return save_checkpoint(folder, {**numbers, **tensors(), "targets": rows()}, done, keep)

    run.writer.start(write)


def wait_for_checkpoint(run: Run) -> Path | None:
    """Wait for the checkpoint that is being written; returns the newest on disk. SharedError for a full disk.

    A collective.
    """
    run.dist.status.work("writing a checkpoint")
    return on_rank0(run.dist, run.writer.wait)


def finish_checkpoint(run: Run) -> Path:
    """Save the state after ``run.step`` steps if it is not saved yet, and wait until it is on disk.

    Raises SharedError for a full disk. A collective.
    """
    if not run.timer.is_saved(run.step):
        save(run)
    path = wait_for_checkpoint(run)
    assert path is not None
    return path
