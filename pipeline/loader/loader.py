"""The loader: order + bytes + view parameters + back end -> batches of views, made ahead of use by a thread.

``open_views`` for pretraining, ``open_crops`` for training with labels, ``open_images`` for evaluation. The wait of the
training loop for a batch is measured at every step: the host's wait (``ViewBatch.wait_s``), and on a GPU the further
wait of the model's stream (timing.py). Both together show whether the loop is bound by its data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from typing_extensions import assert_never

from pipeline.backends.base import ViewBatch
from pipeline.common.locations import Url, location
from pipeline.common.mixed_data import WeightedPlace
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.dataset.mixture import Dataset, Mixture
from pipeline.dataset.shard_store import PrefetchPlan
from pipeline.loader.bad_samples import BadSamples, print_bad_sample
from pipeline.loader.config import LoaderConfig
from pipeline.loader.producer import LoaderContext, produce
from pipeline.loader.timing import Stalls
from pipeline.sampling.mixture_order import MixtureOrder, MixturePart
from pipeline.sampling.order import Order, OrderConfig, choose_order, epoch_order
from pipeline.sampling.sampler import BatchIds, BatchSampler, World
from pipeline.sampling.views import PAIR_EPOCHS, CentreCrops, ViewParams, ViewRecipe, centre_crops, draw_views


def open_data(data: Path | Url | tuple[WeightedPlace, ...], config: LoaderConfig) -> Dataset:
    """What ``--data`` names: a dataset, or a mixture. Raises UserError as ``ShardSet.open`` and ``Mixture``."""
    if not isinstance(data, tuple):
        return open_dataset(data, config)
    return Mixture([open_dataset(part.place, config) for part in data], [part.weight for part in data])


def order_of(dataset: Dataset, config: OrderConfig, seed: int, global_batch: int) -> Order:
    """The order of an epoch's samples. Raises UserError for an order that the dataset cannot have."""
    if isinstance(dataset, ShardSet):
        return choose_order(config, seed, dataset.shard_samples, global_batch)
    samples = zip(dataset.parts, dataset.samples_per_epoch, strict=True)
    parts = [MixturePart(part.shard_samples, count) for part, count in samples]
    return MixtureOrder(parts, config, seed, global_batch)


def draws_of(
    recipe: ViewRecipe, seed: int, dataset: Dataset
) -> Callable[[BatchIds, Int64[np.ndarray, " n"]], ViewParams]:
    """(batch, sources) -> the views of samples ``sources`` in it."""

    def draw(batch: BatchIds, sources: Int64[np.ndarray, " n"]) -> ViewParams:
        epoch = dataset.draw_epochs(batch.epoch, batch.ids) + batch.pair * PAIR_EPOCHS
        return draw_views(recipe, seed, epoch, sources, dataset.sizes(sources))

    return draw


def open_dataset(path: str | Path | Url, config: LoaderConfig = LoaderConfig()) -> ShardSet:  # noqa: B008  # frozen
    """The dataset in a folder or below a URL. Raises UserError as ``ShardSet.open``."""
    place = location(path) if isinstance(path, str) else path
    return ShardSet.open(place, verify_checksums=config.verify_checksums, cache=config.cache)


def check_cache(dataset: Dataset, order: OrderConfig, config: LoaderConfig, global_batch: int, world: World) -> None:
    """Raise UserError if the cache of a remote dataset cannot hold what a machine reads at a time in this order."""
    if isinstance(dataset, Mixture):
        for part, count in zip(dataset.parts, dataset.samples_per_epoch, strict=True):
            check_cache(part, order, config, max(1, global_batch * count // dataset.epoch_samples), world)
        return
    match order.epoch_order:
        case "random":
            dataset.check_room(len(dataset.shards), "--epoch-order random", "take --epoch-order blocks")
        case "blocks":
            streams = -(-order.block_streams * world.local_world_size // world.world_size)
            samples = dataset.num_samples / len(dataset.shards) * order.block_shards  # of a group of shards
            steps = samples * order.block_streams / global_batch  # that a stream takes to read a group
            groups = 1 + math.ceil((config.max_steps_behind + 1) / steps)  # the one being read, and those around it
            reason = f"--epoch-order blocks, {streams} x {groups} groups of {order.block_shards} shards,"
            dataset.check_room(streams * groups * order.block_shards, reason, "take fewer --block-shards")
        case _:
            assert_never(order.epoch_order)


@contextmanager
def open_views(
    dataset: Dataset,
    recipe: ViewRecipe,
    config: LoaderConfig,
    sampler: BatchSampler,
    world: World,
    *,
    dtype: torch.dtype = torch.float32,
    order: OrderConfig = OrderConfig(),  # noqa: B008  # frozen
    on_bad_sample: Callable[[BadSampleError], None] = print_bad_sample,
    bad_samples_file: Path | None = None,
    pairs: int = 1,
    give_up: Callable[[], bool] = lambda: False,
    stalls: Stalls | None = None,
) -> Iterator[Iterator[ViewBatch]]:
    """The views that one process sees in the steps of a sampler: ``ViewBatch.views`` holds all views of the recipe.

    Each step comes as ``sampler.accumulate`` micro-batches of ``sampler.micro_batch`` samples, each of them ``pairs``
    times in a row with other views. ``on_bad_sample`` and ``bad_samples_file``: ``report`` and ``file`` of BadSamples.
    ``stalls`` records how long the GPU waited. The iterator raises UserError when too many samples are bad, and
    StarvedError if ``give_up`` returns True while it waits for a batch.
    """
    sample_ids = order_of(dataset, order, sampler.seed, sampler.global_batch)

    def batches() -> Iterator[BatchIds]:
        for batch in sampler.batches(dataset.epoch_samples, sample_ids, world):
            for pair in range(pairs):
                yield batch._replace(pair=pair)

    draw = draws_of(recipe, sampler.seed, dataset)
    plan = PrefetchPlan(sampler.machine_ids(dataset.epoch_samples, sample_ids, world), world.local_rank)
    limit, first = config.max_bad_samples, dataset.first_samples
    bad = BadSamples(dataset.num_samples, limit, on_bad_sample, bad_samples_file, first)
    fixed = (dataset, recipe, config, sampler.micro_batch(world.world_size), world, dtype, bad)
    with produce(LoaderContext(*fixed, give_up, stalls), draw, batches, plan) as made:
        yield made


@contextmanager
def open_crops(
    dataset: ShardSet,
    recipe: ViewRecipe,
    config: LoaderConfig,
    sampler: BatchSampler,
    world: World,
    *,
    ids: Int64[np.ndarray, " n"],
    dtype: torch.dtype = torch.float32,
    on_bad_sample: Callable[[BadSampleError], None] = print_bad_sample,
) -> Iterator[Iterator[ViewBatch]]:
    """The first view of each of samples ``ids`` an epoch, for training with labels; otherwise as ``open_views``.

    The labels of a batch are those of its ``sources``.
    """
    first = replace(recipe, count=1, more_views=())

    def sample_ids(epoch: int, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        return ids[epoch_order(len(ids), sampler.seed, epoch, positions)]

    def batches() -> Iterator[BatchIds]:
        return sampler.batches(len(ids), sample_ids, world)

    def draw(batch: BatchIds, sources: Int64[np.ndarray, " n"]) -> ViewParams:
        return draw_views(first, sampler.seed, batch.epoch, sources, dataset.sizes(sources))

    plan = PrefetchPlan(sampler.machine_ids(len(ids), sample_ids, world), world.local_rank)
    bad = BadSamples(dataset.num_samples, config.max_bad_samples, on_bad_sample)
    context = LoaderContext(dataset, first, config, sampler.micro_batch(world.world_size), world, dtype, bad)
    with produce(context, draw, batches, plan) as made:
        yield made


@contextmanager
def open_images(
    dataset: ShardSet,
    recipe: ViewRecipe,
    config: LoaderConfig,
    world: World,
    *,
    ids: Int64[np.ndarray, " n"],
    batch: int,
    dtype: torch.dtype = torch.float32,
    on_bad_sample: Callable[[BadSampleError], None] = print_bad_sample,
) -> Iterator[Iterator[tuple[Float[Tensor, "b c s s"], Int64[np.ndarray, " b"]]]]:
    """The evaluation view of samples ``ids``, all of them and in that order: (x, ids). The last batch is smaller."""

    def parts() -> Iterator[Int64[np.ndarray, "_"]]:  # noqa: F821
        return (ids[start : start + batch] for start in range(0, len(ids), batch))

    def batches() -> Iterator[BatchIds]:
        return (BatchIds(0, step, part) for step, part in enumerate(parts()))

    def draw(_: BatchIds, sources: Int64[np.ndarray, " n"]) -> CentreCrops:
        return centre_crops(recipe.image_size, dataset.sizes(sources))

    plan = PrefetchPlan(parts(), None) if dataset.worth_fetching_whole(ids) else None
    bad = BadSamples(dataset.num_samples, config.max_bad_samples, on_bad_sample)
    with produce(LoaderContext(dataset, recipe, config, batch, world, dtype, bad), draw, batches, plan) as made:
        yield ((part.views[0], part.ids) for part in made)
