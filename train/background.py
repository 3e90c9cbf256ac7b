"""Owns how a checkpoint is written while training goes on: tensors are copied at once, a thread does the rest.

On a GPU the copies run behind the work of the step that they belong to, into pinned memory; nothing waits for them but
the thread. One write is under way at most.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


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
    """The thread that writes. Leaving its context waits for it; a failure is told even where nobody asked any more."""

    def __init__(self) -> None:
        """The thread starts with the first write."""
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
        """Use as a context around the loop."""
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
