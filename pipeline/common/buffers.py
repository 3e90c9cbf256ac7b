"""Reuses batch buffers: page faults on fresh memory cost as much as the transforms. Also: pinned copies to a GPU."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Buffers:
    """Lends tensors of one dtype; memory is reused once the last tensor that shares it is freed. Thread-safe."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = torch.empty(0, dtype=dtype).numpy().dtype
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def lend(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        with self._lock:
            free = self._free.setdefault(size, [])
            memory = free.pop() if free else np.empty(size, dtype=self._dtype)
        lease = memory[:]  # only the tensor keeps this array alive
        weakref.finalize(lease, free.append, memory).atexit = False
        return torch.from_numpy(lease).view(shape)


class HeldUntilRead:
    """Keeps GPU memory of another library until the queued work that reads it is done.

    torch's own tensors have ``record_stream`` for that; memory that came through DLPack would be reused at once.
    """

    def __init__(self) -> None:
        self._held: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    def keep(self, tensors: list[Tensor]) -> None:
        """Hold ``tensors`` until the current stream has done its queued work; release earlier ones that are done."""
        self._held.append((torch.cuda.current_stream().record_event(), tensors))
        while self._held and self._held[0][0].query():
            self._held.popleft()

    def __len__(self) -> int:
        return len(self._held)


def on_device(values: NDArray, device: torch.device) -> Tensor:
    """A small array as a tensor on ``device``; to a GPU through pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
