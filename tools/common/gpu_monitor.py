"""Owns a look at the GPU from outside: how busy it is and how much memory is taken, as NVML or nvidia-smi tells it.

Both say in which share of the last moments any kernel ran, by whichever process; not how well it filled the GPU.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch

SAMPLE_EVERY_S = 0.2
BUSY_SHARE = 0.1  # others that use more than this spoil a measurement
BUSY_LOOKS = 5


@dataclass(frozen=True)
class GpuSample:
    """One look."""

    at_s: float  # time.perf_counter
    busy: float  # 0 to 1
    memory_gib: float  # taken on the whole device, by all processes


@dataclass(frozen=True)
class GpuUse:
    """What a stretch of time needed of the GPU."""

    busy: float  # mean, 0 to 1
    memory_gib: float  # highest


class GpuWatch:
    """A context that looks at a GPU a few times a second from a thread; on a CPU it does nothing."""

    def __init__(self, device: torch.device) -> None:
        """``device``: what is measured."""
        self._look = looker(device) if device.type == "cuda" else None
        self._samples: list[GpuSample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-watch", daemon=True)

    def __enter__(self) -> GpuWatch:
        """Begin to look."""
        if self._look is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop looking."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def between(self, start_s: float, end_s: float) -> GpuUse | None:
        """What was seen from ``start_s`` to ``end_s`` (time.perf_counter); None without a GPU or a look in between."""
        seen = [sample for sample in self._samples if start_s <= sample.at_s <= end_s]
        if not seen:
            return None
        return GpuUse(statistics.fmean(sample.busy for sample in seen), max(sample.memory_gib for sample in seen))

    def _run(self) -> None:
        assert self._look is not None
        while not self._stop.wait(SAMPLE_EVERY_S):
            seen = self._look()
            if seen is not None:
                self._samples.append(GpuSample(time.perf_counter(), *seen))


def looker(device: torch.device) -> Callable[[], tuple[float, float] | None] | None:
    """A function that gives (busy share, memory taken in GiB) of a GPU, or None where it cannot tell."""
    identity = _uuid(device)
    if importlib.util.find_spec("pynvml") is not None:
        return _nvml_looker(identity, device.index or 0)
    if shutil.which("nvidia-smi") is not None:
        return lambda: _ask_nvidia_smi(identity or str(device.index or 0))
    return None


def busy_with_others(device: torch.device) -> str | None:
    """A warning if the GPU works or is full before we have begun; None if it idles or nobody can tell.

    To be called before this process does anything on the GPU.
    """
    look = looker(device) if device.type == "cuda" else None
    if look is None:
        return None
    looks = []
    for _ in range(BUSY_LOOKS):
        looks.append(look())
        time.sleep(SAMPLE_EVERY_S)
    seen = [sample for sample in looks if sample is not None]
    if not seen or statistics.median(busy for busy, _ in seen) <= BUSY_SHARE:
        return None
    busy, memory = statistics.median(busy for busy, _ in seen), seen[-1][1]
    return (
        f"the GPU is busy with other work ({busy:.0%} of the time, {memory:.1f} GiB taken): what is measured now "
        "is too low; run again when it idles (nvidia-smi shows who works)"
    )


def _uuid(device: torch.device) -> str | None:
    """The GPU's name that NVML knows as well: CUDA_VISIBLE_DEVICES renumbers GPUs for torch alone."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None) if torch.cuda.is_available() else None
    return None if uuid is None else f"GPU-{uuid}"


def _nvml_looker(identity: str | None, index: int) -> Callable[[], tuple[float, float] | None] | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(index) if identity is None else pynvml.nvmlDeviceGetHandleByUUID(identity)
        )
    except pynvml.NVMLError:
        return None

    def look() -> tuple[float, float] | None:
        try:
            busy = pynvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
            return busy, pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30
        except pynvml.NVMLError:  # a part of a GPU (MIG) does not tell
            return None

    return look


def _ask_nvidia_smi(identity: str) -> tuple[float, float] | None:
    query = ["nvidia-smi", "-i", identity, "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        busy, memory_mib = (float(field) for field in answer.strip().split(","))
    except (OSError, subprocess.SubprocessError, ValueError):  # no driver, or "[N/A]"
        return None
    return busy / 100, memory_mib / 1024
