"""Owns the batch as it travels from the shards to a back end: encoded images and where to cut them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.errors import require
from pipeline.sampling.views import CentreCrops, ViewParams, ViewRecipe


@dataclass(frozen=True)
class Batch:
    """Some samples of one step, read but not decoded."""

    epoch: int
    step: int  # within the epoch
    ids: Int64[np.ndarray, " n"]  # the samples that the order asked for
    sources: Int64[np.ndarray, " n"]  # whose images are seen: ids, but where one was bad
    encoded: list[NDArray[np.uint8]]  # n images as they lie in the shards
    windows: ViewParams | CentreCrops  # what to cut out of each

    def __len__(self) -> int:
        """Samples."""
        return len(self.ids)

    def only(self, sample: int) -> Batch:
        """The batch of just one of its samples."""
        part = slice(sample, sample + 1)
        fields = {field.name: getattr(self.windows, field.name)[part] for field in dataclasses.fields(self.windows)}
        windows = type(self.windows)(**fields)
        return Batch(self.epoch, self.step, self.ids[part], self.sources[part], self.encoded[part], windows)


class UndecodableBatchError(Exception):
    """A back end could not decode a batch; which of its images is to blame is not known yet."""

    def __init__(self, batch: Batch, reason: str) -> None:
        """``reason``: the back end's own message."""
        super().__init__(reason)
        self.batch = batch
        self.reason = reason


@dataclass(frozen=True)
class DaliConfig:
    """How DALI works."""

    decoder: Literal["mixed", "cpu"] = "mixed"  # on a GPU: nvJPEG and the hardware decoder, or the CPU
    hw_decoder_load: float = 0.65  # share of a batch for the hardware decoder (DALI's default)
    preallocate_side: int = 0  # px; GPU memory for images of this side is set aside at the start; 0: grows as needed
    prefetch: int = 2  # batches in DALI's own queue
    # On a GPU: interpolate the colours of JPEGs as PIL does; off, they are repeated, and views differ more from PIL's
    smooth_chroma: bool = True

    def __post_init__(self) -> None:
        """Raise UserError for numbers that DALI cannot work with."""
        require(
            "--dali.hw-decoder-load", self.hw_decoder_load, 0 <= self.hw_decoder_load <= 1, "a share lies in 0 .. 1"
        )
        require("--dali.preallocate-side", self.preallocate_side, self.preallocate_side >= 0, "it is 0 px or more")
        require("--dali.prefetch", self.prefetch, self.prefetch >= 1, "DALI's queue holds at least 1 batch")


BackendOutput = tuple[Batch, list[Float[Tensor, "n 3 s s"]]]


@dataclass(frozen=True)
class BackendContext:
    """What a back end works with."""

    recipe: ViewRecipe
    dali: DaliConfig
    max_batch: int  # images
    device: torch.device
    dtype: torch.dtype  # of the views
    pool: ThreadPoolExecutor  # of ``threads`` workers
    threads: int


@dataclass(frozen=True)
class BackendStages:
    """The stages of one back end. Iterators end with their input; what they give is kept on the device."""

    decode: Callable[[Iterator[Batch]], Iterator[object]]  # encoded images in, decoded ones out
    crop: Callable[[Iterator[Batch]], Iterator[Any]]  # decoded images in (see decoded_batch), squares out
    photometric: Callable[[Any, ViewParams], object]  # squares in, views out


@runtime_checkable  # for the tests, which check arguments
class Backend(Protocol):
    """One way to make views. It holds nothing itself."""

    def views(self, setup: BackendContext, batches: Iterator[Batch]) -> Iterator[BackendOutput]:
        """Batches and their views; the iterator raises UndecodableBatchError, after which it may go on."""

    def stages(self, setup: BackendContext) -> BackendStages:
        """The stages as ``views`` sets them up."""

    def release_memory(self) -> None:
        """Give back the memory that is kept for later use."""
