"""Rows of all ranks, with gradient: for losses that compare each sample with the whole batch (SimCLR, MoCo, SwAV).

``torch.distributed.all_gather`` alone lets no gradient through. Here the backward pass adds up what every rank's loss
says of this rank's rows; the mean over ranks that DDP takes afterwards makes it the gradient of the mean loss, on any
number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as td
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def rank_and_world() -> tuple[int, int]:
    """This rank, and how many there are; 0 and 1 outside of a process group."""
    return (td.get_rank(), td.get_world_size()) if td.is_initialized() else (0, 1)


@torch.compiler.disable  # a graph break costs less than what the compiler makes of the collective
def gather_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "all d"]:
    """The rows of all ranks in the order of the ranks, on every rank; each must have equally many. A collective.

    The gradient flows back to the rank that a row came from, summed over the ranks.
    """
    return rows if rank_and_world()[1] == 1 else _GatherRows.apply(rows)


def sum_over_ranks(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``values`` added up over the ranks, in place and without gradient. A collective."""
    if rank_and_world()[1] > 1:
        td.all_reduce(values)
    return values


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        gathered = rows.new_empty((td.get_world_size() * len(rows), *rows.shape[1:]))
        # Its name until torch 2.14, which warns of the former one
        getattr(td, "all_gather_single", td.all_gather_into_tensor)(gathered, rows)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        td.all_reduce(total)
        return total.chunk(td.get_world_size())[td.get_rank()]
