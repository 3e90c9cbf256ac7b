"""Rates, data_wait, the progress line."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch

from pipeline.common.output import is_terminal, write_raw
from pipeline.common.system import duration

PLAIN_LINE_EVERY_S = 10.0  # seconds between progress lines where stderr is no terminal


@dataclass(frozen=True)
class Rates:
    """What the loop did since the last reading."""

    img_per_s: float  # source images of all ranks
    data_wait: float  # share of the time, 0 to 1
    step_s: float
    host_bound: float = 0.0  # share of the steps in which the GPU had caught up with the host: see GpuProgress


class GpuProgress:
    """Whether the GPU has caught up with the host, which then keeps it waiting: the step is bound by its launches.

    A host that is ahead launches the optimizer while the GPU still computes the forward pass. Where the GPU has done
    the backward pass by then, the host takes as long for a step as the device. Costs an event a step, no waiting.
    """

    def __init__(self, device: torch.device) -> None:
        """On a CPU, which has no queue, the answer is always no."""
        self._on_gpu = device.type == "cuda"
        self._done: torch.cuda.Event | None = None

    def backward_launched(self) -> None:
        """Call when the host has launched a step's last backward pass."""
        self._done = torch.cuda.current_stream().record_event() if self._on_gpu else None

    def caught_up(self) -> bool:
        """Whether the GPU is past that point. Call when the host has launched the rest of the step."""
        return self._done is not None and self._done.query()


class RateMeter:
    """Measures the loop between two readings; evaluation and checkpoints are left out by ``restart``."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """``clock`` gives seconds."""
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        self._start, self._steps, self._images, self._wait_s, self._caught_up = self._clock(), 0, 0, 0.0, 0

    def step(self, images: int, wait_s: float, caught_up: bool = False) -> None:
        """Count a step. ``caught_up``: as GpuProgress says."""
        self._caught_up += caught_up
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
        rates = Rates(
            self._images / seconds,
            min(self._wait_s / seconds, 1.0),
            seconds / self._steps,
            self._caught_up / self._steps,
        )
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
        self,
        epoch: int,
        step: int,
        loss: float,
        z_std: float,
        rates: Rates,
        data_wait: str | None = None,
        probe_top1: float | None = None,
    ) -> None:
        """Show the state after ``step`` steps. ``data_wait`` says more of it than the rates do."""
        now = self._clock()
        on_terminal = is_terminal(self._stream)
        if not on_terminal and now - self._last_line_s < PLAIN_LINE_EVERY_S and step < self._total:
            return
        self._last_line_s = now
        left = (self._total - step) * rates.step_s
        host = f" host_bound {rates.host_bound:.0%}" if rates.host_bound > 0 else ""
        probe = "" if probe_top1 is None else f"probe {probe_top1:.1f} % "
        text = (
            f"epoch {epoch} step {step}/{self._total} loss {loss:.4f} z_std {z_std:.4f} {probe}"
            f"{rates.img_per_s:.0f} img/s data_wait {data_wait or format(rates.data_wait, '.0%')}{host} "
            f"left {duration(left)}"
        )
        end = "\n" if step >= self._total else ""
        write_raw(self._stream, f"\r\x1b[K{text}{end}" if on_terminal else text + "\n")


RANKS_SHOWN = 8  # more than that are summed up in the progress line


@dataclass(frozen=True)
class DataWait:
    """How long each rank waited for the loader, out of a stretch of the loop."""

    seconds: tuple[float, ...]  # of each rank
    of_s: float  # the stretch, in seconds

    @property
    def shares(self) -> list[float]:
        """data_wait of each rank: 0 to 1."""
        return [min(seconds / max(self.of_s, 1e-9), 1.0) for seconds in self.seconds]

    @property
    def slowest(self) -> int:
        """The rank that waited longest; the others wait for it in turn, when gradients are averaged."""
        return int(np.argmax(self.seconds))

    def __str__(self) -> str:
        """The shares of the ranks, for the progress line; of many ranks the longest and the mean."""
        shares, slowest = self.shares, self.slowest
        if len(shares) == 1:
            return f"{shares[0]:.0%}"
        if len(shares) <= RANKS_SHOWN:
            return f"{shares[slowest]:.0%} (ranks {' '.join(f'{share:.0%}' for share in shares)})"
        return f"{shares[slowest]:.0%} (rank {slowest}; mean {np.mean(shares):.0%})"


def describe_waits(waits: DataWait) -> str:
    """One line for the end of a session."""
    line = f"data_wait: {waits}"
    if len(waits.seconds) > 1:
        line += f"; rank {waits.slowest} waited longest"
    return f"{line}, {waits.seconds[waits.slowest]:.1f} s of {waits.of_s:.1f} s"
