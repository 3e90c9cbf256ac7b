"""Owns single stages of a back end, to be measured apart: decode alone, crops alone, the photometric stage alone.

They are the loader's own parts, fed with what the stage before would give them. Nothing here is part of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import assert_never

from pipeline import reference
from pipeline.backends import choose_backend
from pipeline.batch import Batch
from pipeline.cut import CutSquares
from pipeline.loader_config import LoaderConfig
from pipeline.photometric import Photometric
from pipeline.views import ViewParams, ViewRecipe


@dataclass(frozen=True)
class Stages:
    """The stages of one back end. Iterators end with their input; what they give is kept on the device."""

    decode: Callable[[Iterator[Batch]], Iterator[object]]  # encoded pictures in, decoded ones out
    crop: Callable[[Iterator[Batch]], Iterator[Any]]  # decoded pictures in (see decoded_batch), squares out
    photometric: Callable[[Any, ViewParams], object]  # squares in, views out


def open_stages(
    recipe: ViewRecipe,
    config: LoaderConfig,
    *,
    max_batch: int,
    device: torch.device,
    dtype: torch.dtype,
    pool: ThreadPoolExecutor,
    threads: int,
) -> Stages:
    """The stages as the loader would set them up. ``pool`` has ``threads`` workers."""
    backend, _ = choose_backend(config.backend)
    match backend:
        case "dali":
            from pipeline.dali import DaliCrops, DaliPictures

            settings = (max_batch, threads, device, config.dali)

            def crop(batches: Iterator[Batch]) -> Iterator[Any]:
                if device.type == "cuda":
                    return (squares for _, squares in DaliCrops(batches, recipe.image_size, *settings))
                decoded = ((batch, [torch.from_numpy(picture) for picture in batch.encoded]) for batch in batches)
                return (squares for _, squares in CutSquares(decoded, recipe.image_size, pool, threads))

            return Stages(
                decode=lambda batches: DaliPictures(batches, *settings),
                crop=crop,
                photometric=Photometric(recipe, device, dtype, pool, threads),
            )
        case "torchvision":
            return _torchvision_stages(recipe, pool, device, dtype)
        case _:
            assert_never(backend)


def release_memory(config: LoaderConfig) -> None:
    """Let the back end give back the memory that it keeps for later use."""
    backend, _ = choose_backend(config.backend)
    match backend:
        case "dali":
            from pipeline.dali import release_unused_memory

            release_unused_memory()
        case "torchvision":
            pass  # keeps none
        case _:
            assert_never(backend)


def decoded_batch(batch: Batch, pool: ThreadPoolExecutor, device: torch.device) -> Batch:
    """The batch with its pictures decoded, uint8 ``[h, w, 3]``, where the crops want them."""
    pictures = pool.map(lambda encoded: reference.decode(encoded.tobytes()), batch.encoded)
    arrays = [picture.permute(1, 2, 0).contiguous() for picture in pictures]
    on_device = [array.to(device) if device.type == "cuda" else array.numpy() for array in arrays]
    return replace(batch, encoded=on_device)  # type: ignore[arg-type]


def _torchvision_stages(
    recipe: ViewRecipe, pool: ThreadPoolExecutor, device: torch.device, dtype: torch.dtype
) -> Stages:
    def decode(batches: Iterator[Batch]) -> Iterator[object]:
        for batch in batches:
            yield list(pool.map(lambda encoded: reference.decode(encoded.tobytes()), batch.encoded))

    def crop(batches: Iterator[Batch]) -> Iterator[list[list[Tensor]]]:
        for batch in batches:
            yield list(pool.map(partial(cut, batch), range(len(batch))))

    def cut(batch: Batch, sample: int) -> list[Tensor]:
        assert isinstance(batch.windows, ViewParams)
        picture = torch.as_tensor(batch.encoded[sample]).cpu().permute(2, 0, 1)
        views = range(batch.windows.views)
        return [reference.resized_crop(picture, batch.windows, sample, view, recipe.image_size) for view in views]

    def photometric(squares: list[list[Tensor]], params: ViewParams) -> object:
        def finish(sample: int) -> list[Tensor]:
            return [
                reference.finish(
                    reference.blur_and_flip(
                        reference.colour(square, params, sample, view), params, sample, view, recipe
                    ),
                    params,
                    sample,
                    view,
                    recipe,
                )
                for view, square in enumerate(squares[sample])
            ]

        views = zip(*pool.map(finish, range(len(params))), strict=True)
        return [torch.stack(view).to(device, dtype, memory_format=torch.channels_last) for view in views]

    return Stages(decode, crop, photometric)
