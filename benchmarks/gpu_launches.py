"""The GPU suite's parts about the host: launches and host time of a step, and whole runs with a CUDA graph."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from gpu_bench import WARM_STEPS, Precision, Suite
from gpu_roofline import few_of, known, step_limits
from torch.autograd import DeviceType
from torch.profiler import profile

from train.engine.loop import train_step

STEPS = 3
SHOWN = ("img_per_s", "host_bound", "data_wait")  # of metrics.jsonl
PRETRAIN = Path(__file__).resolve().parents[1] / "train" / "pretrain.py"


def launches(suite: Suite) -> None:
    """Kernels of a step, and the time of host and device, at a large batch and at one of many GPUs with 64 each."""
    large = suite.size.batches[0]
    few = few_of(large)
    settings: list[tuple[int, Precision, bool]] = [(large, "bf16", False), (few, "bf16", False)]
    settings += [(large, "fp16", False), (few, "fp16", False), (few, "bf16", True), (large, "bf16", True)]
    if suite.dist.device.type != "cuda":
        settings = [(large, "fp32", False), (few, "fp32", False)]
    for batch, precision, compiled in settings:
        name = f"batch {batch}, {precision}, {'compiled' if compiled else 'eager'}"
        suite.attempt(name, partial(_launches, suite, batch, precision, compiled), needs_s=15.0 if compiled else 0.0)


def _launches(suite: Suite, batch: int, precision: Precision, compiled: bool) -> dict[str, Any]:
    bench, run = suite.set_up(batch, precision=precision, compiled=compiled)  # type: ignore[arg-type]  # no tf32
    run.model.train()
    resident = bench.resident_views()
    views = cycle(resident)

    def steps() -> tuple[float, float]:
        """Milliseconds of a step until the host has launched it, and until the device has made it."""
        start_s = time.perf_counter()
        for _ in range(STEPS):
            train_step(run, views)
        launched_s = time.perf_counter()
        bench.finish()
        return 1e3 * (launched_s - start_s) / STEPS, 1e3 * (time.perf_counter() - start_s) / STEPS

    for _ in range(WARM_STEPS):
        train_step(run, views)
    bench.finish()
    host_ms, step_ms = steps()
    with profile(acc_events=True) as seen:
        steps()
    on_gpu = bench.device.type == "cuda"
    device = DeviceType.CUDA if on_gpu else DeviceType.CPU  # a CPU's operations stand in for kernels
    kernels = [event for event in seen.events() if event.device_type == device]
    busy_ms = sum(event.device_time_total if on_gpu else event.self_cpu_time_total for event in kernels) / 1e3 / STEPS
    numbers = {"launches": len(kernels) / STEPS, "host_ms": host_ms, "step_ms": step_ms, "kernels_ms": busy_ms}
    return {**numbers, "img_per_s": 1e3 * batch / step_ms, "roofline": step_limits(suite, run, resident)}


def cuda_graph(suite: Suite) -> None:
    """Whole runs of pretrain.py with --cuda-graph and without, where the host counts most: at a small batch."""
    few = few_of(suite.size.batches[0])
    for flag in ("--no-cuda-graph", "--cuda-graph"):
        suite.attempt(f"batch {few}, {flag}", partial(_whole_run, suite, few, flag), needs_s=20.0)


def _whole_run(suite: Suite, batch: int, flag: str) -> dict[str, Any]:
    steps, every = (200, 20) if suite.dist.device.type == "cuda" else (8, 2)
    options = [flag, "--global-batch", batch, "--max-steps", steps, "--log-every", every, "--knn-every", 0]
    options += ["--epochs", 1000, "--device", suite.size.device, "--image-size", suite.size.image_size]
    options += ["--backbone", suite.size.model.backbone]
    with tempfile.TemporaryDirectory(prefix="siamstream-") as folder:
        command = [sys.executable, PRETRAIN, "--data", suite.dataset.path, "--run-dir", folder, *options]
        ended = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=suite.left_s, check=False
        )
        if ended.returncode != 0:
            raise RuntimeError(f"exit code {ended.returncode}: {(ended.stderr or ended.stdout).strip()}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    later = [line for line in lines if line["step"] > steps // 2]  # a graph is captured before
    numbers = {name: statistics.median(line[name] for line in later) for name in SHOWN}
    return {**numbers, "roofline": known(suite, f"batch {batch}")}
