"""Owns how forward, backward and optimizer of training steps are told apart: marks on the device's own clock."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from train.engine.run import Run


class StepClock:
    """Tells forward, backward and optimizer of training steps apart, by marks on the device's own clock."""

    def __init__(self, run: Run, device: torch.device) -> None:
        """Use as a context; then ``run`` is the run to step with."""
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self._hooks = ExitStack()
        self._original = run
        self.run = replace(run, parallel=_MarkedForward(run.parallel, self._mark))

    def __enter__(self) -> StepClock:
        """Set the marks."""
        optimizer = self._original.optimizer
        for hook in (
            optimizer.register_step_pre_hook(lambda *_: self._mark("optimizer")),
            optimizer.register_step_post_hook(lambda *_: self._mark("rest")),
        ):
            self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        """Take the marks away."""
        self._hooks.close()

    def start(self) -> None:
        """Forget what was marked."""
        self._marks.clear()

    def read(self) -> dict[str, float]:
        """Seconds of each part since the start. The device must have finished."""
        self._mark("end")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        parts = dict.fromkeys(("forward", "backward", "optimizer"), 0.0)
        for (part, begin), (_, end) in itertools.pairwise(self._marks):
            seconds = begin.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - begin
            if part in parts:
                parts[part] += seconds
        return parts

    def _mark(self, part: str) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))


class _MarkedForward(nn.Module):
    """Calls a module and marks where its forward pass begins and ends; what follows up to the optimizer is backward."""

    def __init__(self, module: nn.Module, mark: Callable[[str], None]) -> None:
        super().__init__()
        self._module = module
        self._mark = mark

    def forward(self, x1: Float[Tensor, "n 3 h w"], x2: Float[Tensor, "n 3 h w"]) -> Any:
        self._mark("forward")
        out = self._module(x1, x2)
        self._mark("backward")
        return out
