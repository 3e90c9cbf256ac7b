"""Owns memory of batches: used again, for a fresh batch costs as much in page faults as the work; and sent to a GPU."""

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


class HeldUntilRead:
    """Keeps a GPU's memory that another library would use again at once, until the queued work that reads it is done.

    torch's own tensors have ``record_stream`` for that; memory that came through DLPack is its owner's.
    """

    def __init__(self) -> None:
        """Holds nothing yet."""
        self._held: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    def keep(self, tensors: list[Tensor]) -> None:
        """Hold ``tensors`` until the current stream has done all that it was given so far; let go of earlier ones."""
        self._held.append((torch.cuda.current_stream().record_event(), tensors))
        while self._held and self._held[0][0].query():
            self._held.popleft()

    def __len__(self) -> int:
        """How many times something is held."""
        return len(self._held)


def on_device(values: NDArray, device: torch.device) -> Tensor:
    """A small array there: to a GPU through pinned memory, so that neither host nor stream waits for the copy."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
