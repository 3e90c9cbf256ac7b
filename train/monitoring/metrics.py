"""What a run reports: metrics.jsonl, and the same values to trackers.

A line of metrics.jsonl is written every ``log_every`` steps: epoch (from 0, the one that the step belongs to), step
(optimizer steps done), time (seconds since 1970), loss, lr, z_std, z_rank (effective rank, computed every 100 steps and
repeated in between), img_per_s (images), step_s (seconds a step), both since the last line, data_wait (share of that
time that the slowest rank waited for the loader); of several ranks, up to 64, data_wait_rankR too; host_bound (share of
the steps in which the GPU waited for the host's launches, 0 without a GPU); share_NAME of each dataset of a mixture
(its part of the images since the last line); skipped_steps (of this session, for nan or inf gradients) if there are
any; what the method adds (teacher_momentum, queue_age, prototype_entropy, ...), and stuck_loss, the loss of an encoder
that tells no two samples apart (ln prototypes, ...), where the method has one; with --probe probe_top1 (percent, of the
training images of about the last 20 steps). A kNN line has epoch (epochs done), step and knn_top1 (percent), of a
mixture also knn_top1_NAME; the first one is the untrained encoder's. What is no number (nan, inf) is null. Resuming
cuts off what lies after the checkpoint: no step appears twice.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pipeline.common.files import disk_errors, own_file
from train.config.tracker_config import TrackerConfig
from train.monitoring.trackers import End, Trackers, open_trackers
from train.storage.run_folder import METRICS_FILE, cut_off, json_line


class MetricsLog:
    """metrics.jsonl and the trackers of one run; used on rank 0 only."""

    def __init__(self, run_dir: Path, resume_step: int, trackers: Trackers | None = None) -> None:
        """Open for appending after step ``resume_step``. Raises UserError if the disk is full or not writable.

        ``trackers``: closed with the log; None: TensorBoard.
        """
        self._path = run_dir / METRICS_FILE
        with disk_errors(f"writing {self._path}"):
            kept = cut_off(self._path, resume_step)
            self._knn = {line["step"]: line["knn_top1"] for line in kept if "knn_top1" in line}
            self._last: dict[str, Any] = next((line for line in reversed(kept) if "loss" in line), {})
            self._file = open(self._path, "a", buffering=1, encoding="utf-8", opener=own_file)  # noqa: SIM115  # closed by close()
        self._trackers = trackers or open_trackers(TrackerConfig(), run_dir, resume_step, {})

    @property
    def knn(self) -> dict[int, float]:
        """The kNN accuracies in percent that are written, by step."""
        return dict(self._knn)

    def newest(self) -> dict[str, float]:
        """For the summary: the values of the last step's line, the last kNN accuracy, the untrained encoder's."""
        values = {name: value for name, value in self._last.items() if name not in ("epoch", "step", "time")}
        if self._knn:
            values["knn_top1"] = self._knn[max(self._knn)]
        if 0 in self._knn:
            values["knn_top1_untrained"] = self._knn[0]
        return values

    def write(self, epoch: int, step: int, **values: float) -> None:
        """Append a line, and send the values to the trackers. Raises UserError as the constructor does."""
        line: dict[str, Any] = {"epoch": epoch, "step": step, "time": round(time.time(), 3), **values}
        with disk_errors(f"writing {self._path}"):
            self._file.write(json_line(line))
        self._trackers.write(step, values)
        if "knn_top1" in values:
            self._knn[step] = values["knn_top1"]
        else:
            self._last = line

    def close(self, end: End = "finished") -> None:
        """Flush and close. What could not be written before is tried once more, so this raises as ``write`` does.

        ``end``: how the session ends, for the trackers.
        """
        try:
            with disk_errors(f"writing {self._path}"):
                self._file.close()
        finally:
            self._trackers.close(end)


class SampleRecord:
    """samples-rankR.jsonl: the sample ids of each step (steps done, ids in the order of the batch) on one rank."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        """Open for appending; ``cut_off`` has dropped what lies after the checkpoint. UserError as MetricsLog."""
        self._path = run_dir / f"samples-rank{rank}.jsonl"
        with disk_errors(f"writing {self._path}"):
            self._file = open(self._path, "a", buffering=1, encoding="utf-8", opener=own_file)  # noqa: SIM115  # closed by close()

    def write(self, step: int, ids: list[int]) -> None:
        """Append the ids of step number ``step`` (from 1). Raises UserError if there is no room."""
        with disk_errors(f"writing {self._path}"):
            self._file.write(json.dumps({"step": step, "ids": ids}) + "\n")

    def close(self) -> None:
        """Close the file. Raises UserError if there is no room."""
        with disk_errors(f"writing {self._path}"):
            self._file.close()
