"""Owns what happens when the system asks a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning).

The run finishes its step, writes a checkpoint and exits with ``EXIT_PREEMPTED``; ``--resume`` goes on from there.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: "try again later"
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]


@dataclass
class StopRequest:
    """Whether this process has been asked to stop, and by which signal."""

    signal_name: str | None = None

    def __bool__(self) -> bool:
        """Whether a signal has come."""
        return self.signal_name is not None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note the signals instead of dying of them; the former handlers come back at the end."""
    request = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name

    former = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
