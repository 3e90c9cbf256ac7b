"""Times the stages: round after round over all of them, so that a machine that slows down affects all alike.

A stage is opened, warmed up until its queues are as full as they get, timed, and closed before the next one opens, so
that its threads take no cores from the others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tools.common.gpu_monitor import GpuMonitor, GpuUse
from tools.throughput.stages import Advance, Stage

FEWEST_BATCHES = 2
WARM_BATCHES = 2
WARM_TRIALS = 1.0  # lengths of a trial; a queue that is not full by then stays so


@dataclass(frozen=True)
class Trial:
    """One timed stretch of one stage."""

    images: int
    wall_s: float
    cpu_s: float  # of all threads of this process
    parts: dict[str, float]  # seconds by part of the work, where the stage measures them
    gpu: GpuUse | None

    @property
    def img_per_s(self) -> float:
        return self.images / self.wall_s

    @property
    def cores(self) -> float:
        return self.cpu_s / self.wall_s


class StageRunner:
    """Times stages in trials of about ``seconds`` each, beside their warm-up."""

    def __init__(self, seconds: float, monitor: GpuMonitor, tidy: Callable[[], None]) -> None:
        """``tidy`` runs before each trial and frees cached GPU memory, so that the memory shown is the stage's own."""
        self._tidy = tidy
        self._seconds = seconds
        self._monitor = monitor
        self._batch_s: dict[str, float] = {}  # of each stage, from its last trial

    def run(
        self,
        stages: Mapping[str, Stage],
        repeats: int,
        report: Callable[[str, Trial], None] = lambda name, trial: None,
        end_s: float = math.inf,
    ) -> dict[str, list[Trial]]:
        """``repeats`` rounds over all stages, after one trial each that only warms up; ``report`` receives each trial.

        Rounds that would end after ``end_s`` (time.perf_counter) are left out; the first one never is.
        """
        for name, stage in stages.items():
            if name not in self._batch_s:
                self.trial(name, stage)
        trials: dict[str, list[Trial]] = {name: [] for name in stages}
        start_s = time.perf_counter()
        for number in range(repeats):
            now_s = time.perf_counter()
            if number > 0 and now_s + (now_s - start_s) / number > end_s:
                break
            for name, stage in stages.items():
                trial = self.trial(name, stage)
                trials[name].append(trial)
                report(name, trial)
        return trials

    def trial(self, name: str, stage: Stage) -> Trial:
        """One trial. The first one of a name is short: it measures how many batches a trial takes."""
        self._tidy()
        with stage.open() as advance:
            self._warm_up(stage, advance)
            known = self._batch_s.get(name)
            batches = 0 if known is None else round(self._seconds / known)
            trial = self.timed(advance, stage.batch, max(FEWEST_BATCHES, batches))
        self._batch_s[name] = trial.wall_s * stage.batch / trial.images
        return trial

    def _warm_up(self, stage: Stage, advance: Advance) -> None:
        """Fill the queues: as many batches as they hold, for at most the length of a trial."""
        start_s = time.perf_counter()
        for batches in range(stage.ahead + WARM_BATCHES):
            if batches >= WARM_BATCHES and time.perf_counter() - start_s > WARM_TRIALS * self._seconds:
                return
            advance(1)

    def timed(self, advance: Advance, batch: int, batches: int) -> Trial:
        """``batches`` batches of ``batch`` images of an open, warm stage."""
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        parts = advance(batches)
        end_s, end_cpu_s = time.perf_counter(), time.process_time()
        use = self._monitor.between(start_s, end_s)
        return Trial(batches * batch, end_s - start_s, end_cpu_s - start_cpu_s, parts, use)
