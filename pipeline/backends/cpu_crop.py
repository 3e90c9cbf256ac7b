"""Cuts the views out of decoded images on a CPU: crop and resize as torchvision does, in threads.

torch's antialiased resize of bytes costs a CPU far less than DALI's, and gives torchvision's bytes because it is what
torchvision calls. On a GPU DALI cuts, in the graph that decodes: see dali_backend.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import interpolate
from typing_extensions import assert_never

from pipeline.backends import reference
from pipeline.backends.base import Batch, UndecodableBatchError
from pipeline.backends.photometric import parts_of
from pipeline.common.buffers import Buffers
from pipeline.sampling.views import CentreCrops, Interpolation, ViewParams, ViewRecipe

SERIAL_SIDE = 64  # px; for views this small, GIL contention costs more than the parallelism gains
# Without AVX2 torchvision resizes in float32 and rounds.
BYTES_RESIZED_AS_SUCH = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
Decoded = tuple[Batch, list[UInt8[Tensor, "_ _ 3"]]]  # images of their own height and width


class CutSquares(Iterator[tuple[Batch, list[Tensor]]]):
    """An iterator over batches of cut squares: uint8 ``[n, s, s, 3]`` for each view, planar in memory."""

    def __init__(self, decoded: Iterator[Decoded], recipe: ViewRecipe, pool: ThreadPoolExecutor, threads: int) -> None:
        """``pool`` has ``threads`` workers."""
        self._decoded = decoded
        self._recipe = recipe
        self._pool = pool
        self._threads = threads
        self._buffers = Buffers(torch.uint8)

    def __next__(self) -> tuple[Batch, list[UInt8[Tensor, "n _ _ 3"]]]:
        """The next batch and its squares. Raises UndecodableBatchError, after which the iteration may go on."""
        batch, images = next(self._decoded)
        views = batch.windows.views if isinstance(batch.windows, ViewParams) else 1
        sides = [own.image_size for own in self._recipe.per_view[:views]]
        squares = [self._buffers.lend((len(batch), 3, side, side)) for side in sides]

        def cut(part: slice) -> None:
            for sample in range(part.start, part.stop):
                for view, square in enumerate(self._squares(batch, images[sample].permute(2, 0, 1), sample)):
                    squares[view][sample].copy_(square)

        try:
            if max(sides) <= SERIAL_SIDE:
                cut(slice(0, len(batch)))
            else:
                list(self._pool.map(cut, parts_of(len(batch), self._threads)))
        except ValueError as error:  # the image is not of the size that the windows were drawn for
            raise UndecodableBatchError(batch, str(error)) from error
        return batch, [square.permute(0, 2, 3, 1) for square in squares]

    def _squares(self, batch: Batch, image: UInt8[Tensor, "3 h w"], sample: int) -> Iterator[UInt8[Tensor, "3 _ _"]]:
        match batch.windows:
            case ViewParams() as params:
                for view in range(params.views):
                    own = self._recipe.per_view[view]
                    yield resized_crop(image, params, sample, view, own.image_size, own.interpolation)
            case CentreCrops() as crops:
                yield reference.centre_crop(image, crops, sample, self._recipe.image_size)
            case _:
                assert_never(batch.windows)


def resized_crop(
    image: UInt8[Tensor, "3 h w"],
    params: ViewParams,
    sample: int,
    view: int,
    image_size: int,
    interpolation: Interpolation = "bilinear",
) -> UInt8[Tensor, "3 s s"]:
    """The same bytes as ``reference.resized_crop``, without torchvision's overhead, the larger part on a small image.

    Raises ValueError as the reference does.
    """
    if not BYTES_RESIZED_AS_SUCH:
        return reference.resized_crop(image, params, sample, view, image_size, interpolation)
    top, left, height, width = params.crop[sample, view].tolist()
    reference.check_inside(image, top + height, left + width)
    window = image[:, top : top + height, left : left + width]
    return interpolate(window[None], (image_size, image_size), mode=interpolation, antialias=True)[0]
