"""Where a run's metrics go beside metrics.jsonl: --log and --log-project. train/monitoring/trackers.py sends them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from pipeline.common.errors import UserError, require
from pipeline.common.flags import own_flags

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}  # tracker -> package it imports
NO_TRACKER = "none"


@own_flags
@dataclass(frozen=True)
class TrackerConfig:
    """The trackers of a run."""

    # Send metrics to these trackers, separated by commas: tensorboard, wandb, mlflow; or none. metrics.jsonl is always
    # written. Accounts and servers are those of the environment: WANDB_API_KEY, WANDB_MODE=offline,
    # MLFLOW_TRACKING_URI (without it RUN/mlruns).
    log: str = "tensorboard"
    # Name of the project in wandb, of the experiment in mlflow; the run is called as its folder.
    log_project: str = "siamstream"

    def __post_init__(self) -> None:
        """Raise UserError for unknown trackers and an empty project."""
        for name in self.names:
            require(
                "--log", self.log, name in PACKAGES, f"it takes {', '.join(PACKAGES)}, separated by commas, or none"
            )
        require("--log", self.log, len(set(self.names)) == len(self.names), "it names each tracker once")
        require("--log-project", repr(self.log_project), bool(self.log_project.strip()), "it takes a name")

    @property
    def names(self) -> tuple[str, ...]:
        """The trackers, in the order given."""
        return () if self.log.strip() == NO_TRACKER else tuple(name.strip() for name in self.log.split(","))

    def check_installed(self) -> None:
        """Raise UserError for a tracker whose package is missing."""
        for name in self.names:
            if importlib.util.find_spec(PACKAGES[name]) is None:
                raise UserError(f"--log {self.log}: {name} is not installed: pip install 'siamstream[{name}]'")
