"""Owns memory of batches: used again, for a fresh batch costs as much in page faults as the work; and sent to a GPU."""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
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


def on_device(values: NDArray, device: torch.device) -> Tensor:
    """A small array there: to a GPU through pinned memory, so that neither host nor stream waits for the copy."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
