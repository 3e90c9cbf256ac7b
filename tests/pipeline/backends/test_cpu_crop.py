"""What the CPU cuts out of images is what torchvision cuts, byte for byte, from DALI's images or anyone's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipeline.backends import reference
from pipeline.backends.base import Batch, UndecodableBatchError
from pipeline.backends.cpu_crop import CutSquares
from pipeline.dataset.dataset import ShardSet
from pipeline.sampling.views import ViewGroup, ViewParams, ViewRecipe, centre_crops, draw_views
from tests.helpers.encoded import batch_of
from tests.helpers.photos import image_bytes

SIDE = 40
RECIPE = ViewRecipe(image_size=SIDE)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


def decoded(batch: Batch) -> tuple[Batch, list[torch.Tensor]]:
    return batch, [reference.decode(data.tobytes()).permute(1, 2, 0).contiguous() for data in batch.encoded]


def photo_batch(dataset: ShardSet, side: int, centre: bool) -> Batch:
    ids = np.arange(dataset.num_samples)
    sizes, encoded = dataset.sizes(ids), [np.frombuffer(dataset.read(sample), np.uint8) for sample in ids]
    recipe = ViewRecipe(image_size=side)
    return Batch(0, 0, ids, ids, encoded, centre_crops(side, sizes) if centre else draw_views(recipe, 1, 0, ids, sizes))


@pytest.mark.parametrize("side", [16, 32, 96])
def test_views_are_the_references(side: int, photo_dataset: ShardSet, pool: ThreadPoolExecutor) -> None:
    batch, images = decoded(photo_batch(photo_dataset, side, centre=False))
    delivered, squares = next(CutSquares(iter([(batch, images)]), ViewRecipe(image_size=side), pool, 2))
    assert delivered is batch
    assert len(squares) == 2
    assert isinstance(batch.windows, ViewParams)
    for view, made in enumerate(squares):
        assert made.shape == (len(batch), side, side, 3)
        for sample, image in enumerate(images):
            expected = reference.resized_crop(image.permute(2, 0, 1), batch.windows, sample, view, side)
            assert torch.equal(made[sample].permute(2, 0, 1), expected)


@pytest.mark.parametrize("side", [16, 32, 96])
def test_centre_crops_are_the_references(side: int, photo_dataset: ShardSet, pool: ThreadPoolExecutor) -> None:
    batch, images = decoded(photo_batch(photo_dataset, side, centre=True))
    _, (made,) = next(CutSquares(iter([(batch, images)]), ViewRecipe(image_size=side), pool, 2))
    for sample, image in enumerate(images):
        expected = reference.centre_crop(image.permute(2, 0, 1), batch.windows, sample, side)
        assert torch.equal(made[sample].permute(2, 0, 1), expected)


@pytest.mark.parametrize("centre", [False, True])
def test_an_image_smaller_than_its_windows_is_noticed_and_the_next_batch_comes(
    centre: bool, photo_dataset: ShardSet, pool: ThreadPoolExecutor
) -> None:
    batch, images = decoded(photo_batch(photo_dataset, SIDE, centre))
    smaller = [*images]
    smaller[7] = images[7][:-9, :-9]
    if not centre:
        batch.windows.crop[7, 1] = [0, 0, *images[7].shape[:2]]
    squares = CutSquares(iter([(batch, smaller), (batch, images)]), RECIPE, pool, 2)
    with pytest.raises(UndecodableBatchError, match=r"less than samples\.npy says") as caught:
        next(squares)
    assert caught.value.batch is batch
    assert next(squares)[0] is batch
    assert next(squares, None) is None


def test_squares_stay_as_they_were_while_later_batches_come(pool: ThreadPoolExecutor) -> None:
    batches = [batch_of([image_bytes(10 * step + i) for i in range(4)], RECIPE, step=step) for step in range(8)]
    squares = CutSquares(map(decoded, batches), RECIPE, pool, 2)
    held = [next(squares)[1] for _ in range(3)]
    copies = [[square.clone() for square in views] for views in held]
    list(squares)
    for views, copied in zip(held, copies, strict=True):
        for view, copy in zip(views, copied, strict=True):
            assert torch.equal(view, copy)


def test_memory_is_used_again(pool: ThreadPoolExecutor) -> None:
    batches = [batch_of([image_bytes(i) for i in range(4)], RECIPE) for _ in range(6)]
    places = set()
    for _, squares in CutSquares(map(decoded, batches), RECIPE, pool, 2):
        places.update(square.data_ptr() for square in squares)
        del squares
    assert len(places) <= 4


def test_groups_of_views_are_the_references(photo_dataset: ShardSet, pool: ThreadPoolExecutor) -> None:
    """Views of several sizes and interpolations from one decoded image."""
    ids = np.arange(photo_dataset.num_samples)
    encoded = [np.frombuffer(photo_dataset.read(sample), np.uint8) for sample in ids]
    small = ViewGroup(count=3, image_size=24, crop_scale=(0.05, 0.14))
    recipe = ViewRecipe(image_size=80, interpolation="bicubic", more_views=(small, ViewGroup(interpolation="bilinear")))
    params = draw_views(recipe, 1, 0, ids, photo_dataset.sizes(ids))
    batch, images = decoded(Batch(0, 0, ids, ids, encoded, params))
    _, squares = next(CutSquares(iter([(batch, images)]), recipe, pool, 2))
    assert [made.shape[1] for made in squares] == [80, 80, 24, 24, 24, 80]
    kinds = ["bicubic"] * 5 + ["bilinear"]
    for view, (made, kind) in enumerate(zip(squares, kinds, strict=True)):
        for sample, image in enumerate(images):
            top, left, height, width = params.crop[sample, view].tolist()
            size, mode = [made.shape[1]] * 2, InterpolationMode(kind)
            expected = F.resized_crop(image.permute(2, 0, 1), top, left, height, width, size, mode, antialias=True)
            assert torch.equal(made[sample].permute(2, 0, 1), expected)
