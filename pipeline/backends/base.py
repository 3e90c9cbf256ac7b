"""What the loader and a back end exchange: encoded batches in, batches of views out; and a back end's protocol.

One image's way has three containers: ``BatchIds`` (which samples; pipeline/sampling/sampler.py), ``Batch`` (their
encoded images and what to cut out of them) and ``ViewBatch`` (the finished views, as the training loop gets them).
"""

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

HeaderCheck = Callable[[NDArray[np.uint8]], "str | None"]  # (encoded image) -> why its header cannot be read


@dataclass(frozen=True)
class Batch:
    """Some samples of one step, read but not decoded."""

    epoch: int
    step: int  # within the epoch
    ids: Int64[np.ndarray, " n"]  # the samples that the order asked for
    sources: Int64[np.ndarray, " n"]  # the samples whose images these are: ids, except where one was bad
    encoded: list[NDArray[np.uint8]]  # n images as stored in the shards
    windows: ViewParams | CentreCrops  # what to cut out of each
    pair: int = 0  # as in BatchIds
    # Of each image why the back end's decoder cannot read its header, None if it can; None where nobody has looked
    header_faults: list[str | None] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def only(self, sample: int) -> Batch:
        """The batch of just one of its samples."""
        part = slice(sample, sample + 1)
        fields = {field.name: getattr(self.windows, field.name)[part] for field in dataclasses.fields(self.windows)}
        return dataclasses.replace(
            self,
            ids=self.ids[part],
            sources=self.sources[part],
            encoded=self.encoded[part],
            header_faults=None if self.header_faults is None else self.header_faults[part],
            windows=type(self.windows)(**fields),
        )


@dataclass(frozen=True)
class ViewBatch:
    """The views of some samples of one step: one rank's part of one micro-batch."""

    views: list[
        Float[Tensor, "_ _ _ _"]
    ]  # [n c s s] each, c = 3, in the recipe's order; normalised, channels-last in memory
    ids: Int64[np.ndarray, " n"]  # the samples that the order asked for
    sources: Int64[np.ndarray, " n"]  # the samples whose images these are: ids, except where one was bad
    epoch: int
    step: int  # within the epoch
    wait_s: float = 0.0  # how long the consumer waited for this batch, on the host
    pair: int = 0  # as in BatchIds

    @classmethod
    def of(cls, batch: Batch, views: list[Float[Tensor, "_ _ _ _"]]) -> ViewBatch:
        return cls(views, batch.ids, batch.sources, batch.epoch, batch.step, pair=batch.pair)

    @property
    def x1(self) -> Float[Tensor, "n c s s"]:
        return self.views[0]

    @property
    def x2(self) -> Float[Tensor, "n c s s"]:
        return self.views[1]


class UndecodableBatchError(Exception):
    """A back end could not decode a batch; which of its images is the cause is not known yet."""

    def __init__(self, batch: Batch, reason: str) -> None:
        super().__init__(reason)
        self.batch = batch
        self.reason = reason


@dataclass(frozen=True)
class DaliConfig:
    """How DALI works."""

    # Decoder on a GPU: mixed is nvJPEG with the hardware decoder, cpu is libjpeg-turbo.
    decoder: Literal["mixed", "cpu"] = "mixed"
    # Share of a batch for the hardware decoder [DALI].
    hw_decoder_load: float = 0.65
    # Set GPU memory aside at the start for images of this side in pixels; 0: it grows as needed.
    preallocate_side: int = 0
    # MiB of GPU memory that each decoding thread sets aside for the decoder that is not hardware; DALI's default
    device_memory_padding: int = 16
    host_memory_padding: int = 8  # MiB of pinned memory, twice for each decoding thread, for the same; DALI's default
    # Batches in DALI's own queue.
    prefetch: int = 2
    # Interpolate the colours of JPEGs on a GPU as PIL does; off, they are repeated, and views differ more from PIL's.
    smooth_chroma: bool = True

    def __post_init__(self) -> None:
        require(
            "--dali.hw-decoder-load", self.hw_decoder_load, 0 <= self.hw_decoder_load <= 1, "a share lies in 0 .. 1"
        )
        require("--dali.preallocate-side", self.preallocate_side, self.preallocate_side >= 0, "it is 0 px or more")
        for name in ("device_memory_padding", "host_memory_padding"):
            padding = getattr(self, name)
            require(f"--dali.{name.replace('_', '-')}", padding, padding >= 0, "it is 0 MiB or more")
        require("--dali.prefetch", self.prefetch, self.prefetch >= 1, "DALI's queue holds at least 1 batch")

    def describe_memory(self, max_batch: int, threads: int) -> str | None:
        """What the decoders of a GPU set aside for batches of ``max_batch`` images, for people; None for CPU decoding.

        The hardware decoder's part follows from nvImageCodec's source (0.9): it has not been measured.
        """
        if self.decoder == "cpu":
            return None
        hardware = round(self.hw_decoder_load * max_batch) * 3 * self.preallocate_side**2 / 1e9
        device, host = threads * self.device_memory_padding, 2 * threads * self.host_memory_padding
        sides = (
            f"{hardware:.1f} GB (--dali.preallocate-side)" if hardware else "no memory ahead (--dali.preallocate-side)"
        )
        return f"hardware decoder {sides}; the other {device} MiB and {host} MiB pinned (--dali.*-memory-padding)"


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
    """Each stage of a back end separately, for profiling only; training uses ``Backend.views``.

    Iterators end with their input; outputs stay on the device.
    """

    decode: Callable[[Iterator[Batch]], Iterator[object]]  # encoded images in, decoded ones out
    crop: Callable[[Iterator[Batch]], Iterator[Any]]  # decoded images in the place of encoded ones, squares out
    photometric: Callable[[Any, ViewParams], object]  # squares in, views out


@runtime_checkable  # for the tests, which check arguments
class Backend(Protocol):
    """One way to make views. It has no state of its own."""

    def views(self, context: BackendContext, batches: Iterator[Batch]) -> Iterator[ViewBatch]:
        """The views of each batch; the iterator raises UndecodableBatchError, after which it may go on."""

    def stages(self, context: BackendContext) -> BackendStages:
        """The stages as ``views`` sets them up."""

    def header_check(self) -> HeaderCheck | None:
        """What reading threads should ask of each image, so that ``views`` need not; None if nothing."""

    def release_memory(self) -> None:
        """Give back the memory that is kept for later use."""
