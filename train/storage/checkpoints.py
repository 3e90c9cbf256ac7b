"""Checkpoints of a run: files that are whole or absent; the newest N are kept; a checkpoint of another run is refused.

A file is called step-STEP-HASH.pt, HASH being the first digits of its sha256 as in torchvision's weight files: one
atomic rename puts the checkpoint and its checksum in place together. It is a plain ``torch.save`` of tensors and
primitives, and does not depend on the number of processes.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import reprlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, disk_errors
from pipeline.dataset.format import file_sha256
from train.storage.torch_files import read_torch_file


def host_copy(state: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Copy every tensor in ``state``, at any depth, to the host's memory.

    Returns at once what gives the copy, as soon as it has arrived; ``state`` may be overwritten meanwhile by the work
    that is given to the device after this call.
    """
    devices: set[torch.device] = set()
    copied = _copy(state, devices)
    arrived = []
    for device in devices:
        with torch.cuda.device(device):
            event = torch.cuda.Event(blocking=True)  # the thread sleeps, and leaves the core to the loader
            event.record()
            arrived.append(event)

    def get() -> dict[str, Any]:
        for event in arrived:
            event.synchronize()
        return copied

    return get


def _copy(value: Any, devices: set[torch.device]) -> Any:
    match value:
        case Tensor() if value.is_cuda:
            devices.add(value.device)
            pinned = torch.empty_like(value, device="cpu", pin_memory=True)
            return pinned.copy_(value.detach(), non_blocking=True)
        case Tensor():
            return value.detach().clone()
        case dict():
            return {key: _copy(entry, devices) for key, entry in value.items()}
        case list():
            return [_copy(entry, devices) for entry in value]
        case _:
            return value


class CheckpointWriter:
    """The thread that writes. Leaving its context waits for it and reports a failure that was not asked for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._write: Future[Path] | None = None
        self.newest: Path | None = None  # the last one that is known to be on disk

    def start(self, write: Callable[[], Path]) -> None:
        """Run ``write``, which returns what it wrote, in the thread. The write before it must be over: see ``wait``."""
        assert self._write is None
        self._write = self._thread.submit(write)

    def has_failed(self) -> bool:
        """Whether the write under way has failed already; ``wait`` says why."""
        return self._write is not None and self._write.done() and self._write.exception() is not None

    def wait(self) -> Path | None:
        """Wait for the write under way, and raise what it raised. Returns the newest checkpoint that was written."""
        if self._write is not None:
            write, self._write = self._write, None
            self.newest = write.result()
        return self.newest

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the write under way. Its error is raised, or printed where another is on its way already."""
        write, self._write = self._write, None
        self._thread.shutdown(wait=True)
        failure = None if write is None else write.exception()
        if failure is None:
            return
        if error is None:
            raise failure
        print(f"error: {failure}", file=sys.stderr, flush=True)


CHECKPOINTS = "checkpoints"  # their folder in that of a run
FORMAT = 1
HASH_DIGITS = 16
# What is in a file's place: a folder, a pipe or a device, a link to nothing or in a circle
_NO_FILE = frozenset({errno.EINVAL, errno.EISDIR, errno.ENXIO, errno.ENOENT, errno.ELOOP, errno.ENODEV})
_NAME = re.compile(rf"step-(\d+)-([0-9a-f]{{{HASH_DIGITS}}})\.pt")


def save_checkpoint(folder: Path, state: dict[str, Any], step: int, keep: int) -> Path:
    """Write ``state`` as the checkpoint after ``step`` steps, then delete all but the newest ``keep``.

    Raises UserError for a full disk or a missing permission; nothing half-written stays.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    with buffer.getbuffer() as data:  # released here: left to the garbage collector it can crash Python 3.12.1
        path = folder / f"step-{step:09d}-{hashlib.sha256(data).hexdigest()[:HASH_DIGITS]}.pt"
        with disk_errors(f"writing the checkpoint {path}"):
            _write(path, data, step, keep)
    return path


def _write(path: Path, data: memoryview, step: int, keep: int) -> None:
    """Put the file in place, then delete what it makes superfluous."""
    path.parent.mkdir(exist_ok=True)  # without those above: a run folder that was deleted stays deleted
    with atomic_file(path) as file:
        file.write(data)
    for old in _list(path.parent):
        if old != path and _step(old) == step:
            old.unlink()
    for old in _list(path.parent)[keep:]:
        old.unlink()


@dataclass(frozen=True)
class CheckpointSearch:
    """The newest intact checkpoint, if there is one, and the damaged ones that are newer."""

    path: Path | None
    damaged: tuple[Path, ...]


def find_checkpoint(folder: Path) -> CheckpointSearch:
    """Look for the newest checkpoint whose bytes are those that were written.

    Damaged ones, and what is no file, are renamed to NAME.damaged. Raises UserError if there are checkpoints and none
    is intact, and for one that cannot be read: it may be whole.
    """
    damaged: list[Path] = []
    for path in _list(folder):
        if is_intact(path):
            return CheckpointSearch(path, tuple(damaged))
        with disk_errors(f"setting the damaged checkpoint {path} aside"):
            damaged.append(path.rename(_free_name(path.with_name(path.name + ".damaged"))))
    if damaged:
        names = ", ".join(path.name for path in damaged)
        raise UserError(
            f"no checkpoint in {folder} is intact (damaged: {names}): restore one of them from a backup under its name "
            "without .damaged, or start again with another --run-dir"
        )
    return CheckpointSearch(None, ())


def _free_name(path: Path) -> Path:
    """``path``, or with a number behind it if there is something already."""
    names = (path.with_name(path.name + (f".{number}" if number else "")) for number in count())
    return next(name for name in names if not os.path.lexists(name))


def is_intact(path: Path) -> bool:
    """Whether it is a file whose sha256 begins with the digits in its name. Raises UserError if it cannot be read."""
    match = _NAME.fullmatch(path.name)
    try:
        return match is not None and file_sha256(path).startswith(match[2])
    except OSError as error:
        if error.errno in _NO_FILE:
            return False
        raise UserError(
            f"cannot read the checkpoint {path}: {error.strerror}; make it readable, or move it away to go on from the "
            "one before"
        ) from error


def is_damaged(path: Path) -> bool:
    """Whether the file has a checkpoint's name and other bytes than that names; false for files of another name."""
    return _NAME.fullmatch(path.name) is not None and not is_intact(path)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint by name, for those who only read; it may be damaged."""
    return next(iter(_list(folder)), None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU; no code in it is executed. Raises UserError if it is none of ours."""
    state = read_torch_file(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this version of siamstream (format {FORMAT})")
    return state


def check_same_run(saved: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Compare what decides a run's numbers, field by field. Raises UserError listing the fields that differ."""
    fields = [*current, *(field for field in saved if field not in current)]
    absent = "(absent)"
    pairs = [(field, saved.get(field, absent), current.get(field, absent)) for field in fields]
    differing = [
        f"  {_short(field)}: checkpoint {_short(old)}, now {_short(new)}" for field, old, new in pairs if old != new
    ]
    if differing:
        raise UserError(
            f"the checkpoint {path} belongs to a run with another configuration:\n" + "\n".join(differing) + "\n"
            "resume with the values of the checkpoint, or start a new run with another --run-dir"
        )


def _short(value: Any) -> str:
    """A setting for a message. What a file says may be of any size, and of a size that only printing gives it."""
    if isinstance(value, str):
        return value[:200]
    printer = reprlib.Repr()
    printer.maxlevel, printer.maxlist, printer.maxtuple, printer.maxstring, printer.maxother = 3, 20, 20, 200, 200
    return printer.repr(value)


def _list(folder: Path) -> list[Path]:
    """Checkpoints by name, newest first; temporary and damaged files are not among them."""
    return sorted((path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def parse_interval(text: str) -> tuple[int, str]:
    """``10m``, ``500steps`` or ``1epoch`` as a number and ``m``, ``s`` or ``e``. Raises UserError for anything else."""
    match = re.fullmatch(r"(\d{1,15}) ?(m|steps?|epochs?)", text)
    if match is None or int(match[1]) == 0:
        raise UserError(f"--checkpoint-every {text!r}: write minutes as 10m, steps as 500steps, epochs as 1epoch")
    return int(match[1]), match[2][0]


class CheckpointTimer:
    """When a checkpoint is due: every so many epochs, steps or minutes."""

    def __init__(self, text: str, clock: Callable[[], float] = time.monotonic) -> None:
        """``text`` as ``parse_interval`` takes it; ``clock`` gives seconds. Raises UserError."""
        self._number, self._unit = parse_interval(text)
        self._clock, self._saved_s, self._saved_step = clock, clock(), -1

    def is_due_at(self, step: int, steps_per_epoch: int) -> bool:
        """Whether steps or epochs say so after ``step`` steps: a pure function, the same on every rank."""
        match self._unit:
            case "s":
                return step % self._number == 0
            case "e":
                return step % (self._number * steps_per_epoch) == 0
            case _:
                return False

    def minutes_over(self) -> bool:
        """Whether the minutes since the last checkpoint are over. Ranks' clocks differ: they must agree on it."""
        return self._unit == "m" and self._clock() - self._saved_s >= 60 * self._number

    def saved(self, step: int) -> None:
        """Note that the state after ``step`` steps is saved, or about to be."""
        self._saved_s, self._saved_step = self._clock(), step

    def is_saved(self, step: int) -> bool:
        """Whether the newest checkpoint is that after ``step`` steps."""
        return self._saved_step == step
