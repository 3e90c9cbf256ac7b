"""Owns memory that is used again: a fresh batch costs as much in page faults as the work that is put into it."""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Lends tensors of one dtype; memory comes back when the last tensor that shares it is gone. Thread-safe."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Nothing is set aside before it is asked for."""
        self._dtype = torch.empty(0, dtype=dtype).numpy().dtype
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def lend(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape)
        with self._lock:
            free = self._free.setdefault(size, [])
            memory = free.pop() if free else np.empty(size, dtype=self._dtype)
        lease = memory[:]  # the tensor keeps this array alive, and nobody else does
        weakref.finalize(lease, free.append, memory).atexit = False
        return torch.from_numpy(lease).view(shape)
