"""Owns the loader: order + bytes + parameters + back end -> views, fed ahead by a thread.

How long the training loop waits for a batch is measured at every step (``wait_s``): that is the proof that the loop is
not bound by its data.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.assemble import Assembler, BadSamples, DrawWindows, Place
from pipeline.backends import Delivered, ViewMaker
from pipeline.feeder import fed_ahead
from pipeline.loader_config import LoaderConfig
from pipeline.order import OrderConfig, batch_positions, choose_order, epoch_order, rank_slice, steps_per_epoch
from pipeline.read_costs import ReadCosts
from pipeline.shards import BadSampleError, ShardSet
from pipeline.views import CentreCrops, ViewParams, ViewRecipe, centre_crops, draw_views

# The second pair of views of a sample in epoch e is drawn as that of epoch e + PAIR_EPOCHS would be.
PAIR_EPOCHS = 1 << 24


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
) -> Iterator[Iterator[Views]]:
    """One rank's views from step ``start_step`` of ``start_epoch`` to the end of ``epochs``.

    Each step comes as ``accumulate`` micro-batches of ``global_batch / world_size / accumulate`` samples, each of them
    ``pairs`` times in a row with other views. The iterator raises UserError when too many samples are bad.
    ``read_costs`` is told how long each shard's reads took.
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

    max_batch = global_batch // world_size // accumulate
    settings = _Settings(dataset, recipe, config, max_batch, local_world_size, device, dtype, on_bad_sample, read_costs)
    with _delivered(settings, draw, places) as delivered:
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

    def draw(epoch: int, sources: Int64[np.ndarray, " n"]) -> ViewParams:
        return draw_views(recipe, seed, epoch, sources, dataset.sizes(sources)).only_view(0)

    max_batch = global_batch // world_size // accumulate
    settings = _Settings(dataset, recipe, config, max_batch, local_world_size, device, dtype, on_bad_sample)
    with _delivered(settings, draw, places) as delivered:
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

    def places() -> Iterator[Place]:
        for start in range(0, len(ids), batch):
            yield 0, start // batch, ids[start : start + batch]

    def draw(_: int, sources: Int64[np.ndarray, " n"]) -> CentreCrops:
        return centre_crops(recipe.image_size, dataset.sizes(sources))

    settings = _Settings(dataset, recipe, config, batch, local_world_size, device, dtype, on_bad_sample)
    with _delivered(settings, draw, places) as delivered:
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


@contextmanager
def _delivered(
    settings: _Settings, draw: DrawWindows, places: Callable[[], Iterator[Place]]
) -> Iterator[Iterator[tuple[Delivered, float]]]:
    """The views of ``places`` with the time waited for each, made ahead by a thread."""
    config, device = settings.config, settings.device
    threads = config.threads or share_of_cores(settings.local_world_size)
    with (
        ThreadPoolExecutor(threads, "read") as readers,
        ThreadPoolExecutor(threads, "transform") as transformers,
    ):
        bad = BadSamples(config.max_bad_samples, settings.on_bad_sample)
        maker = ViewMaker(
            Assembler(settings.dataset, draw, readers, bad, settings.read_costs),
            settings.recipe,
            config,
            max_batch=settings.max_batch,
            device=device,
            dtype=settings.dtype,
            pool=transformers,
            threads=threads,
        )
        if device.type != "cuda":
            with fed_ahead(lambda: maker.deliver(places()), config.prefetch) as delivered:
                yield delivered
        else:
            with fed_ahead(lambda: _on_side_stream(maker.deliver(places()), device), config.prefetch) as delivered:
                yield _to_current_stream(delivered, device)


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
