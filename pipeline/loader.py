"""Owns the loader: order + bytes + parameters + back end -> views, fed ahead by a thread.

How long the training loop waits for a batch is measured at every step (``wait_s``): that is the proof that the loop is
not bound by its data.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from typing_extensions import assert_never

from pipeline.assemble import Assembler, BadSamples, DrawWindows, Place
from pipeline.backends import Delivered, ViewMaker
from pipeline.feeder import fed_ahead
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
from pipeline.views import CentreCrops, ViewParams, ViewRecipe, centre_crops, draw_views

# The second pair of views of a sample in epoch e is drawn as that of epoch e + PAIR_EPOCHS would be.
PAIR_EPOCHS = 1 << 24
RANKS_APART = 2  # steps by which one rank of a machine may be behind another


@dataclass(frozen=True)
class Views:
    """One rank's part of one micro-batch, in two views."""

    x1: Float[Tensor, "n 3 s s"]  # normalised, channels-last in memory
    x2: Float[Tensor, "n 3 s s"]
    ids: Int64[np.ndarray, " n"]  # the samples that the order asked for
    sources: Int64[np.ndarray, " n"]  # the samples that are seen: ids, but where a picture was bad
    epoch: int
    step: int  # within the epoch
    wait_s: float  # how long the consumer waited for this batch
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


def check_cache(dataset: ShardSet, order: OrderConfig, world_size: int, local_world_size: int) -> None:
    """Raise UserError if the cache of a remote dataset cannot hold what a machine reads at a time in this order."""
    match order.epoch_order:
        case "random":
            dataset.check_room(len(dataset.shards), "--epoch-order random", "take --epoch-order blocks")
        case "blocks":
            streams = -(-order.block_streams * local_world_size // world_size)
            at_once = 2 * streams * order.block_shards  # a stream goes on from one group of shards to the next
            dataset.check_room(
                at_once, f"--block-shards {order.block_shards} x {streams} streams x 2", "take fewer --block-shards"
            )
        case _:
            assert_never(order.epoch_order)


def print_bad_sample(error: BadSampleError) -> None:
    """The default report of a bad sample: one line on stderr."""
    print(f"bad sample, replaced by the next one: {error}", file=sys.stderr, flush=True)


def share_of_cores(local_world_size: int) -> int:
    """The threads of one rank when a machine's ranks share its cores evenly."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size)


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
) -> Iterator[Iterator[Views]]:
    """One rank's views from step ``start_step`` of ``start_epoch`` to the end of ``epochs``.

    Each step comes as ``accumulate`` micro-batches of ``global_batch / world_size / accumulate`` samples, each of them
    ``pairs`` times in a row with other views. The iterator raises UserError when too many samples are bad.
    ``read_costs`` is told how long each shard's reads took. The iterator raises StarvedError if ``give_up`` says so
    while it waits for a batch.
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
    settings = _Settings(dataset, recipe, config, max_batch, local_world_size, device, dtype, on_bad_sample)
    settings = replace(settings, read_costs=read_costs, give_up=give_up)
    with _delivered(settings, draw, places, Ahead(of_machine(), rank % local_world_size)) as delivered:
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
    settings = _Settings(dataset, recipe, config, max_batch, local_world_size, device, dtype, on_bad_sample)
    with _delivered(settings, draw, places, Ahead(of_machine(), rank % local_world_size)) as delivered:
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

    settings = _Settings(dataset, recipe, config, batch, local_world_size, device, dtype, on_bad_sample)
    with _delivered(settings, draw, places, Ahead(batches(), None) if dataset.pays(ids) else None) as delivered:
        yield ((x, part.ids) for (part, (x,)), _ in delivered)


@dataclass(frozen=True)
class _Settings:
    """What both kinds of loader share."""

    dataset: ShardSet
    recipe: ViewRecipe
    config: LoaderConfig
    max_batch: int
    local_world_size: int
    device: torch.device
    dtype: torch.dtype
    on_bad_sample: Callable[[BadSampleError], None]
    read_costs: ReadCosts | None = None
    give_up: Callable[[], bool] = lambda: False


@contextmanager
def _delivered(
    settings: _Settings, draw: DrawWindows, places: Callable[[], Iterator[Place]], ahead: Ahead | None
) -> Iterator[Iterator[tuple[Delivered, float]]]:
    """The views of ``places`` with the time waited for each, made ahead by a thread, shards fetched by ``ahead``."""
    config, device = settings.config, settings.device
    threads = config.threads or share_of_cores(settings.local_world_size)
    slack = config.read_ahead + config.prefetch + config.dali.prefetch + RANKS_APART
    with (
        ThreadPoolExecutor(threads, "read") as readers,
        ThreadPoolExecutor(threads, "transform") as transformers,
        ExitStack() as innermost,
    ):
        cancelled = threading.Event()
        begin = innermost.enter_context(settings.dataset.follow(ahead, cancelled, slack, settings.local_world_size))
        bad = BadSamples(config.max_bad_samples, settings.on_bad_sample)
        maker = ViewMaker(
            Assembler(settings.dataset, draw, readers, bad, settings.read_costs, cancelled),
            settings.recipe,
            config,
            max_batch=settings.max_batch,
            device=device,
            dtype=settings.dtype,
            pool=transformers,
            threads=threads,
        )

        def make() -> Iterator[Delivered]:
            return maker.deliver(_begun(places(), begin))

        depth, give_up = config.prefetch, settings.give_up
        if device.type != "cuda":
            delivered = innermost.enter_context(fed_ahead(make, depth, give_up))
        else:
            made = innermost.enter_context(fed_ahead(lambda: _on_side_stream(make(), device), depth, give_up))
            delivered = _to_current_stream(made, device)
        innermost.callback(cancelled.set)  # first of all: a reader that waits for a fetch would hold up the rest
        yield delivered


def _begun(places: Iterator[Place], begin: Callable[[], None]) -> Iterator[Place]:
    """The same places; ``begin`` is called with the first of each step."""
    newest = None
    for place in places:
        step = place[0] % PAIR_EPOCHS, place[1]
        if step != newest:
            begin()
            newest = step
        yield place


def _on_side_stream(
    delivered: Iterator[Delivered], device: torch.device
) -> Iterator[tuple[Delivered, torch.cuda.Event]]:
    """Work on a stream of the feeder's own, so that it overlaps with the model; an event tells when a batch is done."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for item in delivered:
            yield item, stream.record_event()


def _to_current_stream(
    delivered: Iterator[tuple[tuple[Delivered, torch.cuda.Event], float]], device: torch.device
) -> Iterator[tuple[Delivered, float]]:
    """Let the model's stream, not the host, wait for each batch."""
    for ((batch, views), done), wait_s in delivered:
        current = torch.cuda.current_stream(device)
        current.wait_event(done)
        for view in views:
            view.record_stream(current)
        yield (batch, views), wait_s
