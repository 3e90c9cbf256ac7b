"""A GPU's stalls for batches that are not finished.

The host does not wait for the GPU, so a loader whose slow part runs on the GPU always has a batch to hand over: the
host's wait (``wait_s``) would stay near 0 while the model starves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stalls:
    """The time that one CUDA stream waited for batches. Without a GPU it stays 0."""

    def __init__(self) -> None:
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Count the time that ``stream`` is made to wait inside."""
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(stream)
        yield
        after.record(stream)
        self._marks.append((before, after))

    def read_s(self, *, wait: bool = True) -> float:
        """Seconds since the last reading. Waits for the device; or leaves what is not over to the next reading."""
        over = len(self._marks)
        if wait and over:
            self._marks[-1][1].synchronize()
        while not wait and over and not self._marks[over - 1][1].query():
            over -= 1
        marks, self._marks = self._marks[:over], self._marks[over:]
        return sum(before.elapsed_time(after) for before, after in marks) / 1e3
