"""Ray clusters on this machine, and readers that misbehave on their nodes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.sources.listing import Listing
from pipeline.sources.readers import Reader


@contextlib.contextmanager
def ray_cluster(nodes: int = 1, cpus: int = 1) -> Iterator[Any]:
    """A head without CPUs of its own and ``nodes`` workers, to which this process is connected."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(nodes):
            cluster.add_node(num_cpus=cpus)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@dataclass(frozen=True)
class SlowReader:
    """Takes its time for each image."""

    reader: Reader
    seconds: float

    def read(self, listing: Listing, index: int) -> bytes:
        time.sleep(self.seconds)
        return self.reader.read(listing, index)


@dataclass(frozen=True)
class DeadlyReader:
    """Kills its process at the image ``name``, as often as ``flags`` has files."""

    reader: Reader
    name: str
    flags: Path

    def read(self, listing: Listing, index: int) -> bytes:
        if listing.name(index) == self.name and (left := sorted(self.flags.iterdir())):
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.reader.read(listing, index)


@dataclass(frozen=True)
class Squares:
    """Work of an actor: squares; its process is killed as often as ``flags`` has files."""

    flags: Path

    def __call__(self, number: int) -> int:
        if left := sorted(self.flags.iterdir()):
            left[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number
