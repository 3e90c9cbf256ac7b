"""Owns the loader: order + bytes + parameters + back end -> views, fed ahead by a thread.

How long the training loop waits for a batch is measured at every step: the host's wait (``wait_s``), and on a GPU what
the model's stream waits after that (stalls.py). Both together are the proof that the loop is not bound by its data.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from typing_extensions import assert_never

from pipeline.assemble import Place
from pipeline.delivery import PAIR_EPOCHS, Settings, deliver_ahead, slack
from pipeline.loader_config import LoaderConfig
from pipeline.location import Url
from pipeline.order import (
    OrderConfig,
    batch_positions,
    choose_order,
    epoch_order,
    node_positions,
    rank_slice,
    steps_per_epoch,
)
from pipeline.read_costs import ReadCosts
from pipeline.remote_shards import Ahead
from pipeline.shards import BadSampleError, ShardSet
from pipeline.stalls import Stalls
from pipeline.views import CentreCrops, ViewParams, ViewRecipe, centre_crops, draw_views


@dataclass(frozen=True)
class Views:
    """One rank's part of one micro-batch, in two views."""

    x1: Float[Tensor, "n 3 s s"]  # normalised, channels-last in memory
    x2: Float[Tensor, "n 3 s s"]
    ids: Int64[np.ndarray, " n"]  # the samples that the order asked for
    sources: Int64[np.ndarray, " n"]  # the samples that are seen: ids, but where a picture was bad
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
    *,
    global_batch: int,
    world_size: int,
    local_world_size: int,
) -> None:
    """Raise UserError if the cache of a remote dataset cannot hold what a machine reads at a time in this order."""
    match order.epoch_order:
        case "random":
            dataset.check_room(len(dataset.shards), "--epoch-order random", "take --epoch-order blocks")
        case "blocks":
            streams = -(-order.block_streams * local_world_size // world_size)
            samples = dataset.num_samples / len(dataset.shards) * order.block_shards  # of a group of shards
            steps = samples * order.block_streams / global_batch  # that a stream takes to read a group
            groups = 1 + math.ceil((slack(config) + 1) / steps)  # the one being read, and those that end or begin
            reason = f"--epoch-order blocks, {streams} x {groups} groups of {order.block_shards} shards,"
            dataset.check_room(streams * groups * order.block_shards, reason, "take fewer --block-shards")
        case _:
            assert_never(order.epoch_order)


def print_bad_sample(error: BadSampleError) -> None:
    """The default report of a bad sample: one line on stderr."""
    print(f"bad sample, replaced by the next one: {error}", file=sys.stderr, flush=True)


@contextmanager
def open_views(
    dataset: ShardSet,
    recipe: ViewRecipe,
    config: LoaderConfig,
    *,
    seed: int,
    global_batch: int,
    epochs: int,
    rank: int,
    world_size: int,
    local_world_size: int,
    device: torch.device,
    start_epoch: int = 0,
    start_step: int = 0,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float32,
    order: OrderConfig = OrderConfig(),  # noqa: B008  # frozen
    on_bad_sample: Callable[[BadSampleError], None] = print_bad_sample,
    pairs: int = 1,
    read_costs: ReadCosts | None = None,
    give_up: Callable[[], bool] = lambda: False,
    stalls: Stalls | None = None,
) -> Iterator[Iterator[Views]]:
    """One rank's views from step ``start_step`` of ``start_epoch`` to the end of ``epochs``.

    Each step comes as ``accumulate`` micro-batches of ``global_batch / world_size / accumulate`` samples, each of them
    ``pairs`` times in a row with other views. The iterator raises UserError when too many samples are bad.
    ``read_costs`` is told how long each shard's reads took, ``stalls`` how long the GPU waited. The iterator raises
    StarvedError if ``give_up`` says so while it waits for a batch.
    """
    assert global_batch % (world_size * accumulate) == 0
    steps = steps_per_epoch(dataset.num_samples, global_batch)
    sample_ids = choose_order(order, seed, dataset.shard_samples, global_batch)

    def places() -> Iterator[Place]:
        for epoch in range(start_epoch, epochs):
            for step in range(start_step if epoch == start_epoch else 0, steps):
                ids = sample_ids(epoch, batch_positions(step, global_batch, rank, world_size))
                for micro, pair in itertools.product(range(accumulate), range(pairs)):
                    yield epoch + pair * PAIR_EPOCHS, step, rank_slice(ids, micro, accumulate)

    def draw(epoch: int, ids: Int64[np.ndarray, " n"]) -> ViewParams:
        return draw_views(recipe, seed, epoch, ids, dataset.sizes(ids))

    def of_machine() -> Iterator[Int64[np.ndarray, "_"]]:  # noqa: F821
        for epoch in range(start_epoch, epochs):
            for step in range(start_step if epoch == start_epoch else 0, steps):
                yield sample_ids(epoch, node_positions(step, global_batch, rank, world_size, local_world_size))

    max_batch = global_batch // world_size // accumulate
    fixed = (dataset, recipe, config, max_batch, local_world_size, device, dtype, on_bad_sample)
    settings = Settings(*fixed, read_costs, give_up, stalls)
    with deliver_ahead(settings, draw, places, Ahead(of_machine(), rank % local_world_size)) as delivered:
        yield (
            Views(x1, x2, batch.ids, batch.sources, epoch, batch.step, wait_s, pair)
            for (batch, (x1, x2)), wait_s in delivered
            for pair, epoch in [divmod(batch.epoch, PAIR_EPOCHS)]
        )


@contextmanager
def open_crops(
    dataset: ShardSet,
    recipe: ViewRecipe,
    config: LoaderConfig,
    *,
    ids: Int64[np.ndarray, " n"],
    seed: int,
    global_batch: int,
    epochs: int,
    rank: int,
    world_size: int,
    local_world_size: int,
    device: torch.device,
    start_epoch: int = 0,
    accumulate: int = 1,
    dtype: torch.dtype = torch.float32,
    on_bad_sample: Callable[[BadSampleError], None] = print_bad_sample,
) -> Iterator[Iterator[Crops]]:
    """One random view of each of samples ``ids`` an epoch, for training with labels; otherwise as ``open_views``."""
    assert global_batch % (world_size * accumulate) == 0

    def places() -> Iterator[Place]:
        for epoch in range(start_epoch, epochs):
            for step in range(steps_per_epoch(len(ids), global_batch)):
                positions = batch_positions(step, global_batch, rank, world_size)
                mine = ids[epoch_order(len(ids), seed, epoch, positions)]
                for micro in range(accumulate):
                    yield epoch, step, rank_slice(mine, micro, accumulate)

    def of_machine() -> Iterator[Int64[np.ndarray, "_"]]:  # noqa: F821
        for epoch in range(start_epoch, epochs):
            for step in range(steps_per_epoch(len(ids), global_batch)):
                positions = node_positions(step, global_batch, rank, world_size, local_world_size)
                yield ids[epoch_order(len(ids), seed, epoch, positions)]

    def draw(epoch: int, sources: Int64[np.ndarray, " n"]) -> ViewParams:
        return draw_views(recipe, seed, epoch, sources, dataset.sizes(sources)).only_view(0)

    max_batch = global_batch // world_size // accumulate
    settings = Settings(dataset, recipe, config, max_batch, local_world_size, device, dtype, on_bad_sample)
    with deliver_ahead(settings, draw, places, Ahead(of_machine(), rank % local_world_size)) as delivered:
        yield (Crops(x, batch.sources, batch.epoch, batch.step, wait_s) for (batch, (x,)), wait_s in delivered)


@contextmanager
def open_pictures(
    dataset: ShardSet,
    recipe: ViewRecipe,
    config: LoaderConfig,
    *,
    ids: Int64[np.ndarray, " n"],
    batch: int,
    local_world_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    on_bad_sample: Callable[[BadSampleError], None] = print_bad_sample,
) -> Iterator[Iterator[tuple[Float[Tensor, "b 3 s s"], Int64[np.ndarray, " b"]]]]:
    """The evaluation view of samples ``ids``, in that order: (x, ids). The last batch is smaller."""

    def batches() -> Iterator[Int64[np.ndarray, "_"]]:  # noqa: F821
        return (ids[start : start + batch] for start in range(0, len(ids), batch))

    def places() -> Iterator[Place]:
        for step, part in enumerate(batches()):
            yield 0, step, part

    def draw(_: int, sources: Int64[np.ndarray, " n"]) -> CentreCrops:
        return centre_crops(recipe.image_size, dataset.sizes(sources))

    settings = Settings(dataset, recipe, config, batch, local_world_size, device, dtype, on_bad_sample)
    with deliver_ahead(settings, draw, places, Ahead(batches(), None) if dataset.pays(ids) else None) as delivered:
        yield ((x, part.ids) for (part, (x,)), _ in delivered)
