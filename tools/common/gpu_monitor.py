"""How busy a GPU is and how much of its memory is taken, by all processes, as NVML reports it.

GpuMonitor takes samples from a thread while something is measured; busy_with_others warns before a measurement. Busy
is the share of the last moments in which any kernel ran; it does not say how well the kernels filled the GPU.
"""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass

import torch

try:
    from pynvml import NVMLError
except ModuleNotFoundError:  # nvidia-ml-py is not installed; torch raises the same error then
    NVMLError = ModuleNotFoundError

SAMPLE_EVERY_S = 0.2
BUSY_SHARE = 0.1  # other processes that use more than this spoil a measurement
BUSY_SAMPLES = 5


@dataclass(frozen=True)
class GpuUse:
    """Use of the whole device: one sample, or the mean busy share and the highest memory of several."""

    busy: float  # 0 to 1
    memory_gib: float


def gpu_use(device: torch.device) -> GpuUse | None:
    """A sample of ``device``; None on a CPU, without nvidia-ml-py, or where NVML has no number (a MIG slice)."""
    if device.type != "cuda":
        return None
    try:
        return GpuUse(torch.cuda.utilization(device) / 100, torch.cuda.device_memory_used(device) / 2**30)
    except (ModuleNotFoundError, RuntimeError, NVMLError):
        return None


class GpuMonitor:
    """Context that samples a GPU five times a second from a thread; without NVML there are no samples."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._samples: list[tuple[float, GpuUse]] = []  # time.perf_counter, use
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-monitor", daemon=True)

    def __enter__(self) -> GpuMonitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def between(self, start_s: float, end_s: float) -> GpuUse | None:
        """Mean busy share and highest memory between two readings of time.perf_counter; None without samples."""
        uses = [use for at_s, use in self._samples if start_s <= at_s <= end_s]
        if not uses:
            return None
        return GpuUse(statistics.fmean(use.busy for use in uses), max(use.memory_gib for use in uses))

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            use = gpu_use(self._device)
            if use is None:
                return
            self._samples.append((time.perf_counter(), use))


def busy_with_others(device: torch.device) -> str | None:
    """A warning if other processes use the GPU, or nvidia-ml-py is missing; None if it idles or NVML has no number.

    To be called before this process starts work on the GPU.
    """
    if device.type == "cuda" and NVMLError is ModuleNotFoundError:
        return "the GPU's use is not measured: nvidia-ml-py is not installed"
    uses = []
    for _ in range(BUSY_SAMPLES):
        use = gpu_use(device)
        if use is None:
            return None
        uses.append(use)
        time.sleep(SAMPLE_EVERY_S)
    busy = statistics.median(use.busy for use in uses)
    if busy <= BUSY_SHARE:
        return None
    return (
        f"the GPU is busy with other work ({busy:.0%} of the time, {uses[-1].memory_gib:.1f} GiB taken): what is "
        "measured now is too low; run again when it idles (nvidia-smi lists the processes)"
    )
