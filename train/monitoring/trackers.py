"""Sends a run's metrics to TensorBoard, wandb and mlflow: --log. On rank 0 only.

    with open_trackers(config, run_dir, resume_step, settings) as trackers:
        trackers.write(step, {"loss": -0.9})

A tracker never stops or slows training: wandb and mlflow have a thread each, and one that fails, hangs or cannot keep
up is left out for the rest of the session, with one warning. RUN/trackers.json keeps the ids of runs, so that a resumed
run goes on in the same one. What is sent and printed holds no secret of the command line or of the environment.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pipeline.common.files import read_json, write_json
from pipeline.common.secrets import conceal_variables, scrub
from train.config.tracker_config import TrackerConfig

TRACKERS_FILE = "trackers.json"
LINES_WAITING = 10_000  # a tracker that is so far behind is given up
CLOSE_S = 60.0  # for what is still to be sent at the end of a session
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
End = Literal["finished", "stopped", "failed"]  # how a session ends; a stopped one goes on with --resume
MLFLOW_STATUS: dict[End, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
PARAMS_A_CALL, PARAM_CHARACTERS = 100, 500  # limits of an MLflow server


class Line(NamedTuple):
    """Values of one step."""

    step: int
    time_s: float  # since 1970
    values: dict[str, float]


class Tracker(Protocol):
    """One service for metrics. Everything may raise."""

    def write(self, line: Line) -> None:
        """Send the values of a step."""

    def close(self, end: End) -> None:
        """Send what is left, and close."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        """TensorBoard hides what a former session wrote after ``resume_step``."""
        from torch.utils.tensorboard import SummaryWriter  # takes over a second to import: not for every rank

        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, line: Line) -> None:
        """Scalars by their names."""
        for name, value in line.values.items():
            self._board.add_scalar(name, value, line.step, walltime=line.time_s)

    def close(self, end: End) -> None:
        """Flush and close."""
        self._board.close()


class Wandb:
    """A run of Weights & Biases; its files are in RUN/wandb. Neither console nor machine nor source is recorded."""

    def __init__(self, config: TrackerConfig, run_dir: Path, ids: RunIds, settings: dict[str, Any]) -> None:
        """Begin the run, or go on in it."""
        import wandb

        # The id is ours: a run that begins offline keeps it
        run_id = ids.of("wandb") or uuid.uuid4().hex[:8]
        options = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
        )
        self._run = wandb.init(
            project=config.log_project,
            id=run_id,
            name=run_dir.name,
            dir=str(run_dir),
            config=settings,
            allow_val_change=True,
            resume="allow",
            reinit="create_new",
            settings=options,
        )
        # wandb's own step never goes back, as ours does after a resume
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        ids.keep("wandb", run_id)

    def write(self, line: Line) -> None:
        """One row of the history."""
        self._run.log({**line.values, "step": line.step})

    def close(self, end: End) -> None:
        """Upload what is left, if online."""
        self._run.finish(exit_code=1 if end == "failed" else 0)


class Mlflow:
    """A run of an MLflow server, or of the file store RUN/mlruns."""

    def __init__(self, config: TrackerConfig, run_dir: Path, ids: RunIds, settings: dict[str, Any]) -> None:
        """Begin the run, or go on in it."""
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (run_dir / "mlruns").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions ask for consent
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient(uri)
        known = ids.of("mlflow")
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            self._id = known
            return
        experiment = self._client.get_experiment_by_name(config.log_project)
        place = self._client.create_experiment(config.log_project) if experiment is None else experiment.experiment_id
        self._id = self._client.create_run(place, run_name=run_dir.name).info.run_id
        ids.keep("mlflow", self._id)
        params = [Param(name, str(value)[:PARAM_CHARACTERS]) for name, value in _flat(settings).items()]
        for start in range(0, len(params), PARAMS_A_CALL):
            self._client.log_batch(self._id, params=params[start : start + PARAMS_A_CALL])

    def write(self, line: Line) -> None:
        """All values in one call."""
        at_ms = int(line.time_s * 1000)
        self._client.log_batch(
            self._id, metrics=[self._metric(name, value, at_ms, line.step) for name, value in line.values.items()]
        )

    def close(self, end: End) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._id, MLFLOW_STATUS[end])


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


class RunIds:
    """trackers.json: the id of the run in each tracker."""

    def __init__(self, run_dir: Path) -> None:
        """The file appears with the first id."""
        self._path, self._lock = run_dir / TRACKERS_FILE, threading.Lock()

    def of(self, tracker: str) -> str | None:
        """The id that a former session got. Raises ValueError if the file is damaged."""
        return self._read().get(tracker)

    def keep(self, tracker: str, run_id: str) -> None:
        """Record an id. Raises OSError."""
        with self._lock:
            write_json(self._path, {**self._read(), tracker: run_id})

    def _read(self) -> dict[str, str]:
        if not self._path.exists():
            return {}
        known = read_json(self._path)
        if not isinstance(known, dict) or not all(isinstance(run_id, str) for run_id in known.values()):
            raise ValueError(f"{self._path} holds no ids of runs: delete it to begin new ones")
        return known


class _Guarded:
    """A tracker whose first error ends it, with a warning."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name, self._failed = name, False
        self._tracker: Tracker | None = None
        self._try(lambda: self._opened(make()))

    def _opened(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def write(self, line: Line) -> None:
        self._try(lambda: None if self._tracker is None else self._tracker.write(line))

    def close(self, end: End) -> None:
        self._try(lambda: None if self._tracker is None else self._tracker.close(end))

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except (Exception, SystemExit) as error:  # noqa: BLE001  printed: whatever it is, training goes on
            self._failed = True
            warn(self._name, str(error) or type(error).__name__)


class _InThread:
    """The same in a thread of its own, which may hang."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name, self._given_up = name, False
        self._lines: queue.Queue[Line | End] = queue.Queue(LINES_WAITING)
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"log {name}", daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[], Tracker]) -> None:
        tracker = _Guarded(self._name, make)
        while isinstance(line := self._lines.get(), Line):
            tracker.write(line)
        tracker.close(line)

    def write(self, line: Line) -> None:
        self._put(line)

    def close(self, end: End) -> None:
        self._put(end)
        if not self._given_up:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                self._give_up(f"has not taken all lines within {CLOSE_S:.0f} s")

    def _put(self, line: Line | End) -> None:
        if self._given_up:
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._give_up(f"is {LINES_WAITING:,} lines behind")

    def _give_up(self, reason: str) -> None:
        self._given_up = True
        warn(self._name, reason)


def warn(name: str, reason: str) -> None:
    """Print that a tracker has been left out."""
    text = " ".join(scrub(reason).split())
    print(
        f"warning: --log {name} gets no more metrics of this session: {text[:500]}. Training goes on; metrics.jsonl "
        "has them all",
        file=sys.stderr,
        flush=True,
    )


class Trackers:
    """All trackers of a run."""

    def __init__(self, each: list[_Guarded | _InThread]) -> None:
        """Use ``open_trackers``."""
        self._each = each

    def write(self, step: int, values: dict[str, float]) -> None:
        """Send the values of a step. Never raises for what a tracker does."""
        line = Line(step, time.time(), values)
        for one in self._each:
            one.write(line)

    def close(self, end: End) -> None:
        """Send what is left, for up to ``CLOSE_S`` each."""
        for one in self._each:
            one.close(end)


def open_trackers(config: TrackerConfig, run_dir: Path, resume_step: int, settings: dict[str, Any]) -> Trackers:
    """Open the trackers that ``config`` names; ``settings`` are the run's, as config.json has them."""
    conceal_variables(SECRETS)
    ids, shown = RunIds(run_dir), json.loads(scrub(json.dumps(settings)))
    each: list[_Guarded | _InThread] = []
    for name in config.names:
        match name:
            case "tensorboard":
                each.append(_Guarded(name, lambda: TensorBoard(run_dir, resume_step)))
            case "wandb":
                each.append(_InThread(name, lambda: Wandb(config, run_dir, ids, shown)))
            case "mlflow":
                each.append(_InThread(name, lambda: Mlflow(config, run_dir, ids, shown)))
            case _:
                raise AssertionError(f"no tracker {name}")
    return Trackers(each)
