"""The GPU suite's part about limits: what the step's bytes and FLOPs allow, to hold the measured rates against.

Bytes are each operation's inputs and outputs once, views left out: an upper bound, as caches save some of it, for eager
steps. A compiled step moves fewer. Copy bandwidth and matmul rate are measured on the same GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
from gpu_bench import Precision, Suite, number_format
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from pipeline.loader.loader import ViewBatch
from train.engine.loop import train_step
from train.engine.run import Run

REPEATS = 20  # copies and matmuls between two readings of the clock


class BytesMoved(TorchDispatchMode):
    """Adds up ``total``: bytes of the inputs and outputs of every operation that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        views = (returned.alias_info for returned in func._schema.returns)
        if not any(alias is not None and not alias.is_write for alias in views):
            tensors = (leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor))
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return made


def roofline(suite: Suite) -> None:
    """Copy bandwidth, matmul rates, and the rate that they allow the eager step at each batch size."""
    suite.attempt("machine", lambda: machine_rates(suite))
    small = suite.size.batches[0]
    for batch in (*suite.size.batches, few_of(small)):
        suite.attempt(f"batch {batch}", partial(_step_of, suite, batch))


def few_of(batch: int) -> int:
    """The batch of one of many GPUs, where the host counts most."""
    return max(2, batch // 4)


def _step_of(suite: Suite, batch: int) -> dict[str, float]:
    bench, run = suite.set_up(batch)
    return step_limits(suite, run, bench.resident_views())


def machine_rates(suite: Suite) -> dict[str, Any]:
    """GB/s of a large copy (read and written bytes), and TFLOP/s of a large matmul by number format."""
    device, real = suite.dist.device, suite.size.device == "cuda"
    source = torch.empty((1 << 28) if real else (1 << 22), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _seconds(device, lambda: target.copy_(source))
    formats: tuple[Precision, ...] = ("bf16", "fp16", "tf32", "fp32") if real else ("bf16", "fp32")
    matmul = {name: _matmul_tflop_s(device, 8192 if real else 256, name) for name in formats}
    return {"copy_gb_s": 2 * source.numel() / copy_s / 1e9, "matmul_tflop_s": matmul}


def _matmul_tflop_s(device: torch.device, side: int, precision: Precision) -> float:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    square = torch.randn(side, side, device=device).to(dtype)
    with number_format(precision):
        return 2 * side**3 / _seconds(device, lambda: square @ square) / 1e12


def known(suite: Suite, name: str) -> dict[str, Any] | None:
    """What the part ``roofline`` has measured under this name; None if it has not."""
    path = suite.out / "part-roofline.json"
    value = json.loads(path.read_text(encoding="utf-8")).get(name, {}) if path.exists() else {}
    return None if not value or value.keys() & {"failed", "skipped"} else value


def step_limits(
    suite: Suite, run: Run, views: Iterable[ViewBatch], precision: Precision | None = None
) -> dict[str, float]:
    """Bytes and FLOPs of one eager step, how long they take at the machine's rates, and the images/s that follow.

    Two steps are made. ``precision`` is the run's own, unless products of float32 are in TF32.
    """
    if not suite.rates:
        suite.rates = known(suite, "machine") or machine_rates(suite)
    eager, batches = replace(run, parallel=run.model), cycle(views)
    eager.model.train()
    train_step(eager, batches)
    moved, flops = BytesMoved(), FlopCounterMode(display=False)
    with flops, moved:
        train_step(eager, batches)
    name = precision or run.precision.name
    bytes_s = moved.total / 1e9 / suite.rates["copy_gb_s"]
    flops_s = flops.get_total_flops() / 1e12 / suite.rates["matmul_tflop_s"][name]
    return {
        "step_gb": moved.total / 1e9,
        "step_tflop": flops.get_total_flops() / 1e12,
        "bytes_ms": 1e3 * bytes_s,
        "flops_ms": 1e3 * flops_s,
        "most_img_per_s": run.plan.global_batch / max(bytes_s, flops_s),
    }


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    for _ in range(3):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    for _ in range(REPEATS):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start_s) / REPEATS
