"""Owns the optimizer, its two parameter groups and the learning rate of every step. The only importer of apex.

Chen & He 2020, section 3: SGD, lr = base_lr x global batch / 256, cosine, weight decay 1e-4 on everything.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch
from torch import nn
from typing_extensions import assert_never

from pipeline.common.errors import UserError, require


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule. The defaults are the paper's (arXiv:2011.10566)."""

    base_lr: float = 0.05  # lr at a global batch of 256: section 3; scaled linearly with the global batch
    momentum: float = 0.9  # section 3
    weight_decay: float = 1e-4  # section 3; on BN scales and biases too
    # Linear warm-up. None: 10 from a global batch of 1024 on (section 4.3), at most a tenth of the run; 0 below
    warmup_epochs: float | None = None
    predictor_lr: Literal["constant", "cosine"] = "constant"  # table 1: constant 68.1, cosine 67.7
    # How often the rate moves. The official code moves it once an epoch; "step" follows the same curve, and a run of
    # few epochs neither falls in stairs nor stays on one rate for a whole epoch of warm-up
    schedule_unit: Literal["step", "epoch"] = "step"
    # auto: Apex's FusedSGD where it is built (but with fp16), else torch's fused SGD; foreach on a CPU
    optimizer: Literal["auto", "apex", "fused", "foreach"] = "auto"


@dataclass(frozen=True)
class Schedule:
    """What ``lr_at`` needs to know; computed once, part of the run's plan."""

    peak_lr: float
    total_steps: int
    warmup_steps: int
    unit_steps: int  # the rate moves every so many steps: 1, or the steps of an epoch


def make_schedule(config: OptimConfig, global_batch: int, epochs: int, steps_per_epoch: int) -> Schedule:
    """The schedule of a whole run."""
    warmup_epochs = config.warmup_epochs
    if warmup_epochs is None:
        warmup_epochs = min(10.0, epochs / 10) if global_batch >= 1024 else 0.0
    unit_steps = steps_per_epoch if config.schedule_unit == "epoch" else 1
    warmup_steps = round(warmup_epochs * steps_per_epoch / unit_steps) * unit_steps
    return Schedule(config.base_lr * global_batch / 256, epochs * steps_per_epoch, warmup_steps, unit_steps)


def lr_at(schedule: Schedule, step: int) -> float:
    """The learning rate of step ``step`` (from 0): linear warm-up to the peak, then half a cosine to 0."""
    step = step // schedule.unit_steps * schedule.unit_steps
    if step < schedule.warmup_steps:
        return schedule.peak_lr * (step + schedule.unit_steps) / schedule.warmup_steps
    progress = (step - schedule.warmup_steps) / (schedule.total_steps - schedule.warmup_steps)
    return schedule.peak_lr * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(config: OptimConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Encoder and predictor as two groups, so that their rates can differ; what needs no gradient is left out."""
    predictor = {id(p) for p in model.get_submodule("predictor").parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"name": "encoder", "constant_lr": False, "params": [p for p in trained if id(p) not in predictor]},
        {
            "name": "predictor",
            "constant_lr": config.predictor_lr == "constant",
            "params": [p for p in trained if id(p) in predictor],
        },
    ]
    return [group for group in groups if group["params"]]


def set_lr(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> float:
    """Set the rates of step ``step``; returns the encoder's."""
    lr = lr_at(schedule, step)
    for group in optimizer.param_groups:
        group["lr"] = schedule.peak_lr if group["constant_lr"] else lr
    return lr


def build_optimizer(
    config: OptimConfig, model: nn.Module, peak_lr: float, device: torch.device, scaled: bool = False
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer, and one line that says which implementation it is and why.

    ``scaled``: by a GradScaler. Raises UserError if an implementation is asked for that this machine lacks.
    """
    kind, reason = _choose(config.optimizer, device, scaled)
    groups = parameter_groups(config, model)
    options: dict[str, Any] = {"lr": peak_lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    match kind:
        case "apex":
            from apex.optimizers import FusedSGD  # optional: built from source only

            return FusedSGD(groups, **options), f"apex FusedSGD ({reason})"
        case "fused":
            optimizer = torch.optim.SGD(groups, fused=True, **options)
            for parameter in (p for group in groups for p in group["params"] if config.momentum):
                # torch 2.15 leaves the momentum uninitialised if the very first step is skipped (non-finite gradients)
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimizer, f"torch SGD, fused ({reason})"
        case "foreach":
            return torch.optim.SGD(groups, foreach=True, **options), f"torch SGD, foreach ({reason})"
        case unreachable:
            assert_never(unreachable)


def _choose(
    choice: Literal["auto", "apex", "fused", "foreach"], device: torch.device, scaled: bool
) -> tuple[Literal["apex", "fused", "foreach"], str]:
    if choice == "foreach" or choice == "fused":
        return choice, "as asked"
    missing = _why_no_apex(device)
    if choice == "apex":
        if missing is not None:
            raise UserError(f"--optimizer apex, but {missing}; take --optimizer auto")
        return "apex", "as asked"
    if device.type == "cpu":
        return "foreach", "auto: no GPU"
    if missing is not None:
        return "fused", f"auto: {missing}"
    if scaled:
        return "fused", "auto: torch's loss scaler of fp16 makes the host wait at each step of Apex's"
    return "apex", "auto: Apex is built here"


def _why_no_apex(device: torch.device) -> str | None:
    """None where Apex's fused SGD works, else the reason. PyPI's `apex` is another project, without optimizers."""
    if device.type != "cuda":
        return "Apex's optimizers need a GPU"
    if importlib.util.find_spec("amp_C") is None:
        return "Apex is not built here (no module amp_C, the CUDA extension that its optimizers call)"
    try:
        from apex.optimizers import FusedSGD  # noqa: F401
    except ImportError as error:
        return f"Apex is not built here ({error})"
    return None


def check_sgd(momentum: float, weight_decay: float) -> None:
    """Of SGD and LARS."""
    rule = "it must be at least 0 and below 1; the paper's is 0.9"
    require("--momentum", momentum, 0 <= momentum < 1, rule)
    rule = "it must be at least 0 and finite; 0 is without"
    require("--weight-decay", weight_decay, 0 <= weight_decay < inf, rule)
