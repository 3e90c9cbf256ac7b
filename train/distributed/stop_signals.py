"""Signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning).

The run finishes its step, writes a checkpoint and exits with ``EXIT_PREEMPTED``; ``--resume`` goes on from there.
Before the first step there is nothing to save, and the process exits at once.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from train.early_signals import EXIT_PREEMPTED, STOP_SIGNALS

PATIENCE_S = 10.0  # after a signal, for a batch that does not come


@dataclass
class StopRequest:
    """Whether this process has been asked to stop, and by which signal."""

    signal_name: str | None = None
    starting: bool = True  # nothing is done yet that a checkpoint should hold
    since_s: float = math.inf  # time.monotonic of the first signal

    def note(self, reason: str) -> None:
        """The process is asked to stop, by a signal of its own or another's."""
        self.since_s = min(self.since_s, time.monotonic())
        self.signal_name = reason

    def is_urgent(self) -> bool:
        """Whether a step that still waits for its images should be given up."""
        return time.monotonic() - self.since_s > PATIENCE_S

    def __bool__(self) -> bool:
        return self.signal_name is not None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Note the signals instead of dying of them; the former handlers come back at the end.

    While the request is ``starting``, a signal ends the process at once.
    """
    request = StopRequest()

    def note(number: int, _frame: FrameType | None) -> None:
        request.note(signal.Signals(number).name)

    with _listening(request):
        former = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        try:
            yield request
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


@contextmanager
def _listening(request: StopRequest) -> Iterator[None]:
    """Receive signals in a thread during the start: the main thread may be inside torch, where no Python runs."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    former = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while number := receiver.recv(1):
            if request.starting and number[0] in STOP_SIGNALS:
                name = signal.Signals(number[0]).name
                print(f"stopped by {name} before the first step; start again with --resume", file=sys.stderr)
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(EXIT_PREEMPTED)

    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        sender.close()
        thread.join()
        receiver.close()
