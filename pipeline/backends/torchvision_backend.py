"""Owns the back end that is the reference itself, for machines without DALI: an image at a time in each thread."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from functools import partial

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from pipeline.backends import reference
from pipeline.backends.base import BackendContext, BackendOutput, BackendStages, Batch, UndecodableBatchError
from pipeline.backends.reference import centre_crop, decode, finish, normalise, transform
from pipeline.sampling.views import CentreCrops, ViewParams, ViewRecipe


class TorchvisionViews:
    """The back end: an iterator over batches and their views, an image at a time in each thread."""

    def __init__(
        self, batches: Iterator[Batch], recipe: ViewRecipe, pool: Executor, device: torch.device, dtype: torch.dtype
    ) -> None:
        """``dtype`` of the views, which are moved to ``device``."""
        self._batches = batches
        self._recipe = recipe
        self._pool = pool
        self._device = device
        self._dtype = dtype

    def __iter__(self) -> TorchvisionViews:
        """Itself."""
        return self

    def __next__(self) -> tuple[Batch, list[Float[Tensor, "n 3 s s"]]]:
        """The next batch and its views. Raises UndecodableBatchError, after which the iteration may go on."""
        batch = next(self._batches)
        try:
            samples = list(self._pool.map(lambda sample: self._views(batch, sample), range(len(batch))))
        except (OSError, ValueError, SyntaxError) as error:
            raise UndecodableBatchError(batch, str(error)) from error
        return batch, [
            torch.stack(view).to(self._device, self._dtype, memory_format=torch.channels_last)
            for view in zip(*samples, strict=True)
        ]

    def _views(self, batch: Batch, sample: int) -> list[Float32[Tensor, "3 s s"]]:
        image = decode(batch.encoded[sample].tobytes())
        recipe = self._recipe
        match batch.windows:
            case ViewParams() as params:
                views = range(params.views)
                return [finish(transform(image, params, sample, v, recipe), params, sample, v, recipe) for v in views]
            case CentreCrops() as crops:
                return [normalise(centre_crop(image, crops, sample, recipe.image_size), recipe)]


class TorchvisionBackend:
    """Decodes with PIL, and makes the views with torchvision."""

    def views(self, setup: BackendContext, batches: Iterator[Batch]) -> Iterator[BackendOutput]:
        """Batches and their views; the iterator raises UndecodableBatchError, after which it may go on."""
        return TorchvisionViews(batches, setup.recipe, setup.pool, setup.device, setup.dtype)

    def stages(self, setup: BackendContext) -> BackendStages:
        """The same work, stage by stage."""
        return BackendStages(partial(_decode, setup), partial(_crop, setup), partial(_photometric, setup))

    def release_memory(self) -> None:
        """It keeps none."""


def _decode(setup: BackendContext, batches: Iterator[Batch]) -> Iterator[list[Tensor]]:
    for batch in batches:
        yield list(setup.pool.map(lambda encoded: reference.decode(encoded.tobytes()), batch.encoded))


def _crop(setup: BackendContext, batches: Iterator[Batch]) -> Iterator[list[list[Tensor]]]:
    """The squares of each image."""
    for batch in batches:
        yield list(setup.pool.map(partial(_cut, setup, batch), range(len(batch))))


def _cut(setup: BackendContext, batch: Batch, sample: int) -> list[Tensor]:
    params = batch.windows
    assert isinstance(params, ViewParams)
    image = torch.as_tensor(batch.encoded[sample]).cpu().permute(2, 0, 1)
    side = setup.recipe.image_size
    return [reference.resized_crop(image, params, sample, view, side) for view in range(params.views)]


def _photometric(setup: BackendContext, squares: list[list[Tensor]], params: ViewParams) -> list[Tensor]:
    views = zip(*setup.pool.map(partial(_finish, setup, squares, params), range(len(params))), strict=True)
    return [torch.stack(view).to(setup.device, setup.dtype, memory_format=torch.channels_last) for view in views]


def _finish(setup: BackendContext, squares: list[list[Tensor]], params: ViewParams, sample: int) -> list[Tensor]:
    recipe, views = setup.recipe, []
    for view, square in enumerate(squares[sample]):
        coloured = reference.colour(square, params, sample, view)
        blurred = reference.blur_and_flip(coloured, params, sample, view, recipe)
        views.append(reference.finish(blurred, params, sample, view, recipe))
    return views
