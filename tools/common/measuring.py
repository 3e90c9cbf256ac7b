"""How benchmarks measure: contestants in turn in one process, medians with extremes, a description of the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.common.files import atomic_file
from pipeline.common.system import cores, versions

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "numpy", "numba", "webdataset")


@dataclass(frozen=True)
class Spread:
    """A quantity measured several times."""

    minimum: float
    median: float
    maximum: float
    runs: int

    @staticmethod
    def of(values: list[float]) -> Spread:
        return Spread(min(values), statistics.median(values), max(values), len(values))

    def __str__(self) -> str:
        return f"{self.median:.4g} ({self.minimum:.4g} .. {self.maximum:.4g})"


@dataclass(frozen=True)
class Run:
    """One run of one contestant."""

    wall_s: float
    cpu_s: float  # of this process and its finished children


def cpu_seconds() -> float:
    """Of this process and its finished children, so far."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def timed(work: Callable[[], None], cpu: Callable[[], float] = cpu_seconds) -> Run:
    """Run once. The CPU time includes worker processes that end with the work."""
    wall, before = time.perf_counter(), cpu()
    work()
    return Run(time.perf_counter() - wall, cpu() - before)


def alternate(
    contestants: Mapping[str, Callable[[], None]],
    repeats: int,
    tidy: Callable[[], None] = lambda: None,
    cpu: Callable[[], float] = cpu_seconds,
) -> dict[str, list[Run]]:
    """Run contestants in turn, ``repeats`` times each after one warm-up; a machine that slows down affects all alike.

    ``tidy`` runs before each run and is not timed. ``cpu``: CPU seconds so far, where other processes work too.
    """
    for work in contestants.values():
        tidy()
        work()
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, work in contestants.items():
            tidy()
            runs[name].append(timed(work, cpu))
    return runs


def ratio(runs: Mapping[str, list[Run]], of: str, to: str, quantity: str = "wall_s") -> Spread:
    """``quantity`` of the contestant ``to`` / that of ``of``, round by round."""
    return Spread.of([getattr(b, quantity) / getattr(a, quantity) for a, b in zip(runs[of], runs[to], strict=True)])


def machine() -> dict[str, str]:
    """The machine, its packages and its load, for the results."""
    import torch  # here: worker processes import this module again, and torch takes seconds

    system = f"{platform.system()}, Python {platform.python_version()}"
    facts = {
        "machine": f"{_processor()}, {cores()} cores, {_memory_gib()} GiB, {system}",
        "packages": ", ".join(f"{name} {version}" for name, version in versions(PACKAGES).items()),
        "load": f"{os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else "unknown",
    }
    if torch.cuda.is_available():
        facts["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return facts


def describe_machine() -> str:
    """The same as lines of text."""
    return "\n".join(f"{name}: {value}" for name, value in machine().items())


def write_results(path: Path, results: Mapping[str, object]) -> None:
    """Write results and the machine's description as JSON."""
    with atomic_file(path) as file:
        file.write((json.dumps({"machine": machine(), **results}, indent=2, default=asdict) + "\n").encode())


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
