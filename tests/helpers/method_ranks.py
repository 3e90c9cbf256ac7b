"""Trains a method for a few steps on any number of ranks, through the hooks of its seam; one step is skipped.

torchrun runs this file with METHOD and a file for rank 0's results: the mean losses and the state.
"""

from __future__ import annotations

import train.openmp  # before torch

# isort: split
import sys
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.methods.base import Method, MethodConfig, StepInfo
from model.methods.registry import METHODS
from model.sync_batchnorm import synchronise

GLOBAL_BATCH, STEPS, STEPS_PER_EPOCH, SKIPPED = 24, 6, 2, 3
SIZES: dict[str, dict[str, Any]] = {
    "simsiam": {"dim": 16, "projector_hidden": 16},
    "simclr": {"dim": 8, "projector_hidden": 16},
    "moco-v2": {"dim": 8, "projector_hidden": 16, "queue": 96, "bn_images": 4, "teacher_momentum": 0.9},
    "byol": {"dim": 8, "projector_hidden": 16, "predictor_hidden": 16, "teacher_momentum": 0.9},
    "swav": {"dim": 8, "projector_hidden": 16, "prototypes": 10, "queue": 48, "queue_from_epoch": 2},
    "dino": {"dim": 8, "head_hidden": 16, "prototypes": 10, "teacher_momentum": 0.9},
}


def tiny(name: str, **more: Any) -> MethodConfig:
    """A configuration that trains in a moment, for GLOBAL_BATCH images of 16 px."""
    return METHODS[name](backbone="resnet_tiny", **{**SIZES[name], **more})


def images(step: int, views: int = 2, rows: slice = slice(None), side: int = 16) -> list[Tensor]:
    """Some rows of a step's views."""
    generator = torch.Generator().manual_seed(step)
    shape, dtype = (GLOBAL_BATCH, 3, side, side), torch.get_default_dtype()
    return [torch.randn(shape, generator=generator, dtype=dtype)[rows] for _ in range(views)]


def info_of(step: int, rank: int = 0) -> StepInfo:
    """The step's place in a run of STEPS."""
    return StepInfo(step, STEPS, STEPS_PER_EPOCH, GLOBAL_BATCH, rank)


def train_step(model: nn.Module, method: Method, optimizer: torch.optim.Optimizer, step: int, applied: bool) -> Tensor:
    """One step as the loop makes it; returns this rank's loss."""
    rank, world = (td.get_rank(), td.get_world_size()) if td.is_initialized() else (0, 1)
    part, info = GLOBAL_BATCH // world, info_of(step, rank)
    optimizer.zero_grad(set_to_none=True)
    method.before_step(info)
    out = model(images(step, rows=slice(rank * part, (rank + 1) * part)), info)
    out.loss.backward()
    method.before_optimizer(info)
    if applied:
        optimizer.step()
    method.after_step(info, torch.tensor(float(applied)))
    return out.loss.detach()


def train(config: MethodConfig) -> tuple[list[float], dict[str, Tensor]]:
    """Losses over all ranks, and the state after STEPS steps; in float64, so that no rounding hides a mistake."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    method = config.build().train()
    ranks = td.get_world_size() if td.is_initialized() else 1
    if ranks > 1 and not config.own_batch_norm:
        synchronise(method)
    model: nn.Module = DistributedDataParallel(method, broadcast_buffers=False) if ranks > 1 else method
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        loss = train_step(model, method, optimizer, step, applied=step != SKIPPED)
        if ranks > 1:
            td.all_reduce(loss)
        losses.append(loss.item() / ranks)
    torch.set_default_dtype(torch.float32)
    return losses, method.state_dict()


if __name__ == "__main__":
    torch.set_num_threads(1)
    td.init_process_group("gloo")
    trained = {name: train(tiny(name)) for name in sys.argv[2:]}
    if td.get_rank() == 0:
        torch.save(trained, sys.argv[1])
    td.destroy_process_group()
