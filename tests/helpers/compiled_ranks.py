"""Compares compiled training with eager training on each rank, and counts the graphs that the compiler makes.

torchrun runs this file; rank 0 prints JSON: case -> graphs, largest graph, breaks and the largest differences.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import copy
import json
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from model.methods.base import StepInfo
from model.methods.simsiam import SimSiam, SimSiamConfig
from model.sync_batchnorm import prepare_batch_norm

TINY = SimSiamConfig(backbone="resnet_tiny", dim=32, projector_hidden=32, predictor_hidden=8)
CASES = {
    "alone": {},
    "DDP": {"parallel": True},
    "bfloat16": {"narrow": True},
}


def compare(parallel: bool = False, narrow: bool = False) -> dict[str, Any]:
    """Three steps of a small model on this rank's images, compiled and eager."""
    torch._dynamo.reset()
    counters.clear()
    graphs: list[int] = []

    def backend(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(len([node for node in graph.graph.nodes if node.op.startswith("call")]))
        return aot_eager(graph, inputs)

    torch.manual_seed(0)
    eager: nn.Module = prepare_batch_norm(SimSiam(TINY))
    twin = copy.deepcopy(eager)
    if parallel:
        eager, twin = DistributedDataParallel(eager), DistributedDataParallel(twin)
    compiled = torch.compile(twin, backend=backend, dynamic=False)
    torch.manual_seed(td.get_rank() + 1)
    apart = {"loss": 0.0, "gradient": 0.0, "buffer": 0.0}
    missing = 0
    for step in range(3):  # whose numbers must not be compiled in
        views = torch.randn(2, 8, 3, 32, 32)
        losses = []
        for module in (eager, compiled):
            module.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                loss = module(list(views), StepInfo(step, 10, 5, 16, td.get_rank())).loss
            loss.backward()
            losses.append(loss.item())
        apart["loss"] = max(apart["loss"], abs(losses[0] - losses[1]))
        for one, other in zip(eager.parameters(), twin.parameters(), strict=True):
            missing += one.grad is None or other.grad is None
            apart["gradient"] = max(apart["gradient"], _apart(one.grad, other.grad))
        for one, other in zip(eager.buffers(), twin.buffers(), strict=True):
            apart["buffer"] = max(apart["buffer"], _apart(one, other))
    breaks = sum(counters["graph_break"].values())
    return {"graphs": len(graphs), "largest": max(graphs), "breaks": breaks, "missing": missing, **apart}


def _apart(one: Tensor | None, other: Tensor | None) -> float:
    return float("nan") if one is None or other is None else (one.double() - other.double()).abs().max().item()


if __name__ == "__main__":
    td.init_process_group("gloo")
    made = {name: compare(**case) for name, case in CASES.items()}
    if td.get_rank() == 0:
        print(json.dumps(made))
    td.destroy_process_group()
