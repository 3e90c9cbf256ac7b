"""A training step as a CUDA graph (--cuda-graph): the GPU gets all of a step's kernels in one launch.

The first steps are ordinary ones; then a step is captured, and from there on it is replayed with new images in the same
memory. Python runs only while it is captured: rates and the number of the step are tensors. As torch's documentation of
CUDA graphs describes it ("Whole-network capture", "Usage with DistributedDataParallel").
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.common.errors import UserError

# Ordinary steps before the capture: libraries choose their kernels and optimizers make their state in them. DDP needs
# 11, by torch's documentation: it rearranges its buckets and times some of its first steps.
WARM_UP_STEPS, WARM_UP_STEPS_DDP = 3, 11


class Part(NamedTuple):
    """A part of a step."""

    work: Callable[[], None]
    captured: bool  # otherwise Python launches it in every step


Capture = Callable[[Callable[[], None], Any], Callable[[], None]]  # (work, memory pool) -> what replays the work


def capture_on_gpu(work: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Capture what ``work`` launches on the current stream, which must not be the default one. Nothing is computed."""
    graph = torch.cuda.CUDAGraph()
    # The loader's threads go on meanwhile, and may allocate: "global", torch's default, would forbid it.
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        work()
    return graph.replay


class StepGraph:
    """Captures the steps of one run and replays them."""

    results: Any = None  # what the captured step has computed; each replay writes it anew

    def __init__(
        self, warm_up: int, device: torch.device, with_optimizer: bool = True, capture: Capture = capture_on_gpu
    ) -> None:
        """``warm_up`` ordinary steps come first, and again when the phase changes.

        ``with_optimizer``: whether the optimizer's step can be captured as well.
        """
        self.step = torch.zeros((), dtype=torch.int64, device=device)  # its number, for the method's hooks
        self.with_optimizer = with_optimizer
        self._warm_up, self._capture = warm_up, capture
        self._phase: Hashable = object()  # equal to no other
        self._steps = 0  # of this phase
        self._inputs: list[list[Tensor]] = []
        self._replays: list[Callable[[], None]] = []

    def is_due(self, phase: Hashable) -> bool:
        """Count a step of this phase. Whether to capture or replay it: the first ones are for the caller to make."""
        if phase != self._phase:
            self._phase, self._steps, self._replays = phase, 0, []
        self._steps += 1
        return self._steps > self._warm_up

    def load(self, step: int, inputs: list[list[Tensor]]) -> list[list[Tensor]]:
        """Copy the views of each pass to where the graph reads them, and the step's number; returns those tensors."""
        if not self._replays:
            self._inputs = [[torch.empty_like(view) for view in views] for views in inputs]
        for place, views in zip(self._inputs, inputs, strict=True):
            torch._foreach_copy_(place, views)
        self.step.fill_(step)
        return self._inputs

    def run(self, parts: Sequence[Part]) -> None:
        """Make the step of the loaded inputs; at the first time of a phase its parts are captured.

        Raises UserError if they cannot be.
        """
        if self._replays:
            for replay in self._replays:
                replay()
            return
        pool = torch.cuda.graph_pool_handle() if self.step.is_cuda else None
        for captured, run_of_parts in groupby(parts, key=lambda part: part.captured):
            work = _in_a_row([part.work for part in run_of_parts])
            if captured:
                work = self._captured(work, pool)
            self._replays.append(work)
            work()

    def _captured(self, work: Callable[[], None], pool: Any) -> Callable[[], None]:
        try:
            return self._capture(work, pool)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"--cuda-graph: the step cannot be captured ({reason}): go on with --resume and --no-cuda-graph"
            ) from error


def _in_a_row(works: list[Callable[[], None]]) -> Callable[[], None]:
    def work() -> None:
        for each in works:
            each()

    return work
