"""Linear classifiers on frozen features: heads, optimizer, rates, counting. Chen & He 2020, appendix A."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from timm.optim import Lars
from torch import Tensor, nn

from pipeline.common.errors import UserError, check_at_least_1, require
from pipeline.common.flags import own_flags
from pipeline.sampling.order import epoch_order
from train.optimization.optimizer import Schedule, check_sgd, lr_at

TRUST_COEFFICIENT = 0.001  # You et al. 2017, section 5; the official code's
BATCH, STEPS_AN_EPOCH, SMALL_BATCH = 4096, 16, 16  # of the default batch: the paper's, and ours for small datasets
LITTLE_TRAVEL = 0.5  # of the weights' length; below, the classifier is still near its random start
TOP = (1, 5)
FEATURES_AT_ONCE = 8192


@own_flags
@dataclass(frozen=True)
class ProbeConfig:
    """How the classifier is trained. The defaults are the official code's (main_lincls.py --lars)."""

    # Passes over the training samples [Chen & He 2020, appendix A].
    epochs: int = 90
    # Images of a step over all processes. 0: 4096 [appendix A], or less for a small dataset, so that an epoch has 16
    # steps.
    global_batch: int = 0
    # Learning rate at a global batch of 256, scaled linearly. TRAP: the paper's text says 0.02, the official code's
    # default is 0.1, and a reimplementation got 66.0 with 0.02 and 67.8 with 0.1 (ResNet-50, 100 epochs).
    base_lr: float = 0.1
    # Several rates separated by commas, as in 0.02,0.1,0.3: a classifier for each, trained in the same pass over the
    # data on the same features.
    lr_sweep: str = ""
    # Momentum of LARS [appendix A].
    momentum: float = 0.9
    # Weight decay [appendix A].
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        self.base_lrs()
        check_at_least_1("--epochs", self.epochs)
        rule = "it must be at least 1, or 0 for a batch that fits the data"
        require("--global-batch", self.global_batch, self.global_batch >= 0, rule)
        check_sgd(self.momentum, self.weight_decay)

    def fitted(self, samples: int, world_size: int) -> ProbeConfig:
        """With a batch for so many samples where none is given: a power of 2 times the processes, at most 4096."""
        if self.global_batch:
            return self
        share = min(BATCH, max(samples // STEPS_AN_EPOCH, min(samples, SMALL_BATCH))) // world_size
        return replace(self, global_batch=world_size * 2 ** max(share.bit_length() - 1, 0))

    def travel(self, steps: int) -> float:
        """How far LARS can move the weights in so many steps, in parts of their length, with the highest rate.

        A step moves a layer by rate x TRUST_COEFFICIENT of its length, momentum adds up 1 / (1 - momentum) of them, and
        the mean of the cosine is half of its peak.
        """
        peak = max(self.base_lrs()) * self.global_batch / 256
        return steps * peak / 2 * TRUST_COEFFICIENT / (1 - self.momentum)

    def base_lrs(self) -> tuple[float, ...]:
        """One for each classifier. Raises UserError for what are no rates."""
        if not self.lr_sweep:
            rates: tuple[float, ...] = (self.base_lr,)
        elif re.fullmatch(r"[0-9.eE+-]+(,[0-9.eE+-]+)*", self.lr_sweep):
            try:
                rates = tuple(float(text) for text in self.lr_sweep.split(","))
            except ValueError:
                rates = ()
        else:
            rates = ()
        if not rates or len(set(rates)) < len(rates) or not all(0 < rate < float("inf") for rate in rates):
            flag = f"--lr-sweep {self.lr_sweep}" if self.lr_sweep else f"--base-lr {self.base_lr}"
            raise UserError(f"{flag}: write different rates above 0, separated by commas, as in 0.02,0.1,0.3")
        return rates


class LinearHeads(nn.Module):
    """``[n, d] -> [heads, n, classes]``: independent linear classifiers that begin alike."""

    def __init__(self, heads: int, width: int, classes: int, seed: int) -> None:
        """Weights normal with standard deviation 0.01 and biases 0, as in the official code."""
        super().__init__()
        weight = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)) * 0.01
        self.heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))
        for head in self.heads:
            assert isinstance(head, nn.Linear)
            head.weight.data.copy_(weight)
            head.bias.data.zero_()

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "heads n classes"]:
        """The logits of each head."""
        return torch.stack([head(features) for head in self.heads])


def head_losses(logits: Float[Tensor, "heads n classes"], labels: Int64[Tensor, " n"]) -> Float[Tensor, " heads"]:
    """Mean cross-entropy of each head. Their sum gives each head its own gradient, since they share nothing."""
    return torch.stack([F.cross_entropy(part, labels) for part in logits])


def build_lars(config: ProbeConfig, heads: LinearHeads) -> Lars:
    """LARS (You et al. 2017) with a parameter group a head; its rate comes from ``set_rates``.

    ``always_adapt``: otherwise timm adapts no layer without weight decay, unlike the paper's formula and Apex's LARC.
    """
    groups = [
        {"params": list(head.parameters()), "peak_lr": base_lr * (config.global_batch or BATCH) / 256}
        for head, base_lr in zip(heads.heads, config.base_lrs(), strict=True)
    ]
    return Lars(
        groups,
        lr=0.0,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        trust_coeff=TRUST_COEFFICIENT,
        always_adapt=True,
    )


def set_rates(optimizer: torch.optim.Optimizer, step: int, total_steps: int) -> None:
    """Each head's rate at step ``step`` (from 0): half a cosine from its peak to 0."""
    for group in optimizer.param_groups:
        group["lr"] = lr_at(Schedule(group["peak_lr"], total_steps, warmup_steps=0, unit_steps=1), step)


@torch.no_grad()
def count_correct(
    heads: LinearHeads, features: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]
) -> Int64[Tensor, "heads 2"]:
    """How many samples each head has among its first 1 and first 5 (all classes, if there are fewer)."""
    counts = torch.zeros(len(heads.heads), len(TOP), dtype=torch.int64, device=features.device)
    for start in range(0, len(features), FEATURES_AT_ONCE):
        rows = slice(start, start + FEATURES_AT_ONCE)
        logits = heads(features[rows].float())
        best = logits.topk(min(max(TOP), logits.shape[-1]), dim=-1).indices
        hits = best == labels[rows, None]  # [heads, n, 5]
        counts += torch.stack([hits[..., :top].any(dim=-1).sum(dim=-1) for top in TOP], dim=-1)
    return counts


def stratified(
    labels: Shaped[np.ndarray, " n"], fraction: float, classes: tuple[str, ...], seed: int
) -> Int64[np.ndarray, " m"]:
    """Ids of ``fraction`` of the samples of each class, rounded; sorted, a pure function of its arguments.

    A smaller fraction is part of a larger one with the same seed. Raises UserError if a class would be left empty.
    """
    have = np.bincount(labels, minlength=len(classes))
    keep = np.floor(have * fraction + 0.5).astype(np.int64)
    empty = np.flatnonzero((have > 0) & (keep == 0))
    if len(empty):
        named = ", ".join(f"{classes[i]} ({have[i]} samples)" for i in empty[:3])
        raise UserError(
            f"--fraction {fraction} leaves no sample of {len(empty)} of {len(classes)} classes, {named} among them: "
            f"take at least {_rounded_up(0.5 / have[empty].min())}"
        )
    order = epoch_order(len(labels), seed, 0, np.arange(len(labels), dtype=np.int64))
    by_class = order[np.argsort(labels[order], kind="stable")]  # each class's samples in shuffled order
    place = np.arange(len(labels)) - np.repeat(np.cumsum(have) - have, have)  # within its class
    return np.sort(by_class[place < keep[labels[by_class]]])


def _rounded_up(fraction: float) -> str:
    """With two digits, and no less than it is: what is advised must do."""
    unit = 10.0 ** (math.floor(math.log10(fraction)) - 1)
    return f"{(math.floor(fraction / unit) + 1) * unit:.2g}"
