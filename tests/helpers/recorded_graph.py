"""A CUDA graph in small, on a CPU: records the operations of a piece of work and runs them again on the same memory.

As with a CUDA graph, Python does not run again, numbers that it has computed stay what they were, and what is recorded
is not computed until it is replayed. An operation that a capture forbids is an error here, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# The host would wait for the result, or the result's shape would follow from the data.
WAITING = {
    aten._local_scalar_dense.default,
    aten.item.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}


def storages(values: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


class Recorder(TorchDispatchMode):
    """Every operation in order, with arguments and results; and what the memory that they were given held before."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # storage -> memory as bytes, its values before
        self._made: set[int] = set()  # storages that the work itself has made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        known = storages((args, kwargs))
        for tensor in (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
            place = tensor.untyped_storage().data_ptr()
            if place not in self._made and place not in self.before:  # batch norm writes, and its schema hides it
                memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self.before[place] = memory, memory.clone()
        out = func(*args, **kwargs)
        self._made |= storages(out) - known
        self.operations.append((func, args, kwargs, out))
        return out


def record(work: Callable[[], None], pool: Any) -> Callable[[], None]:
    """As ``capture_on_gpu``."""
    with Recorder() as recorder:
        work()
    for memory, values in recorder.before.values():
        memory.copy_(values)

    @torch.no_grad()
    def replay() -> None:
        for func, args, kwargs, out in recorder.operations:
            known = storages((args, kwargs))
            for former, now in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(former, Tensor) and former.untyped_storage().data_ptr() not in known:
                    former.copy_(now)

    return replay
