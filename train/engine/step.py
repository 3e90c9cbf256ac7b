"""One optimizer step of any method: forward, backward, update; launched by Python or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.methods.base import MethodOutput, StepInfo
from pipeline.loader.loader import ViewBatch
from train.engine.run import Run
from train.engine.step_graph import Part
from train.monitoring.progress import GpuProgress
from train.monitoring.reporter import StepResult
from train.optimization.optimizer import set_rates


class Pass(NamedTuple):
    """What a forward pass needs."""

    views: list[Tensor]
    ids: Int64[np.ndarray, " n"] | None  # for the sample memory
    sources: Int64[np.ndarray, " n"] | None  # for the probe


class PassMeans(NamedTuple):
    """What the passes of a step give; tensors on the device."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]
    z: Float[Tensor, "n d"]  # of the last pass


def train_step(run: Run, batches: Iterator[ViewBatch]) -> StepResult:
    """Forward and backward over the step's micro-batches, then one optimizer step.

    The host waits for the device only where a sample memory is kept by the host. A step whose gradients are not finite
    changes no weight, no statistic and no state of the method, and is counted.
    """
    model, info, graph = run.model, run.info, run.graph
    lr = set_rates(run.optimizer, run.plan.schedule, run.step)
    model.before_step(info)
    taken: list[ViewBatch] = []
    progress = GpuProgress(run.dist.device)
    if graph is not None and graph.is_due(model.phase(info)):
        passes = list(_passes(run, batches, taken))
        means = _replay(run, passes, progress)
    else:
        means = _forward_and_backward(run, _passes(run, batches, taken), info)
        progress.backward_launched()
        _complete_gradients(run, info)
        run.guard.update(run.precision.scaler)
        applied = run.guard.settle()
        model.after_step(info, applied)
        if run.probe is not None:
            means.metrics["probe_top1"] = run.probe.step(applied)
    caught_up = progress.caught_up()
    run.midway = False
    run.dist.status.work(f"step {run.step + 1}: between two steps")
    logged = (run.step + 1) % run.config.log_every == 0
    return StepResult(
        loss=means.loss,
        metrics=means.metrics,
        schedules=model.schedules(info),
        z=means.z,
        skipped=run.guard.skipped,
        lr=lr,
        wait_s=sum(batch.wait_s for batch in taken),
        ids=np.concatenate([batch.ids for batch in taken if batch.pair == 0]),
        bad_row=run.guard.longest_row() if logged else None,
        caught_up=caught_up,
    )


def _passes(run: Run, batches: Iterator[ViewBatch], taken: list[ViewBatch]) -> Iterator[Pass]:
    """Take the step's batches from the loader, one for each pass, and note them in ``taken``, without their views."""
    for _ in range(run.config.accumulate * run.config.model.passes_per_batch):
        run.dist.status.work(f"step {run.step + 1}: waiting for the loader")
        batch = next(batches)
        run.midway = True
        run.dist.status.wait(f"step {run.step + 1}: forward, backward, averaging gradients over the ranks")
        taken.append(replace(batch, views=[]))
        yield Pass(batch.views, batch.ids, batch.sources)


def _forward_and_backward(run: Run, passes: Iterable[Pass], info: StepInfo) -> PassMeans:
    """Gradients of the step, added up over its passes and averaged over the ranks."""
    run.optimizer.zero_grad()  # to None, torch's default; Apex's takes no argument
    run.guard.remember()
    count = run.config.accumulate * run.config.model.passes_per_batch
    outputs = []
    for number, (views, ids, sources) in enumerate(passes):
        if run.memory is not None:
            assert ids is not None
            info = info._replace(memory=run.memory.read(ids))
        with no_sync(run.parallel, last=number == count - 1):
            with run.precision.autocast():
                out: MethodOutput = run.parallel(views, info)
            run.precision.scaler.scale(out.loss / count).backward()
        if run.probe is not None:
            assert sources is not None
            run.probe.add(sources)
        if run.memory is not None:
            assert ids is not None
            assert out.memory is not None
            run.memory.write(ids, out.memory)
        outputs.append(out._replace(loss=out.loss.detach()))
    return PassMeans(
        torch.stack([out.loss for out in outputs]).mean(),
        {name: torch.stack([out.metrics[name] for out in outputs]).mean() for name in outputs[0].metrics},
        outputs[-1].embedding,
    )


def _complete_gradients(run: Run, info: StepInfo) -> None:
    run.precision.scaler.unscale_(run.optimizer)
    run.model.before_optimizer(info)
    run.guard.look()


def _replay(run: Run, passes: list[Pass], progress: GpuProgress) -> PassMeans:
    """The same from a CUDA graph."""
    graph = run.graph
    assert graph is not None
    info = run.info._replace(step=graph.step)
    inputs = [Pass(views, None, None) for views in graph.load(run.step, [it.views for it in passes])]

    def gradients() -> None:
        graph.results = _forward_and_backward(run, inputs, info)
        _complete_gradients(run, info)

    progress.backward_launched()  # all before this step is, and the GPU has it done where it waits for the graph
    graph.run(
        [
            Part(gradients, captured=True),
            Part(lambda: run.guard.update(run.precision.scaler), captured=graph.with_optimizer),
            Part(lambda: run.model.after_step(info, run.guard.settle()), captured=True),
        ]
    )
    return graph.results


def no_sync(parallel: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Average gradients over the ranks once a step, with the last micro-batch."""
    called = getattr(parallel, "_orig_mod", parallel)  # torch.compile wraps it
    if isinstance(called, DistributedDataParallel) and not last:
        return called.no_sync()
    return nullcontext()
