"""The torchvision back end, for machines without DALI: the reference itself, one image at a time in each thread."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from functools import partial

import torch
from jaxtyping import Float32
from torch import Tensor

from pipeline.backends import reference
from pipeline.backends.base import BackendContext, BackendStages, Batch, UndecodableBatchError, ViewBatch
from pipeline.backends.reference import centre_crop, decode, finish, normalise, transform
from pipeline.sampling.views import CentreCrops, ViewParams, ViewRecipe


class TorchvisionViews(Iterator[ViewBatch]):
    """An iterator over batches of views, made one image at a time in each thread."""

    def __init__(
        self, batches: Iterator[Batch], recipe: ViewRecipe, pool: Executor, device: torch.device, dtype: torch.dtype
    ) -> None:
        """``dtype`` of the views, which are moved to ``device``."""
        self._batches = batches
        self._recipe = recipe
        self._pool = pool
        self._device = device
        self._dtype = dtype

    def __next__(self) -> ViewBatch:
        """The views of the next batch. Raises UndecodableBatchError, after which the iteration may go on."""
        batch = next(self._batches)
        try:
            samples = list(self._pool.map(lambda sample: self._views(batch, sample), range(len(batch))))
        except (OSError, ValueError, SyntaxError) as error:
            raise UndecodableBatchError(batch, str(error)) from error
        views = [
            torch.stack(view).to(self._device, self._dtype, memory_format=torch.channels_last)
            for view in zip(*samples, strict=True)
        ]
        return ViewBatch.of(batch, views)

    def _views(self, batch: Batch, sample: int) -> list[Float32[Tensor, "_ _ _"]]:
        image = decode(batch.encoded[sample].tobytes())
        recipe = self._recipe
        if len(image) != recipe.channels:
            raise ValueError(f"the image has {len(image)} channels, not {recipe.channels}")
        match batch.windows:
            case ViewParams() as params:
                views = range(params.views)
                return [finish(transform(image, params, sample, v, recipe), params, sample, v, recipe) for v in views]
            case CentreCrops() as crops:
                return [normalise(centre_crop(image, crops, sample, recipe.image_size), recipe)]


class TorchvisionBackend:
    """Decodes with PIL, and makes the views with torchvision."""

    def views(self, context: BackendContext, batches: Iterator[Batch]) -> Iterator[ViewBatch]:
        """The views of each batch; the iterator raises UndecodableBatchError, after which it may go on."""
        return TorchvisionViews(batches, context.recipe, context.pool, context.device, context.dtype)

    def stages(self, context: BackendContext) -> BackendStages:
        """The same work, stage by stage."""
        return BackendStages(partial(_decode, context), partial(_crop, context), partial(_photometric, context))

    def header_check(self) -> None:
        """Nothing: PIL refuses a broken image by itself."""

    def release_memory(self) -> None:
        """Nothing: it keeps none."""


def _decode(context: BackendContext, batches: Iterator[Batch]) -> Iterator[list[Tensor]]:
    for batch in batches:
        yield list(context.pool.map(lambda encoded: reference.decode(encoded.tobytes()), batch.encoded))


def _crop(context: BackendContext, batches: Iterator[Batch]) -> Iterator[list[list[Tensor]]]:
    for batch in batches:
        yield list(context.pool.map(partial(_cut, context, batch), range(len(batch))))


def _cut(context: BackendContext, batch: Batch, sample: int) -> list[Tensor]:
    params = batch.windows
    assert isinstance(params, ViewParams)
    image = torch.as_tensor(batch.encoded[sample]).cpu().permute(2, 0, 1)
    recipes = context.recipe.per_view[: params.views]
    return [
        reference.resized_crop(image, params, sample, view, own.image_size, own.interpolation)
        for view, own in enumerate(recipes)
    ]


def _photometric(context: BackendContext, squares: list[list[Tensor]], params: ViewParams) -> list[Tensor]:
    views = zip(*context.pool.map(partial(_finish, context, squares, params), range(len(params))), strict=True)
    return [torch.stack(view).to(context.device, context.dtype, memory_format=torch.channels_last) for view in views]


def _finish(context: BackendContext, squares: list[list[Tensor]], params: ViewParams, sample: int) -> list[Tensor]:
    recipe, views = context.recipe, []
    for view, square in enumerate(squares[sample]):
        changed = reference.change_bytes(square, params, sample, view, recipe)
        coloured = reference.colour(changed, params, sample, view)
        blurred = reference.blur_and_flip(coloured, params, sample, view, recipe)
        views.append(reference.finish(blurred, params, sample, view, recipe))
    return views
