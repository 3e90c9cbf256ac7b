"""Compares batch norm over ranks with that of the whole batch in one process, and prints how far they are apart.

torchrun runs this file; rank 0 prints JSON: case -> largest difference of output, gradients and running statistics.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import copy
import json

import torch
import torch.distributed as td
from torch import Tensor, nn

from model.sync_batchnorm import SyncBatchNorm, encode, synchronise

PER_RANK = 4
CASES: dict[str, tuple[nn.Module, tuple[int, ...], torch.dtype, int]] = {
    "images": (nn.BatchNorm2d(6), (6, 5, 5), torch.float64, 1),
    "vectors": (nn.BatchNorm1d(6), (6,), torch.float64, 1),
    "without weights": (nn.BatchNorm1d(6, affine=False), (6,), torch.float64, 1),
    "float32": (nn.BatchNorm2d(6), (6, 7, 3), torch.float32, 1),
    "bfloat16": (nn.BatchNorm2d(6), (6, 7, 3), torch.bfloat16, 1),
    "images, two views": (nn.BatchNorm2d(6), (6, 5, 5), torch.float64, 2),
    "vectors, three views": (nn.BatchNorm1d(6), (6,), torch.float64, 3),
    "without weights, two views": (nn.BatchNorm1d(6, affine=False), (6,), torch.float64, 2),
}


def compare(layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, views: int) -> dict[str, float]:
    """Two steps of this rank's part by the synchronised layer, and of all of it by the layer itself, view by view."""
    rank, ranks = td.get_rank(), td.get_world_size()
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layer = layer.to(wide)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    ours = synchronise(copy.deepcopy(layer))
    assert isinstance(ours, SyncBatchNorm)
    apart: dict[str, float] = {}

    def note(name: str, one: Tensor, other: Tensor) -> None:
        apart[name] = max(apart.get(name, 0.0), (one.double() - other.double()).abs().max().item())

    for _ in range(2):
        # Ranks whose means and variances differ, or there would be nothing to synchronise; and views that differ.
        scale = torch.arange(1, ranks + 1).repeat_interleave(PER_RANK).view(-1, *[1] * len(shape))
        wholes, owns, slopes = [], [], []
        part = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
        for view in range(views):
            x = (torch.randn(ranks * PER_RANK, *shape) * (scale + view) + scale - view).to(dtype)
            if x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            slopes.append(torch.randn(x.shape).to(dtype))
            wholes.append(x.clone().to(wide).requires_grad_())
            owns.append(x[part].clone().requires_grad_())
        expected, made = [layer(whole) for whole in wholes], encode(ours, owns)
        for one, other, slope in zip(expected, made, slopes, strict=True):
            assert other.dtype == dtype
            note("output", other, one[part])
            (one * slope).sum().backward(retain_graph=True)
            (other * slope[part]).sum().backward(retain_graph=True)
        for whole, own in zip(wholes, owns, strict=True):
            assert whole.grad is not None
            assert own.grad is not None
            note("gradient", own.grad, whole.grad[part])
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None
        td.all_reduce(parameter.grad)
        note(name, parameter.grad, layer.get_parameter(name).grad)  # type: ignore[arg-type]
    for name, buffer in ours.named_buffers():
        note(name, buffer, layer.get_buffer(name))
    ours.eval()
    layer.eval()
    note("evaluation", ours(own), layer(own.to(wide)))
    return apart


if __name__ == "__main__":
    td.init_process_group("gloo")
    made = {}
    for name, case in CASES.items():
        everyone: list[dict[str, float]] = [{}] * td.get_world_size()
        td.all_gather_object(everyone, compare(*case))
        made[name] = {key: max(apart[key] for apart in everyone) for key in everyone[0]}
    if td.get_rank() == 0:
        print(json.dumps(made))
    td.destroy_process_group()
