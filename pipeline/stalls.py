"""Owns how long a GPU stood still for batches that the host had handed over before they were finished.

The host does not wait for the GPU, so a loader whose slow part runs on the GPU always has a batch to hand over: what
the host waits for it (``wait_s``) would stay near 0 while the model starves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stalls:
    """Adds up the stalls of one stream. Without a GPU there are none."""

    def __init__(self) -> None:
        """Nothing has stalled yet."""
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        """Whatever ``stream`` is made to wait for inside is a stall."""
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(stream)
        yield
        after.record(stream)
        self._marks.append((before, after))

    def read_s(self) -> float:
        """Seconds since the last reading. Waits for the device."""
        marks, self._marks = self._marks, []
        if marks:
            marks[-1][1].synchronize()
        return sum(before.elapsed_time(after) for before, after in marks) / 1e3
