"""A stand-in for Apex's FusedSGD on a CPU: its signatures and its flag, with plain arithmetic for its kernel.

Signatures and state as in Apex 6424da3b, apex/optimizers/fused_sgd.py; the kernel as csrc/multi_tensor_sgd_kernel.cu.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from train.optimization import optimizer as optim


def multi_tensor_sgd(
    noop_flag: Tensor, tensors: list[list[Tensor]], decay: float, momentum: float, lr: float, first_run: bool
) -> None:
    """The kernel begins with a look at the flag."""
    if int(noop_flag):
        return
    for gradient, weight, buffer in zip(*tensors, strict=True):
        slope = gradient + decay * weight
        buffer.copy_(slope if first_run else momentum * buffer + slope)
        weight.sub_(lr * buffer)


class FusedSGD(torch.optim.Optimizer):
    """Takes what Apex's takes, and nothing else."""

    def __init__(
        self,
        params: Any,
        lr: Any = None,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:
        if lr is None or lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        assert (dampening, nesterov, wd_after_momentum) == (0, False, False)
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "dampening": 0, "weight_decay": weight_decay, "nesterov": nesterov},
        )
        self.most_recent_scale = 1.0
        self.set_grad_none = set_grad_none
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)

    def zero_grad(self) -> None:  # type: ignore[override]
        super().zero_grad()

    def get_momentums(self, params: list[Tensor]) -> tuple[list[Tensor], bool]:
        momentums, first_run = [], True
        for p in params:
            state = self.state[p]
            first_run = "momentum_buffer" not in state
            if first_run:
                state["momentum_buffer"] = torch.zeros_like(p.data)
            momentums.append(state["momentum_buffer"])
        return momentums, first_run

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.dtype == torch.float32 and p.grad is not None]
            momentums, first_run = self.get_momentums(params)
            tensors = [[p.grad for p in params], params, momentums]
            rates = group["weight_decay"], group["momentum"], group["lr"]
            if params:
                multi_tensor_sgd(self._dummy_overflow_buf, tensors, *rates, first_run)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``from apex.optimizers import FusedSGD`` find it, on any device."""
    monkeypatch.setattr(optim, "_why_no_apex", lambda device: None)
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    module = types.ModuleType("apex.optimizers")
    module.FusedSGD = FusedSGD  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
