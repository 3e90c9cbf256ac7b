"""Owns how rungs are timed: in turns, so that a drifting machine hits all alike; each turn opened, warmed up, timed.

A rung is closed before the next one begins, so that nothing that one has set going takes cores from another.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tools.common.gpu_monitor import GpuUse, GpuWatch
from tools.throughput.stages import Advance, Rung

FEWEST_BATCHES = 2
WARM_BATCHES = 2
WARM_TURNS = 1.0  # in lengths of a turn: after so long the queues have filled, or will not


@dataclass(frozen=True)
class Turn:
    """One timed stretch of one rung."""

    images: int
    wall_s: float
    cpu_s: float  # of all threads of this process
    parts: dict[str, float]  # seconds by part of the work, where the rung knows them
    gpu: GpuUse | None

    @property
    def img_per_s(self) -> float:
        """Source images per second."""
        return self.images / self.wall_s

    @property
    def cores(self) -> float:
        """CPU cores that were busy."""
        return self.cpu_s / self.wall_s


class Climber:
    """Takes turns on rungs."""

    def __init__(self, seconds: float, watch: GpuWatch, tidy: Callable[[], None]) -> None:
        """Each turn lasts about ``seconds`` beside its warm-up.

        ``tidy`` gives memory back that the turn before has left, so that the memory that a rung shows is its own.
        """
        self._tidy = tidy
        self._seconds = seconds
        self._watch = watch
        self._batch_s: dict[str, float] = {}  # as each rung's last turn showed

    def climb(
        self,
        rungs: Mapping[str, Rung],
        repeats: int,
        tell: Callable[[str, Turn], None] = lambda name, turn: None,
        end_s: float = math.inf,
    ) -> dict[str, list[Turn]]:
        """``repeats`` turns of each rung, in turn, after one that only warms up. ``tell`` hears of each that counts.

        A round that would end after ``end_s`` (time.perf_counter) is left out with all that follow; never the first.
        """
        for name, rung in rungs.items():
            self.turn(name, rung)
        turns: dict[str, list[Turn]] = {name: [] for name in rungs}
        start_s = time.perf_counter()
        for number in range(repeats):
            now_s = time.perf_counter()
            if number > 0 and now_s + (now_s - start_s) / number > end_s:
                break
            for name, rung in rungs.items():
                turn = self.turn(name, rung)
                turns[name].append(turn)
                tell(name, turn)
        return turns

    def knows(self, name: str) -> bool:
        """Whether the rung of this name has had its first turn."""
        return name in self._batch_s

    def turn(self, name: str, rung: Rung) -> Turn:
        """One turn. The first one of a name is short: it shows how many batches a turn takes."""
        self._tidy()
        with rung.open() as advance:
            self._warm_up(rung, advance)
            known = self._batch_s.get(name)
            batches = 0 if known is None else round(self._seconds / known)
            turn = self.timed(advance, rung.batch, max(FEWEST_BATCHES, batches))
        self._batch_s[name] = turn.wall_s * rung.batch / turn.images
        return turn

    def _warm_up(self, rung: Rung, advance: Advance) -> None:
        """Until queues are as full as they get: a rung begins with empty ones, and may or may not outrun its user."""
        start_s = time.perf_counter()
        for batches in range(rung.ahead + WARM_BATCHES):
            if batches >= WARM_BATCHES and time.perf_counter() - start_s > WARM_TURNS * self._seconds:
                return
            advance(1)

    def timed(self, advance: Advance, batch: int, batches: int) -> Turn:
        """One timed stretch of a rung that is open and warm."""
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        parts = advance(batches)
        end_s, end_cpu_s = time.perf_counter(), time.process_time()
        use = self._watch.between(start_s, end_s)
        return Turn(batches * batch, end_s - start_s, end_cpu_s - start_cpu_s, parts, use)
