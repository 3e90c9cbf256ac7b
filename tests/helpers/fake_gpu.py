"""Runs training steps on fake CUDA tensors, without a GPU, and refuses what no CUDA graph can hold.

Fake tensors have shapes, dtypes and devices but no values: what needs a value on the host raises. torch's engine for
backward passes asks for a real GPU, so ``backward`` walks the same graph in Python.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.recorded_graph import WAITING
from train.engine import step as step_module
from train.monitoring.progress import GpuProgress

GPU = torch.device("cuda", 0)
aten = torch.ops.aten


class NoWaiting(TorchDispatchMode):
    """Refuses operations that make the host wait, whose shapes follow from data, or that copy between host and GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        if func in WAITING:
            raise AssertionError(f"the host would wait: {func}")
        made = _KERNELS[func](*args, **kwargs) if func in _KERNELS else func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)]
        copies = func in (aten._to_copy.default, aten.copy_.default)
        if len({tensor.device.type for tensor in tensors if copies or tensor.dim() > 0}) > 1:
            raise AssertionError(f"a copy between host and GPU: {func}")
        return made


def _statistics(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    made = x.new_empty(x.shape[1], dtype=torch.float32)
    return made, torch.empty_like(made)


def _sums(slope: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *_statistics(x), *_statistics(x)


# Kernels of torch's SyncBatchNorm, which have no fake counterpart
_KERNELS = {
    aten.batch_norm_stats.default: _statistics,
    aten.batch_norm_gather_stats_with_counts.default: _statistics,
    aten.batch_norm_elemt.out: lambda *_, out: out,
    aten.batch_norm_backward_reduce.default: _sums,
    aten.batch_norm_backward_elemt.default: lambda slope, *_: torch.empty_like(slope),
    # and of its fused optimizers
    aten._fused_sgd_.default: lambda *_, **__: None,
    aten._fused_sgd_.tensor_lr: lambda *_, **__: None,
    aten._fused_adamw_.default: lambda *_, **__: None,
    aten._fused_adamw_.tensor_lr: lambda *_, **__: None,
}


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """As ``loss.backward()`` on one process: each node once, when the gradients of all that uses it are there."""
    assert loss.grad_fn is not None
    uses: dict[Any, int] = defaultdict(int)
    seen, waiting = {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
    gradients: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    gradients[loss.grad_fn][0] = torch.ones_like(loss)
    ready = [loss.grad_fn]
    while ready:
        node = ready.pop()
        own = gradients.pop(node, {})
        if hasattr(node, "variable"):  # a parameter
            if own:
                variable = node.variable
                variable.grad = own[0] if variable.grad is None else variable.grad + own[0]
            continue
        made: Any = [None] * len(node.next_functions)
        if own:
            given = [own.get(place) for place in range(max(own) + 1)]
            made = node.apply(*given) if isinstance(node, torch.autograd.function.BackwardCFunction) else node(*given)
            made = made if isinstance(made, tuple) else (made,)
        for (later, place), gradient in zip(node.next_functions, made, strict=False):
            if later is None:
                continue
            if gradient is not None:
                expected = later._input_metadata[place]
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
                former = gradients[later].get(place)
                gradients[later][place] = gradient if former is None else former + gradient
            uses[later] -= 1
            if uses[later] == 0:
                ready.append(later)


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Inside, tensors are fake, and ``GPU`` is a device that they can be on."""
    with monkeypatch.context() as patch, FakeTensorMode() as mode:
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setattr(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor)
        patch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
        patch.setattr(step_module, "GpuProgress", lambda device: GpuProgress(torch.device("cpu")))
        yield mode
