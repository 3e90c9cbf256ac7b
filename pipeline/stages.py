"""Owns what every back end has in common: what it works with, what it makes, and its single stages, measured apart.

The stages are the loader's own parts, fed with what the stage before would give them; no training runs them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline import reference
from pipeline.batch import Batch
from pipeline.loader_config import LoaderConfig
from pipeline.views import ViewParams, ViewRecipe

Delivered = tuple[Batch, list[Float[Tensor, "n 3 s s"]]]


@dataclass(frozen=True)
class Setup:
    """What a back end works with."""

    recipe: ViewRecipe
    config: LoaderConfig
    max_batch: int  # pictures
    device: torch.device
    dtype: torch.dtype  # of the views
    pool: ThreadPoolExecutor  # of ``threads`` workers
    threads: int


@dataclass(frozen=True)
class Stages:
    """The stages of one back end. Iterators end with their input; what they give is kept on the device."""

    decode: Callable[[Iterator[Batch]], Iterator[object]]  # encoded pictures in, decoded ones out
    crop: Callable[[Iterator[Batch]], Iterator[Any]]  # decoded pictures in (see decoded_batch), squares out
    photometric: Callable[[Any, ViewParams], object]  # squares in, views out


@runtime_checkable  # for the tests, which check arguments
class Backend(Protocol):
    """One way to make views. It holds nothing itself."""

    def views(self, setup: Setup, batches: Iterator[Batch]) -> Iterator[Delivered]:
        """Batches and their views; the iterator raises UndecodableBatchError, after which it may go on."""

    def stages(self, setup: Setup) -> Stages:
        """The stages as ``views`` sets them up."""

    def release_memory(self) -> None:
        """Give back the memory that is kept for later use."""


def decoded_batch(batch: Batch, pool: ThreadPoolExecutor, device: torch.device) -> Batch:
    """The batch with its pictures decoded, uint8 ``[h, w, 3]``, where the crops want them."""
    pictures = pool.map(lambda encoded: reference.decode(encoded.tobytes()), batch.encoded)
    arrays = [picture.permute(1, 2, 0).contiguous() for picture in pictures]
    on_device = [array.to(device) if device.type == "cuda" else array.numpy() for array in arrays]
    return replace(batch, encoded=on_device)  # type: ignore[arg-type]
