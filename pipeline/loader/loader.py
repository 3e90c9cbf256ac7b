"""Owns the loader: order + bytes + parameters + back end -> views, fed ahead by a thread.

How long the training loop waits for a batch is measured at every step: the host's wait (``wait_s``), and on a GPU what
the model's stream waits after that (stalls.py). Both together are the proof that the loop is not bound by its data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from typing_extensions import assert_never

from pipeline.common.locations import Url
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.dataset.remote_shards import PrefetchPlan
from pipeline.loader.bad_samples import print_bad_sample
from pipeline.loader.config import LoaderConfig
from pipeline.loader.producer import PAIR_EPOCHS, LoaderContext, deliver_ahead, max_steps_behind
from pipeline.loader.timing import ReadCosts, Stalls
from pipeline.sampling.order import OrderConfig, choose_order, epoch_order
from pipeline.sampling.sampler import BatchIds, BatchSampler, World
from pipeline.sampling.views import CentreCrops, ViewParams, ViewRecipe, centre_crops, draw_views


@dataclass(frozen=True)
class ViewBatch:
    """One rank's part of one micro-batch, in two views."""

    x1: Float[Tensor, "n 3 s s"]  # normalised, channels-last in memory
    x2: Float[Tensor, "n 3 s s"]
    ids: Int64[np.ndarray, " n"]  # the samples that the order asked for
    sources: Int64[np.ndarray, " n"]  # the samples that are seen: ids, but where an image was bad
    epoch: int
    step: int  # within the epoch
    wait_s: float  # how long the consumer waited for this batch, on the host
    pair: int = 0  # which pair of views of these samples, where there are several


@dataclass(frozen=True)
class Crops:
    """One rank's part of one micro-batch, each sample once."""

    x: Float[Tensor, "n 3 s s"]  # normalised, channels-last in memory
    sources: Int64[np.ndarray, " n"]  # the samples that are seen, whose labels belong to x
    epoch: int
    step: int  # within the epoch
    wait_s: float  # how long the consumer waited for this batch


def open_dataset(path: Path | Url, config: LoaderConfig) -> ShardSet:
    """The dataset in a folder or below a URL. Raises UserError as ``ShardSet.open``."""
    return ShardSet.open(path, verify_checksums=config.verify_checksums, cache=config.cache)


def check_cache(
    dataset: ShardSet,
    order: OrderConfig,
    config: LoaderConfig,
    global_batch: int,
    world: World,
) -> None:
    """Raise UserError if the cache of a remote dataset cannot hold what a machine reads at a time in this order."""
    match order.epoch_order:
        case "random":
            dataset.check_room(len(dataset.shards), "--epoch-order random", "take --epoch-order blocks")
        case "blocks":
            streams = -(-order.block_streams * world.local_world_size // world.world_size)
            samples = dataset.num_samples / len(dataset.shards) * order.block_shards  # of a group of shards
            steps = samples * order.block_streams / global_batch  # that a stream takes to read a group
            groups = 1 + math.ceil(
                (max_steps_behind(config) + 1) / steps
            )  # the one being read, and those that end or begin
            reason = f"--epoch-order blocks, {streams} x {groups} groups of {order.block_shards} shards,"
            dataset.check_room(streams * groups * order.block_shards, reason, "take fewer --block-shards")
        case _:
            assert_never(order.epoch_order)


@contextmanager
def open_views(
    dataset: ShardSet,
    recipe: ViewRecipe,
    config: LoaderConfig,
    sampler: BatchSampler,
    world: World,
    *,
    dtype: torch.dtype = torch.float32,
    order: OrderConfig = OrderConfig(),  # noqa: B008  # frozen
    on_bad_sample: Callable[[BadSampleError], None] = print_bad_sample,
    pairs: int = 1,
    read_costs: ReadCosts | None = None,
    give_up: Callable[[], bool] = lambda: False,
    stalls: Stalls | None = None,
) -> Iterator[Iterator[ViewBatch]]:
    """The views that one process sees in the steps of a sampler.

    Each step comes as ``sampler.accumulate`` micro-batches of ``sampler.micro_batch`` samples, each of them ``pairs``
    times in a row with other views. ``read_costs`` records how long each shard's reads took, ``stalls`` how long the
    GPU waited. The iterator raises UserError when too many samples are bad, and StarvedError if ``give_up`` returns
    True while it waits for a batch.
    """
    sample_ids = choose_order(order, sampler.seed, dataset.shard_samples, sampler.global_batch)

    def places() -> Iterator[BatchIds]:
        for epoch, step, ids in sampler.places(dataset.num_samples, sample_ids, world):
            for pair in range(pairs):
                yield epoch + pair * PAIR_EPOCHS, step, ids

    def draw(epoch: int, ids: Int64[np.ndarray, " n"]) -> ViewParams:
        return draw_views(recipe, sampler.seed, epoch, ids, dataset.sizes(ids))

    ahead = PrefetchPlan(sampler.of_machine(dataset.num_samples, sample_ids, world), world.local_rank)
    max_batch = sampler.micro_batch(world.world_size)
    fixed = (dataset, recipe, config, max_batch, world, dtype, on_bad_sample)
    with deliver_ahead(LoaderContext(*fixed, read_costs, give_up, stalls), draw, places, ahead) as delivered:
        yield (
            ViewBatch(x1, x2, batch.ids, batch.sources, epoch, batch.step, wait_s, pair)
            for (batch, (x1, x2)), wait_s in delivered
            for pair, epoch in [divmod(batch.epoch, PAIR_EPOCHS)]
        )


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
) -> Iterator[Iterator[Crops]]:
    """One random view of each of samples ``ids`` an epoch, for training with labels; otherwise as ``open_views``."""

    def sample_ids(epoch: int, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        return ids[epoch_order(len(ids), sampler.seed, epoch, positions)]

    def places() -> Iterator[BatchIds]:
        return sampler.places(len(ids), sample_ids, world)

    def draw(epoch: int, sources: Int64[np.ndarray, " n"]) -> ViewParams:
        return draw_views(recipe, sampler.seed, epoch, sources, dataset.sizes(sources)).only_view(0)

    ahead = PrefetchPlan(sampler.of_machine(len(ids), sample_ids, world), world.local_rank)
    settings = LoaderContext(
        dataset, recipe, config, sampler.micro_batch(world.world_size), world, dtype, on_bad_sample
    )
    with deliver_ahead(settings, draw, places, ahead) as delivered:
        yield (Crops(x, batch.sources, batch.epoch, batch.step, wait_s) for (batch, (x,)), wait_s in delivered)


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
) -> Iterator[Iterator[tuple[Float[Tensor, "b 3 s s"], Int64[np.ndarray, " b"]]]]:
    """The evaluation view of samples ``ids``, all of them and in that order: (x, ids). The last batch is smaller."""

    def batches() -> Iterator[Int64[np.ndarray, "_"]]:  # noqa: F821
        return (ids[start : start + batch] for start in range(0, len(ids), batch))

    def places() -> Iterator[BatchIds]:
        return ((0, step, part) for step, part in enumerate(batches()))

    def draw(_: int, sources: Int64[np.ndarray, " n"]) -> CentreCrops:
        return centre_crops(recipe.image_size, dataset.sizes(sources))

    settings = LoaderContext(dataset, recipe, config, batch, world, dtype, on_bad_sample)
    with deliver_ahead(
        settings, draw, places, PrefetchPlan(batches(), None) if dataset.worth_fetching_whole(ids) else None
    ) as delivered:
        yield ((x, part.ids) for (part, (x,)), _ in delivered)
