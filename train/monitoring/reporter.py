"""Report of a running loop: every rank calls it, means are taken over all ranks, rank 0 writes and prints."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from model.embedding_stats import effective_rank
from model.methods.base import CollapseProfile
from pipeline.common.buffers import on_device
from pipeline.common.files import disk_errors, write_json
from pipeline.common.system import duration
from pipeline.dataset.mixture import Mixture
from pipeline.loader.timing import Stalls
from train.config.run_config import PretrainConfig
from train.config.run_plan import RunPlan
from train.distributed.collectives import HostCopy, default_lag, mean_over_ranks, on_all_ranks, on_rank0, print0
from train.distributed.process_group import DistContext
from train.monitoring.collapse import CollapseGuard, CollapseReading
from train.monitoring.metrics import MetricsLog, SampleRecord
from train.monitoring.progress import DataWait, ProgressLine, RateMeter, Rates, describe_waits
from train.monitoring.trackers import End, open_trackers
from train.storage.run_folder import SUMMARY_FILE

PREDICT_AFTER_STEPS = 20  # steps of this session after which the run's time is predicted; the first half warms up
RANKS_LOGGED = 64  # up to so many ranks each have a data_wait of their own in metrics.jsonl


RANK_EVERY = 100  # steps between two ranks of z, which take milliseconds and make the host wait


class BadRow(NamedTuple):
    """Steps in a row that were skipped."""

    steps: int
    until_step: int  # at the latest
    lr: float  # of that step


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step leaves behind; tensors stay on the device until a line is due."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]  # of the method, scalars; z_std among them; probe_top1 with --probe
    schedules: dict[str, float | int]  # of the method, which follow from the step
    z: Float[Tensor, "n d"]  # embeddings of one view in the step's last pass
    skipped: Float[Tensor, ""]  # steps of this session that were skipped, this one included; the same on every rank
    lr: float
    wait_s: float  # time the host spent waiting for the loader
    ids: Int64[np.ndarray, " rank_batch"]
    bad_row: Float[Tensor, ""] | None = None  # the most steps skipped in a row since the last one that is given
    caught_up: bool = False  # whether the GPU waited for the host's launches


@dataclass(frozen=True)
class _Line:
    """A line whose numbers are on their way from the device."""

    step: int
    names: tuple[str, ...]
    numbers: HostCopy  # of the names, then the seconds that each rank waited
    rows: int  # of z
    known: dict[str, float | int]  # what the host knows
    rates: Rates
    of_s: float  # the stretch that the rates are of


class Reporter:
    """metrics.jsonl, trackers, the progress line, the predicted time, the alarm and the summary of one session."""

    def __init__(
        self,
        dist: DistContext,
        config: PretrainConfig,
        plan: RunPlan,
        start_step: int,
        stalls: Stalls,
        collapse: CollapseProfile,
        mixture: Mixture | None = None,
        lag: int | None = None,
    ) -> None:
        """Open for the steps after ``start_step``; what a former session wrote after it is cut off. A collective.

        ``stalls`` are the loader's, of this rank; ``collapse`` is the method's; the share of each dataset of
        ``mixture`` is written. ``lag``: steps after which a line's numbers are read, as by FlagConsensus.
        """
        self._dist, self._config, self._plan, self._start_step = dist, config, plan, start_step
        self._metrics = on_all_ranks(dist, lambda: self._open_log() if dist.is_main else None)
        self._finished = False
        self._stalls, self._mixture = stalls, mixture
        self._seen = np.zeros(0 if mixture is None else len(mixture.parts))  # samples of each since the last line
        self._samples = SampleRecord(config.run_dir, dist.rank) if config.record_samples else None
        self._meter, self._progress = RateMeter(), ProgressLine(plan.stop_step)
        stuck = collapse.stuck_loss
        self._stuck = {} if stuck is None else {"stuck_loss": stuck}
        self._guard = CollapseGuard(collapse, config.views, plan.schedule.peak_lr, plan.total_steps)
        self._former_knn = on_rank0(dist, lambda: self._metrics.knn if self._metrics is not None else {})
        for step in sorted(self._former_knn):
            self._guard.recall(self._former_knn[step])
        self.collapse: str | None = None  # what the guard said last, the same on every rank
        self.bad_row = BadRow(0, start_step, 0.0)  # the longest so far, the same on every rank
        self._lag = default_lag(dist) if lag is None else lag
        self._lines: deque[_Line] = deque()
        self._rank_step, self._rank = -RANK_EVERY, math.nan
        self._prediction_start_s = self._start_s = time.perf_counter()
        self._paused_s = 0.0
        self._waited, self._logged_s = [0.0] * dist.world_size, 0.0

    def _open_log(self) -> MetricsLog:
        config, step = self._config, self._start_step
        return MetricsLog(config.run_dir, step, open_trackers(config.trackers, config.run_dir, step, config.as_json()))

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # After an error nothing is waited for.
            self._finish_lines(lambda line: kind is None or line.numbers.is_here())
        finally:
            self._close("failed" if error is not None else "finished" if self._finished else "stopped")

    def _close(self, end: End) -> None:
        if self._metrics is not None:
            self._metrics.close(end)
        if self._samples is not None:
            self._samples.close()

    def step(self, step: int, result: StepResult) -> None:
        """Count step number ``step`` (from 1); every ``log_every`` steps, at the first and the last one write a line.

        A collective when a line is due. Its numbers are read ``lag`` steps later, so that the host need not wait for
        the device; those of the last step at once.
        """
        self._meter.step(self._plan.global_batch, result.wait_s, result.caught_up)
        if self._samples is not None:
            self._samples.write(step, result.ids.tolist())
        if self._mixture is not None:
            self._seen += np.bincount(self._mixture.part_of(result.ids), minlength=len(self._seen))
        if step % self._config.log_every == 0 or step in (1, self._plan.stop_step):
            with self._dist.status.waiting(f"step {step}: adding up the losses of all ranks"):
                self._lines.append(self._begin_line(step, result))
        is_last = step == self._plan.stop_step
        self._finish_lines(lambda line: is_last or step - line.step >= self._lag)
        self._predict(step)

    def flush(self) -> None:
        """Write all lines. Waits for the device."""
        self._finish_lines(lambda line: True)

    def _finish_lines(self, is_due: Callable[[_Line], bool]) -> None:
        while self._lines and is_due(self._lines[0]):
            self._finish_line(self._lines.popleft())

    def _finish_line(self, line: _Line) -> None:
        numbers = line.numbers.read()
        values, seconds = dict(zip(line.names, numbers, strict=False)), numbers[len(line.names) :]
        waits = DataWait(tuple(seconds), line.of_s)
        self._waited = [sum(both) for both in zip(self._waited, seconds, strict=True)]
        self._logged_s += waits.of_s
        rates = replace(line.rates, data_wait=max(waits.shares))
        skipped, bad_row = values.pop("skipped_steps"), values.pop("bad_row", 0.0)
        self.bad_row = max(self.bad_row, BadRow(round(bad_row), line.step, line.known["lr"]))
        rank = values.get("z_rank")
        self._rank = values.setdefault("z_rank", self._rank)
        epoch = (line.step - 1) // self._plan.steps_per_epoch
        if self._metrics is not None:
            more = {**self._stuck, **asdict(rates), **_per_rank(waits)}
            if skipped:
                more["skipped_steps"] = skipped
            self._metrics.write(epoch, line.step, **line.known, **values, **more)
            self._progress.show(
                epoch, line.step, values["loss"], values["z_std"], rates, str(waits), values.get("probe_top1")
            )
        reading = CollapseReading(values["z_std"], rank, line.rows, values["loss"])
        self._warn(self._guard.check(line.step, reading))

    def _warn(self, collapse: str | None) -> None:
        self.collapse = collapse or self.collapse
        if collapse is not None and self._dist.is_main:
            print(f"warning: {collapse}", file=sys.stderr, flush=True)

    def _begin_line(self, step: int, result: StepResult) -> _Line:
        """Loss, metrics and rank of z at this step, as means over the ranks, and the rates since the last line."""
        own_wait = torch.zeros(self._dist.world_size, device=result.loss.device)
        waited_s = self._meter.wait_s + self._stalls.read_s(wait=step == self._plan.stop_step)
        own_wait[self._dist.rank].fill_(waited_s * self._dist.world_size)
        device = {"loss": result.loss, **result.metrics, **self._shares(result)}
        if self._rank_is_due(step):
            self._rank_step = step
            device["z_rank"] = effective_rank(result.z)
        device["skipped_steps"] = result.skipped
        if result.bad_row is not None:
            device["bad_row"] = result.bad_row
        numbers = torch.cat([torch.stack([value.float() for value in device.values()]), own_wait])
        means, steps, rates = mean_over_ranks(self._dist, numbers), self._meter.steps, self._meter.read()
        known = {"lr": result.lr, **result.schedules}
        return _Line(step, tuple(device), HostCopy(means), len(result.z), known, rates, steps * rates.step_s)

    def _rank_is_due(self, step: int) -> bool:
        """Every RANK_EVERY steps, at the last step, and with each line while the rank is low: the sign must last."""
        due = step // RANK_EVERY > self._rank_step // RANK_EVERY
        return due or step == self._plan.stop_step or self._guard.rank_is_low

    def _shares(self, result: StepResult) -> dict[str, Tensor]:
        """The share of each dataset of a mixture in this rank's samples since the last line."""
        if self._mixture is None:
            return {}
        shares = on_device(self._seen / self._seen.sum(), result.loss.device)
        self._seen[:] = 0
        return {f"share_{name}": share for name, share in zip(self._mixture.names, shares, strict=True)}

    def print_waits(self) -> None:
        """Print which rank waited longest for its data."""
        print0(self._dist, describe_waits(DataWait(tuple(self._waited), self._logged_s)))

    def _predict(self, step: int) -> None:
        done = step - self._start_step
        if done == PREDICT_AFTER_STEPS // 2:
            self._prediction_start_s, self._paused_s = time.perf_counter(), 0.0
        if done == PREDICT_AFTER_STEPS:
            measured = PREDICT_AFTER_STEPS - PREDICT_AFTER_STEPS // 2
            step_s = (time.perf_counter() - self._prediction_start_s - self._paused_s) / measured
            left = self._plan.stop_step - step
            print0(
                self._dist,
                f"expected time: {duration(left * step_s)} for {left:,} more steps of {step_s:.3g} s, without kNN",
            )

    def has_knn(self, step: int) -> bool:
        """Whether the kNN accuracy after ``step`` steps is written already, by a former session."""
        return step in self._former_knn

    def knn(self, epoch: int, step: int, top1: dict[str, float]) -> None:
        """Write a kNN line: ``epoch`` epochs and ``step`` steps done, ``top1`` in percent by dataset.

        knn_top1 is the first one's; those of a mixture's datasets are knn_top1_NAME.
        """
        first = next(iter(top1.values()))
        if self._metrics is not None:
            named = {f"knn_top1_{name}": value for name, value in top1.items() if name}
            self._metrics.write(epoch, step, knn_top1=first, **named)
            words = ", ".join(f"{value:.2f} %{f' of {name}' if name else ''}" for name, value in top1.items())
            print0(self._dist, f"epoch {epoch}: kNN top-1 {words}" + self._start_note(step))
        self._warn(self._guard.check_knn(step, first))

    def _start_note(self, step: int) -> str:
        if step > 0:
            return ""
        return " (untrained)" if self._config.init is None else " (as --init gave it)"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the rates and the prediction."""
        self.flush()
        start_s = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - start_s
        self._meter.restart()
        self._stalls.read_s()

    def summary(self, step: int, checkpoint: Path) -> None:
        """Write summary.json. On rank 0 alone."""
        assert self._metrics is not None
        values = {
            "finished": step == self._plan.total_steps,
            "step": step,
            "epochs": step / self._plan.steps_per_epoch,
            **self._metrics.newest(),
            "session_steps": step - self._start_step,
            "session_s": time.perf_counter() - self._start_s,
            "checkpoint": str(checkpoint.relative_to(self._config.run_dir)),
        }
        with disk_errors(f"writing {self._config.run_dir}"):
            write_json(self._config.run_dir / SUMMARY_FILE, values)
        self._finished = True


def _per_rank(waits: DataWait) -> dict[str, float]:
    if not 1 < len(waits.seconds) <= RANKS_LOGGED:
        return {}
    return {f"data_wait_rank{rank}": share for rank, share in enumerate(waits.shares)}
