"""Owns the back end that is the reference itself, for machines without DALI: a picture at a time in each thread."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from pipeline import reference
from pipeline.batch import Batch
from pipeline.stages import Delivered, Setup, Stages
from pipeline.views import ViewParams


class TorchvisionBackend:
    """Decodes with PIL, and makes the views with torchvision."""

    def views(self, setup: Setup, batches: Iterator[Batch]) -> Iterator[Delivered]:
        """Batches and their views; the iterator raises UndecodableBatchError, after which it may go on."""
        return reference.TorchvisionViews(batches, setup.recipe, setup.pool, setup.device, setup.dtype)

    def stages(self, setup: Setup) -> Stages:
        """The same work, stage by stage."""
        return Stages(partial(_decode, setup), partial(_crop, setup), partial(_photometric, setup))

    def release_memory(self) -> None:
        """It keeps none."""


def _decode(setup: Setup, batches: Iterator[Batch]) -> Iterator[list[Tensor]]:
    for batch in batches:
        yield list(setup.pool.map(lambda encoded: reference.decode(encoded.tobytes()), batch.encoded))


def _crop(setup: Setup, batches: Iterator[Batch]) -> Iterator[list[list[Tensor]]]:
    """The squares of each picture."""
    for batch in batches:
        yield list(setup.pool.map(partial(_cut, setup, batch), range(len(batch))))


def _cut(setup: Setup, batch: Batch, sample: int) -> list[Tensor]:
    params = batch.windows
    assert isinstance(params, ViewParams)
    picture = torch.as_tensor(batch.encoded[sample]).cpu().permute(2, 0, 1)
    side = setup.recipe.image_size
    return [reference.resized_crop(picture, params, sample, view, side) for view in range(params.views)]


def _photometric(setup: Setup, squares: list[list[Tensor]], params: ViewParams) -> list[Tensor]:
    views = zip(*setup.pool.map(partial(_finish, setup, squares, params), range(len(params))), strict=True)
    return [torch.stack(view).to(setup.device, setup.dtype, memory_format=torch.channels_last) for view in views]


def _finish(setup: Setup, squares: list[list[Tensor]], params: ViewParams, sample: int) -> list[Tensor]:
    recipe, views = setup.recipe, []
    for view, square in enumerate(squares[sample]):
        coloured = reference.colour(square, params, sample, view)
        blurred = reference.blur_and_flip(coloured, params, sample, view, recipe)
        views.append(reference.finish(blurred, params, sample, view, recipe))
    return views
