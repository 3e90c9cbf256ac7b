"""Report of a running loop: every rank calls it, means are taken over all ranks, rank 0 writes and prints."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from model.embedding_stats import effective_rank
from model.methods.base import CollapseProfile
from pipeline.common.files import disk_errors, write_json
from pipeline.common.system import duration
from pipeline.dataset.mixture import Mixture
from pipeline.loader.timing import Stalls
from train.config.run_config import PretrainConfig
from train.config.run_plan import RunPlan
from train.distributed.collectives import mean_over_ranks, on_all_ranks, on_rank0, print0
from train.distributed.process_group import DistContext
from train.monitoring.collapse import CollapseGuard, CollapseReading
from train.monitoring.metrics import MetricsLog, SampleRecord
from train.monitoring.progress import DataWait, ProgressLine, RateMeter, Rates, describe_waits
from train.monitoring.trackers import open_trackers
from train.storage.run_folder import SUMMARY_FILE

PREDICT_AFTER_STEPS = 20  # steps of this session after which the run's time is predicted; the first half warms up
RANKS_LOGGED = 64  # up to so many ranks each have a data_wait of their own in metrics.jsonl


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
    caught_up: bool = False  # whether the GPU waited for the host's launches


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
    ) -> None:
        """Open for the steps after ``start_step``; what a former session wrote after it is cut off. A collective.

        ``stalls`` are the loader's, of this rank; ``collapse`` is the method's; the share of each dataset of
        ``mixture`` is written.
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
        if self._metrics is not None:
            self._metrics.close("failed" if error is not None else "finished" if self._finished else "stopped")
        if self._samples is not None:
            self._samples.close()

    def step(self, step: int, result: StepResult) -> None:
        """Count step number ``step`` (from 1); every ``log_every`` steps, at the first and the last one write a line.

        A collective and a host sync when a line is due.
        """
        self._meter.step(self._plan.global_batch, result.wait_s, result.caught_up)
        if self._samples is not None:
            self._samples.write(step, result.ids.tolist())
        if self._mixture is not None:
            self._seen += np.bincount(self._mixture.part_of(result.ids), minlength=len(self._seen))
        if step % self._config.log_every == 0 or step in (1, self._plan.stop_step):
            with self._dist.status.waiting(f"step {step}: adding up the losses of all ranks"):
                values, rates, waits = self._read(result)
            skipped = {"skipped_steps": result.skipped.item()} if result.skipped else {}
            epoch = (step - 1) // self._plan.steps_per_epoch
            if self._metrics is not None:
                more = {**result.schedules, **self._stuck, **asdict(rates), **_per_rank(waits), **skipped}
                self._metrics.write(epoch, step, lr=result.lr, **values, **more)
                self._progress.show(
                    epoch, step, values["loss"], values["z_std"], rates, str(waits), values.get("probe_top1")
                )
            reading = CollapseReading(values["z_std"], values["z_rank"], len(result.z), values["loss"])
            self._warn(self._guard.check(step, reading))
        self._predict(step)

    def _warn(self, collapse: str | None) -> None:
        self.collapse = collapse or self.collapse
        if collapse is not None and self._dist.is_main:
            print(f"warning: {collapse}", file=sys.stderr, flush=True)

    def _read(self, result: StepResult) -> tuple[dict[str, float], Rates, DataWait]:
        """Loss, metrics and rank of z at the last step, the rates since the last line; data_wait is the slowest rank's.

        Means over the ranks.
        """
        own_wait = torch.zeros(self._dist.world_size, device=result.loss.device)
        own_wait[self._dist.rank] = (self._meter.wait_s + self._stalls.read_s()) * self._dist.world_size
        device = {"loss": result.loss, **result.metrics, "z_rank": effective_rank(result.z), **self._shares(result)}
        values = torch.cat([torch.stack([value.float() for value in device.values()]), own_wait])
        means = mean_over_ranks(self._dist, values).tolist()
        named, seconds = dict(zip(device, means, strict=False)), means[len(device) :]
        steps = self._meter.steps
        rates = self._meter.read()
        waits = DataWait(tuple(seconds), steps * rates.step_s)
        self._waited = [sum(both) for both in zip(self._waited, seconds, strict=True)]
        self._logged_s += waits.of_s
        return named, replace(rates, data_wait=max(waits.shares)), waits

    def _shares(self, result: StepResult) -> dict[str, Tensor]:
        """The share of each dataset of a mixture in this rank's samples since the last line."""
        if self._mixture is None:
            return {}
        shares = torch.from_numpy(self._seen / self._seen.sum()).to(result.loss.device)
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
