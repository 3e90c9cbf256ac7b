"""Owns what this process is doing right now: noted by its main thread, read by the one that watches for hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Doing:
    """One stretch of a process' life."""

    what: str
    waiting: bool  # for the other ranks, in a collective
    waits: int  # how many times it has waited for them so far, this time included: all ranks count alike
    since_s: float  # by the process' clock


class Activity:
    """The current stretch. Noting costs about a microsecond and nothing of the device."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` gives seconds."""
        self._clock = clock
        self.now = Doing("preparing the run", waiting=False, waits=0, since_s=clock())

    def work(self, what: str) -> None:
        """From now on the process does something that depends on no other rank."""
        self.now = Doing(what, False, self.now.waits, self._clock())

    def wait(self, what: str) -> None:
        """From now on it may have to wait for the other ranks."""
        self.now = Doing(what, True, self.now.waits + 1, self._clock())

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
