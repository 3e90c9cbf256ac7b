"""Images and a small dataset that tests share. They are made once per test session and never changed by a test."""

from __future__ import annotations

import tests.helpers.annotated  # noqa: F401  # before the modules that it checks
import train.openmp  # noqa: F401  # before torch

# isort: split
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from pipeline.dataset.dataset import ShardSet
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers import fault_summary
from tests.helpers.photos import write_photo_folder

# Processes that tests start import tests.helpers too.
ROOT = str(Path(__file__).resolve().parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))

# The same examples in every run, and no deadline: a busy machine must not turn a test red.
settings.register_profile("deterministic", deadline=None, derandomize=True)
settings.load_profile("deterministic")

# A shell lets what it runs in the background ignore Ctrl-C, and processes that tests start would inherit that.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images in 4 class folders."""
    return write_photo_folder(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="session")
def photo_dataset_path(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``photo_dataset``, for scripts that take --data."""
    out = tmp_path_factory.mktemp("dataset") / "photos"
    make_dataset(str(photo_folder), out, ShardingOptions(samples_per_shard=10), quiet=True, in_process=True)
    return out


@pytest.fixture(scope="session")
def photo_dataset(photo_dataset_path: Path) -> ShardSet:
    """``photo_folder`` in 5 shards, with labels."""
    return ShardSet.open(photo_dataset_path)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As in the subprocesses: sums in the same order, and no crowding of the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the faults tried and survived, where tests marked ``faults`` have run."""
    found = fault_summary.tallies(terminalreporter.stats)
    if found:
        terminalreporter.section("faults")
        for line in fault_summary.table(found):
            terminalreporter.write_line(line)
