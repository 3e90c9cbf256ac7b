"""Owns what a run reports: metrics.jsonl, TensorBoard and the progress line.

A line of metrics.jsonl is written every ``log_every`` steps: epoch (from 0, the one that the step belongs to), step
(optimizer steps done), loss (of that step), lr, z_std, z_rank (effective rank), img_per_s (source images) and step_s
(seconds a step), both since the last line, data_wait (share of that time that the slowest rank waited for the loader);
of several ranks, up to 64, data_wait_rankR too; skipped_steps (of this session, for nan or inf gradients) if there are
any. A kNN line has epoch (epochs done), step and knn_top1 (percent); the first one is the untrained encoder's. What is
no number (nan, inf) is null. Resuming cuts off what lies after the checkpoint: no step appears twice.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipeline.disk import atomic_file, disk_errors, strict_json

METRICS_FILE = "metrics.jsonl"
PLAIN_LINE_EVERY_S = 10.0  # seconds between progress lines where stderr is no terminal


class MetricsLog:
    """metrics.jsonl and TensorBoard of one run; used on rank 0 only."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        """Open for appending after step ``resume_step``. Raises UserError if the disk is full or not writable."""
        from torch.utils.tensorboard import SummaryWriter  # takes over a second to import: not for every rank

        self._path = run_dir / METRICS_FILE
        with disk_errors(f"writing {self._path}"):
            kept = cut_off(self._path, resume_step)
            self._knn = {line["step"]: line["knn_top1"] for line in kept if "knn_top1" in line}
            self._last: dict[str, Any] = next((line for line in reversed(kept) if "loss" in line), {})
            self._file = open(self._path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # closed by close()
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    @property
    def knn(self) -> dict[int, float]:
        """The kNN accuracies in percent that are written, by step."""
        return dict(self._knn)

    def newest(self) -> dict[str, float]:
        """For the summary: the values of the last step's line, the last kNN accuracy, the untrained encoder's."""
        values = {name: value for name, value in self._last.items() if name not in ("epoch", "step")}
        if self._knn:
            values["knn_top1"] = self._knn[max(self._knn)]
        if 0 in self._knn:
            values["knn_top1_untrained"] = self._knn[0]
        return values

    def write(self, epoch: int, step: int, **values: float) -> None:
        """Append a line, and the values to TensorBoard. Raises UserError as the constructor does."""
        line: dict[str, Any] = {"epoch": epoch, "step": step, **values}
        with disk_errors(f"writing {self._path}"):
            self._file.write(json_line(line))
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if "knn_top1" in values:
            self._knn[step] = values["knn_top1"]
        else:
            self._last = line

    def close(self) -> None:
        """Flush and close. What could not be written before is tried once more, so this raises as ``write`` does."""
        with disk_errors(f"writing {self._path}"):
            try:
                self._file.close()
            finally:
                self._board.close()


def cut_off(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines after ``step``, and a torn last line, from a file of JSON lines; returns those that stay."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    if path.exists():
        with atomic_file(path) as file:
            file.write("".join(map(json_line, kept)).encode())
    return kept


def json_line(values: dict[str, Any]) -> str:
    """One line of metrics.jsonl; nan and inf become null."""
    return json.dumps(strict_json(values), allow_nan=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or a samples file, nan where they have null.

    A last line that a killed run left half-written is left out.
    """
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8").split("\n")
    lines = [json.loads(text) for text in texts[:-1]]  # a whole line ends in a newline
    return [{name: math.nan if value is None else value for name, value in line.items()} for line in lines]


class SampleRecord:
    """samples-rankR.jsonl: the sample ids of each step (steps done, ids in the order of the batch) on one rank."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        """Open for appending; ``cut_off`` has dropped what lies after the checkpoint. UserError as MetricsLog."""
        self._path = run_dir / f"samples-rank{rank}.jsonl"
        with disk_errors(f"writing {self._path}"):
            self._file = open(self._path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # closed by close()

    def write(self, step: int, ids: list[int]) -> None:
        """Append the ids of step number ``step`` (from 1). Raises UserError if there is no room."""
        with disk_errors(f"writing {self._path}"):
            self._file.write(json.dumps({"step": step, "ids": ids}) + "\n")

    def close(self) -> None:
        """Close the file. Raises UserError if there is no room."""
        with disk_errors(f"writing {self._path}"):
            self._file.close()


@dataclass(frozen=True)
class Rates:
    """What the loop did since the last reading."""

    img_per_s: float  # source images of all ranks
    data_wait: float  # share of the time, 0 to 1
    step_s: float


class RateMeter:
    """Measures the loop between two readings; evaluation and checkpoints are left out by ``restart``."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """``clock`` gives seconds."""
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Begin a new interval now."""
        self._start, self._steps, self._images, self._wait_s = self._clock(), 0, 0, 0.0

    def step(self, images: int, wait_s: float) -> None:
        """Count a step."""
        self._steps, self._images, self._wait_s = self._steps + 1, self._images + images, self._wait_s + wait_s

    @property
    def steps(self) -> int:
        """Steps since the last reading."""
        return self._steps

    @property
    def wait_s(self) -> float:
        """Seconds spent waiting for the loader since the last reading."""
        return self._wait_s

    def read(self) -> Rates:
        """The rates since the last reading, of at least one step; begins a new interval."""
        seconds = max(self._clock() - self._start, 1e-9)
        rates = Rates(self._images / seconds, min(self._wait_s / seconds, 1.0), seconds / self._steps)
        self.restart()
        return rates


class ProgressLine:
    """One line on stderr that is overwritten on a terminal, and repeated now and then elsewhere."""

    def __init__(
        self, total_steps: int, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``clock`` gives seconds; ``stream`` is stderr by default."""
        self._total, self._stream, self._clock = total_steps, stream or sys.stderr, clock
        self._last_line_s = -math.inf

    def show(
        self, epoch: int, step: int, loss: float, z_std: float, rates: Rates, data_wait: str | None = None
    ) -> None:
        """Show the state after ``step`` steps. ``data_wait`` says more of it than the rates do."""
        now = self._clock()
        on_terminal = self._stream.isatty()
        if not on_terminal and now - self._last_line_s < PLAIN_LINE_EVERY_S and step < self._total:
            return
        self._last_line_s = now
        left = (self._total - step) * rates.step_s
        text = (
            f"epoch {epoch} step {step}/{self._total} loss {loss:.4f} z_std {z_std:.4f} "
            f"{rates.img_per_s:.0f} img/s data_wait {data_wait or format(rates.data_wait, '.0%')} left {duration(left)}"
        )
        self._stream.write(f"\r\x1b[K{text}" if on_terminal else text + "\n")
        if on_terminal and step >= self._total:
            self._stream.write("\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds for people: ``41 s``, ``3 min 20 s``, ``5 h 02 min``, ``3 d 04 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"
