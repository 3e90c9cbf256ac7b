"""The GPU suite's parts about the step alone: number format, layout, batch, compiler, implementation of SGD."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from gpu_bench import Precision, Suite, number_format
from gpu_roofline import step_limits

from pipeline.loader.loader import ViewBatch
from tools.throughput.report import StageResult
from tools.throughput.stages import model_step
from train.engine.run import Run
from train.optimization.optimizer import torch_groups
from train.optimization.precision import SkipNonFinite


@dataclass(frozen=True)
class Variant:
    """One way to compute a step."""

    batch: int
    precision: Precision = "bf16"
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    compiled: bool = False
    optimizer: Literal["apex", "fused", "foreach", "one by one"] = "fused"

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "eager"
        return f"batch {self.batch}, {self.precision}, {self.layout}, {how}, SGD {self.optimizer}"


def model(suite: Suite) -> None:
    """The step alone, eager: precision, layout, batch, and how SGD is implemented. What matters most comes first."""
    small, large = suite.size.batches
    precisions: tuple[Precision, ...] = ("bf16", "fp16", "tf32", "fp32")
    variants = [
        *(Variant(large, precision) for precision in precisions),
        *(Variant(large, optimizer=optimizer) for optimizer in ("apex", "foreach", "one by one")),
        *(Variant(small, precision) for precision in precisions),
        *(Variant(large, precision, "contiguous") for precision in precisions),
        *(Variant(small, precision, "contiguous") for precision in precisions),
    ]
    _steps(suite, variants, needs_s=8)


def compiled(suite: Suite) -> None:
    """The step alone, compiled: the likeliest settings first, since each takes most of a minute to compile."""
    small, large = suite.size.batches
    variants = [
        Variant(large, compiled=True),  # stages-compiled has left its code in the compiler's cache
        Variant(small, compiled=True),
        Variant(large, "fp16", compiled=True),
        Variant(large, "tf32", compiled=True),
        Variant(large, layout="contiguous", compiled=True),
        Variant(large, "fp32", compiled=True),
    ]
    _steps(suite, variants[: suite.size.most_compiled], needs_s=40)


def _steps(suite: Suite, variants: list[Variant], needs_s: float) -> None:
    on_gpu = suite.dist.device.type == "cuda"
    bench, _ = suite.set_up(suite.size.batches[-1])
    views = bench.resident_views()
    for variant in variants:
        if not on_gpu and (variant.precision in ("fp16", "tf32") or variant.optimizer == "apex"):
            suite.leave_out([str(variant)])
            continue
        measure = partial(_measure_step, suite, variant, views)
        suite.attempt(str(variant), measure, needs_s if on_gpu else 0.0)


def _measure_step(suite: Suite, variant: Variant, views: list[ViewBatch]) -> dict[str, Any]:
    bench, run = suite.set_up(
        variant.batch,
        precision="fp32" if variant.precision == "tf32" else variant.precision,
        optimizer="foreach" if variant.optimizer == "one by one" else variant.optimizer,
        compiled=variant.compiled,
    )
    if variant.optimizer == "one by one":
        run = with_plain_sgd(run, foreach=False)
    if variant.layout == "contiguous":
        make_contiguous(run)
    run.model.train()
    seen = [_cut(view, variant, bench.dtype) for view in views]
    with number_format(variant.precision), model_step(bench, run, seen) as advance:
        trials = suite.stretches(advance, bench.batch)
    memory = torch.cuda.max_memory_allocated() / 2**30 if suite.dist.device.type == "cuda" else None
    limits = step_limits(suite, run, seen, variant.precision)
    return {**asdict(StageResult.of(trials)), "torch_memory_gib": memory, "roofline": limits}


def _cut(views: ViewBatch, variant: Variant, dtype: torch.dtype) -> ViewBatch:
    layout = torch.contiguous_format if variant.layout == "contiguous" else torch.channels_last
    parts = [x[: variant.batch].to(dtype).contiguous(memory_format=layout) for x in views.views]
    return replace(views, views=parts, ids=views.ids[: variant.batch], sources=views.sources[: variant.batch])


def make_contiguous(run: Run) -> None:
    """Put weights and momentum in torch's default layout: fused kernels want them alike."""
    run.model.to(memory_format=torch.contiguous_format)
    for weight, state in run.optimizer.state.items():
        if "momentum_buffer" in state:
            state["momentum_buffer"] = torch.zeros_like(weight)


def with_plain_sgd(run: Run, foreach: bool | None) -> Run:
    """The run with torch's SGD: not fused; ``foreach`` None is torch's own choice."""
    options = run.config.optim
    groups = torch_groups(options, run.model.parameter_groups())
    sgd = torch.optim.SGD(
        groups,
        lr=run.plan.schedule.peak_lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        foreach=foreach,
        fused=False,
    )
    return replace(run, optimizer=sgd, guard=SkipNonFinite(run.model, sgd, run.dist.device))
