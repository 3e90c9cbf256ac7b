"""The GPU suite's part about limits: what the step's bytes and FLOPs allow, to hold the measured rates against.

Bytes are each operation's inputs and outputs once, views left out: an upper bound, as caches save some of it, for eager
steps. A compiled step moves fewer. Copy bandwidth and matmul rate are measured on the same GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_bench import Suite
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from train.engine.loop import train_step

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
    """Copy bandwidth, matmul rate, and the rate that they allow the eager step at each batch size."""
    suite.attempt("machine", lambda: machine_rates(suite))
    for batch in suite.size.batches:
        suite.attempt(f"batch {batch}", lambda batch=batch: step_limits(suite, batch))  # type: ignore[misc]


def machine_rates(suite: Suite) -> dict[str, float]:
    """GB/s of a large copy (read and written bytes), and TFLOP/s of a large bf16 matmul."""
    device, real = suite.dist.device, suite.size.device == "cuda"
    source = torch.empty((1 << 28) if real else (1 << 16), dtype=torch.uint8, device=device)
    target, side = torch.empty_like(source), 8192 if real else 64
    square = torch.randn(side, side, device=device).to(torch.bfloat16)
    copy_s = _seconds(device, lambda: target.copy_(source))
    matmul_s = _seconds(device, lambda: square @ square)
    return {"copy_gb_s": 2 * source.numel() / copy_s / 1e9, "matmul_tflop_s": 2 * side**3 / matmul_s / 1e12}


def step_limits(suite: Suite, batch: int) -> dict[str, float]:
    """Bytes and FLOPs of one step, how long they take at the measured rates, and the images/s that follow."""
    rates = suite.results["machine"]
    bench, run = suite.set_up(batch)
    run.model.train()
    views = bench.resident_views()
    train_step(run, iter(views))
    moved, flops = BytesMoved(), FlopCounterMode(display=False)
    with flops, moved:
        train_step(run, iter(views))
    bytes_s = moved.total / 1e9 / rates["copy_gb_s"]
    flops_s = flops.get_total_flops() / 1e12 / rates["matmul_tflop_s"]
    return {
        "step_gb": moved.total / 1e9,
        "step_tflop": flops.get_total_flops() / 1e12,
        "bytes_ms": 1e3 * bytes_s,
        "flops_ms": 1e3 * flops_s,
        "most_img_per_s": batch / max(bytes_s, flops_s),
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
