"""The points of a run at which a test sends a signal, some of them in the middle of writing a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

import pipeline.common.files
import pipeline.dataset.remote_files
import pipeline.loader.read_batches
import train.engine.loop
import train.evaluation.knn_monitor
import train.monitoring.metrics
import train.storage.checkpoints
from train import pretrain
from train.monitoring.reporter import Reporter


def arm(place: str = "", time: int = 1, number: int = 9) -> None:
    """Send this process signal ``number`` when it comes to ``place`` for the ``time``-th time; "" = never."""
    if not place:
        return
    left = [time]

    def strike() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    {**PLACES, **REMOTE_PLACES}[place](strike)


def before(owner: Any, name: str, strike: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        strike()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def after(owner: Any, name: str, strike: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        strike()
        return result

    setattr(owner, name, wrapped)


class _Torn:
    """Writes the first half, then lets the signal strike."""

    def __init__(self, file: IO[bytes], strike: Callable[[], None]) -> None:
        self._file, self._strike = file, strike

    def write(self, data: Any) -> int:
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._strike()
        return half + self._file.write(data[half:])


def torn(owner: Any, strike: Callable[[], None]) -> None:
    original = owner.atomic_file

    @contextlib.contextmanager
    def wrapped(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with original(*args, **kwargs) as file:
            yield _Torn(file, strike)

    owner.atomic_file = wrapped


def torn_line(strike: Callable[[], None]) -> None:
    """Half a line of metrics.jsonl."""
    original = train.monitoring.metrics.MetricsLog.write

    def wrapped(self: Any, epoch: int, step: int, **values: float) -> None:
        self._file.write('{"epoch": 0, "st')
        self._file.flush()
        strike()
        self._file.truncate(self._file.tell() - len('{"epoch": 0, "st'))
        self._file.seek(0, os.SEEK_END)
        original(self, epoch, step, **values)

    train.monitoring.metrics.MetricsLog.write = wrapped  # type: ignore[method-assign]


PLACES: dict[str, Callable[[Callable[[], None]], None]] = {
    "between forward and backward": lambda strike: before(torch.amp.GradScaler, "scale", strike),
    "before the step is counted": lambda strike: after(train.engine.loop, "train_step", strike),
    "after the step is written": lambda strike: after(Reporter, "step", strike),
    "half a line of metrics": torn_line,
    "reading a batch": lambda strike: after(pipeline.loader.read_batches.Assembler, "_batch", strike),
    "half a checkpoint written": lambda strike: torn(train.storage.checkpoints, strike),
    "a checkpoint written, not yet named": lambda strike: before(pipeline.common.files.os, "replace", strike),
    "a checkpoint named, old ones still there": lambda strike: after(pipeline.common.files, "sync_folder", strike),
    "an old checkpoint deleted": lambda strike: after(Path, "unlink", strike),
    "kNN evaluation": lambda strike: before(train.evaluation.knn_monitor.OnlineKnn, "evaluate", strike),
    "opening the run": lambda strike: before(pretrain, "write_run_files", strike),
}


def small_pieces(_: Callable[[], None]) -> None:
    """Several pieces a shard, and little patience with each."""
    (
        pipeline.dataset.remote_files.PIECE,
        pipeline.dataset.remote_files.PIECE_TIMEOUT_S,
        pipeline.dataset.remote_files.FIRST_DELAY_S,
    ) = 16_000, 1.0, 0.05


def piece_fetched(strike: Callable[[], None]) -> None:
    small_pieces(strike)
    after(pipeline.dataset.remote_files.RemoteFolder, "read", strike)


def fetch_failed(strike: Callable[[], None]) -> None:
    small_pieces(strike)
    before(pipeline.dataset.remote_files.RemoteFolder, "_wait", strike)


REMOTE_PLACES: dict[str, Callable[[Callable[[], None]], None]] = {  # of runs over the network alone
    "small pieces": small_pieces,  # nothing strikes
    "a piece fetched": piece_fetched,
    "a fetch failed": fetch_failed,
}
