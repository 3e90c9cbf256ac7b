"""The optimizer of a method's parameter groups, and the rate of every step. The only importer of apex.

Chen & He 2020, section 3: SGD, lr = base_lr x global batch / 256, cosine, weight decay 1e-4 on everything. LARS is
timm's, as SimCLR, BYOL and SwAV use it; AdamW is torch's, as DINO uses it.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import asdict, dataclass
from math import inf
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from typing_extensions import assert_never

from model.methods.base import ParamGroup
from pipeline.common.errors import UserError, require
from pipeline.common.flags import own_flags


@own_flags
@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule. The defaults are the paper's (arXiv:2011.10566)."""

    # Learning rate at a global batch of 256; scaled with the batch [Chen & He 2020, section 3].
    base_lr: Annotated[float, tyro.conf.arg(aliases=["--lr"])] = 0.05
    # Momentum of SGD and LARS, first beta of AdamW [section 3].
    momentum: float = 0.9
    # Weight decay, on BN scales and biases too [section 3].
    weight_decay: float = 1e-4
    # Epochs of linear warm-up. Default: 10 from a global batch of 1024 on (section 4.3), at most a tenth of the run; 0
    # below.
    warmup_epochs: float | None = None
    # Share of the peak that the warm-up starts from; SwAV takes 1/16. 0: the first step has the first stair.
    warmup_start: float = 0.0
    # Share of the peak that the cosine ends at; SwAV takes 1/1000.
    lr_end: float = 0.0
    # How --base-lr grows with the batch: linear, or with its square root (SimCLR's README has both).
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    # Weight decay at the end, reached by half a cosine; DINO takes 0.4. Default: it stays constant.
    weight_decay_end: float | None = None
    # How often the rate moves. The official code moves it once an epoch; step follows the same curve without stairs.
    schedule_unit: Literal["step", "epoch"] = "step"
    # SGD in an implementation (auto: torch's fused SGD on a GPU, foreach on a CPU; apex: its FusedSGD, where Apex is
    # built), or LARS, or AdamW with momentum as its first beta.
    optimizer: Literal["auto", "apex", "fused", "foreach", "lars", "adamw"] = "auto"
    # Trust coefficient of LARS [You et al. 2017, and SimCLR's, BYOL's and SwAV's code].
    trust_coefficient: float = 0.001

    def __post_init__(self) -> None:
        check_sgd(self.momentum, self.weight_decay)
        rule = "it must be above 0 and finite; the paper's is 0.05"
        require("--base-lr", self.base_lr, 0 < self.base_lr < inf, rule)
        if self.warmup_epochs is not None:
            rule = "it must be at least 0 and below --epochs"
            require("--warmup-epochs", self.warmup_epochs, 0 <= self.warmup_epochs < inf, rule)
        for name in ("warmup_start", "lr_end"):
            share = getattr(self, name)
            require(f"--{name.replace('_', '-')}", share, 0 <= share <= 1, "it must be a share of the peak, 0 to 1")
        if self.weight_decay_end is not None:
            rule = "it must be at least 0 and finite"
            require("--weight-decay-end", self.weight_decay_end, 0 <= self.weight_decay_end < inf, rule)
        rule = "it must be above 0 and finite; You et al. take 0.001"
        require("--trust-coefficient", self.trust_coefficient, 0 < self.trust_coefficient < inf, rule)

    def identity(self) -> dict[str, Any]:
        """What decides a run's numbers. SGD's implementations are free to change, and the first checkpoints know
        neither the other optimizers nor the newer fields, which at their defaults change nothing."""
        fields = asdict(self)
        if self.optimizer not in ("lars", "adamw"):
            del fields["optimizer"]
        for name in NEWER_FIELDS:
            if fields[name] == getattr(OptimConfig, name):
                del fields[name]
        return {f"optim.{name}": value for name, value in fields.items()}


NEWER_FIELDS = ("warmup_start", "lr_end", "lr_scaling", "weight_decay_end", "trust_coefficient")


@dataclass(frozen=True)
class Schedule:
    """What ``lr_at`` needs to know; computed once, part of the run's plan."""

    peak_lr: float
    total_steps: int
    warmup_steps: int
    unit_steps: int  # the rate moves every so many steps: 1, or the steps of an epoch
    warmup_start: float = 0.0  # share of the peak
    end: float = 0.0  # share of the peak
    weight_decay: tuple[float, float] | None = None  # at the start and at the end; None: constant


def make_schedule(config: OptimConfig, global_batch: int, epochs: int, steps_per_epoch: int) -> Schedule:
    """The schedule of a whole run."""
    warmup_epochs = config.warmup_epochs
    if warmup_epochs is None:
        warmup_epochs = min(10.0, epochs / 10) if global_batch >= 1024 else 0.0
    unit_steps = steps_per_epoch if config.schedule_unit == "epoch" else 1
    warmup_steps = round(warmup_epochs * steps_per_epoch / unit_steps) * unit_steps
    ratio = global_batch / 256 if config.lr_scaling == "linear" else math.sqrt(global_batch / 256)
    decay = None if config.weight_decay_end is None else (config.weight_decay, config.weight_decay_end)
    return Schedule(
        config.base_lr * ratio,
        epochs * steps_per_epoch,
        warmup_steps,
        unit_steps,
        config.warmup_start,
        config.lr_end,
        decay,
    )


def lr_at(schedule: Schedule, step: int) -> float:
    """The learning rate of step ``step`` (from 0): linear warm-up to the peak, then half a cosine to the end."""
    step = step // schedule.unit_steps * schedule.unit_steps
    if step < schedule.warmup_steps:
        if schedule.warmup_start == 0.0:
            return schedule.peak_lr * (step + schedule.unit_steps) / schedule.warmup_steps
        share = step / max(schedule.warmup_steps - schedule.unit_steps, 1)  # the first step has the given rate
        return schedule.peak_lr * (schedule.warmup_start + (1 - schedule.warmup_start) * share)
    progress = (step - schedule.warmup_steps) / (schedule.total_steps - schedule.warmup_steps)
    return schedule.peak_lr * _half_cosine(1.0, schedule.end, progress)


def weight_decay_at(schedule: Schedule, step: int) -> float | None:
    """The weight decay of step ``step`` (from 0), by half a cosine over the whole run; None where it is constant."""
    if schedule.weight_decay is None:
        return None
    return _half_cosine(*schedule.weight_decay, step / schedule.total_steps)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> float:
    """Set the learning rates and weight decays of step ``step``; returns the rate of the schedule."""
    lr, decay = lr_at(schedule, step), weight_decay_at(schedule, step)
    for group in optimizer.param_groups:
        rate = (schedule.peak_lr if group["constant_lr"] else lr) * group["lr_scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if decay is not None and group["decay"]:
            group["weight_decay"] = decay
    return lr


def rates_as_tensors(
    optimizer: torch.optim.Optimizer, schedule: Schedule, device: torch.device, scaled: bool
) -> str | None:
    """Let a CUDA graph hold the optimizer's step: the rates of its groups become tensors, which ``set_rates`` fills.

    ``scaled``: by a GradScaler. Returns None; or, with the rates left as they are, why a graph cannot hold the step.
    """
    if hasattr(optimizer, "_dummy_overflow_buf"):
        return "Apex's kernels take the rate as a number"
    if schedule.weight_decay is not None:
        return "the weight decay, which changes from step to step, is a number"
    fused = optimizer.param_groups[0].get("fused")
    if scaled and not fused:
        return "the loss scaler makes the host wait for an optimizer that is not fused"
    if not fused and not hasattr(sys.modules[type(optimizer).__module__], "_multi_tensor_lars"):  # timm 1.0.31's has it
        return "it reads the rate on the host"
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(float(group["lr"]), device=device)
        if not fused:
            group["foreach"] = True  # timm's other implementation reads the rate on the host
    return None


def build_optimizer(
    config: OptimConfig, groups: list[ParamGroup], peak_lr: float, device: torch.device, scaled: bool = False
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer of a method's groups, and one line that says which implementation it is and why.

    ``scaled``: by a GradScaler. Raises UserError if an implementation is asked for that this machine lacks.
    """
    if config.optimizer == "lars":
        return _lars(config, groups, peak_lr), "timm's LARS (as asked)"
    if config.optimizer == "adamw":
        return _adamw(config, groups, peak_lr, device)
    return _sgd(config, groups, peak_lr, device, scaled)


def torch_groups(config: OptimConfig, groups: list[ParamGroup]) -> list[dict[str, Any]]:
    """The groups as torch's optimizers take them; set_rates reads the entries that torch ignores."""
    return [
        {
            "name": group.name,
            "params": group.params,
            "constant_lr": group.constant_lr,
            "lr_scale": group.lr_scale,
            "decay": group.decay,
            "weight_decay": config.weight_decay if group.decay else 0.0,
        }
        for group in groups
    ]


def _lars(config: OptimConfig, groups: list[ParamGroup], peak_lr: float) -> torch.optim.Optimizer:
    """timm adapts groups with weight decay always, and those without only where ``always_adapt`` says so."""
    from timm.optim import Lars  # takes a second

    assert all(group.adapt or not group.decay for group in groups)
    described = torch_groups(config, groups)
    for entry, group in zip(described, groups, strict=True):
        entry["always_adapt"] = group.adapt
    return Lars(described, lr=peak_lr, momentum=config.momentum, trust_coeff=config.trust_coefficient)


def _adamw(
    config: OptimConfig, groups: list[ParamGroup], peak_lr: float, device: torch.device
) -> tuple[torch.optim.Optimizer, str]:
    kind = "fused" if device.type == "cuda" else "foreach"
    optimizer = torch.optim.AdamW(
        torch_groups(config, groups), lr=peak_lr, betas=(config.momentum, 0.999), **{kind: True}
    )
    return optimizer, f"torch AdamW, {kind} (as asked)"


def _sgd(
    config: OptimConfig, groups: list[ParamGroup], peak_lr: float, device: torch.device, scaled: bool
) -> tuple[torch.optim.Optimizer, str]:
    kind, reason = _choose(config.optimizer, device, scaled)
    described = torch_groups(config, groups)
    options: dict[str, Any] = {"lr": peak_lr, "momentum": config.momentum}
    match kind:
        case "apex":
            from apex.optimizers import FusedSGD  # optional: built from source only

            return FusedSGD(described, **options), f"apex FusedSGD ({reason})"
        case "fused":
            optimizer = torch.optim.SGD(described, fused=True, **options)
            for parameter in (p for group in groups for p in group.params if config.momentum):
                # torch 2.15 leaves the momentum uninitialised if the very first step is skipped (non-finite gradients)
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return optimizer, f"torch SGD, fused ({reason})"
        case "foreach":
            return torch.optim.SGD(described, foreach=True, **options), f"torch SGD, foreach ({reason})"
        case unreachable:
            assert_never(unreachable)


def _choose(choice: str, device: torch.device, scaled: bool) -> tuple[Literal["apex", "fused", "foreach"], str]:
    if choice == "foreach" or choice == "fused":
        return choice, "as asked"  # type: ignore[return-value]
    if choice == "apex":
        if (missing := _why_no_apex(device)) is not None:
            raise UserError(f"--optimizer apex, but {missing}; take --optimizer auto")
        return "apex", "as asked; torch's loss scaler makes the host wait at each step" if scaled else "as asked"
    if device.type == "cpu":
        return "foreach", "auto: no GPU"
    return "fused", "auto: as fast as Apex's, which moves the same bytes in as many launches, and in every torch"


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
    """Raise UserError for a momentum or a weight decay that SGD and LARS cannot take."""
    rule = "it must be at least 0 and below 1; the paper's is 0.9"
    require("--momentum", momentum, 0 <= momentum < 1, rule)
    rule = "it must be at least 0 and finite; 0 is without"
    require("--weight-decay", weight_decay, 0 <= weight_decay < inf, rule)
