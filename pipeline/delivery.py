"""Owns how a loader's batches are made ahead of use: threads that read, decode and transform, fed by one more thread.

On a GPU all of it happens on a stream of its own, so that it overlaps with the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from pipeline.assemble import Assembler, BadSamples, DrawWindows
from pipeline.backends import Delivered, ViewMaker
from pipeline.feeder import fed_ahead
from pipeline.loader_config import LoaderConfig
from pipeline.read_costs import ReadCosts
from pipeline.remote_shards import Ahead
from pipeline.shards import BadSampleError, ShardSet
from pipeline.span import Place, Process
from pipeline.stalls import Stalls
from pipeline.views import ViewRecipe
from pipeline.workers import cores

# The second pair of views of a sample in epoch e is drawn as that of epoch e + PAIR_EPOCHS would be.
PAIR_EPOCHS = 1 << 24
RANKS_APART = 2  # steps by which one rank of a machine may be behind another


def share_of_cores(local_world_size: int) -> int:
    """The threads of one rank when a machine's ranks share its cores evenly."""
    return max(1, cores() // local_world_size)


def slack(config: LoaderConfig) -> int:
    """Steps that some process of the machine may still read when another begins a later one."""
    return config.read_ahead + config.prefetch + config.dali.prefetch + RANKS_APART


@dataclass(frozen=True)
class Settings:
    """What all kinds of loaders share."""

    dataset: ShardSet
    recipe: ViewRecipe
    config: LoaderConfig
    max_batch: int
    process: Process
    dtype: torch.dtype
    on_bad_sample: Callable[[BadSampleError], None]
    read_costs: ReadCosts | None = None
    give_up: Callable[[], bool] = lambda: False
    stalls: Stalls | None = None


@contextmanager
def deliver_ahead(
    settings: Settings, draw: DrawWindows, places: Callable[[], Iterator[Place]], ahead: Ahead | None
) -> Iterator[Iterator[tuple[Delivered, float]]]:
    """The views of ``places`` with the time waited for each, made ahead by a thread, shards fetched by ``ahead``."""
    config, process = settings.config, settings.process
    device = process.device
    threads = config.threads or share_of_cores(process.local_world_size)
    with (
        ThreadPoolExecutor(threads, "read") as readers,
        ThreadPoolExecutor(threads, "transform") as transformers,
        ExitStack() as innermost,
    ):
        cancelled = threading.Event()
        begin = innermost.enter_context(
            settings.dataset.follow(ahead, cancelled, slack(config), process.local_world_size)
        )
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
            delivered = _to_current_stream(made, device, settings.stalls)
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
        try:
            for item in delivered:
                yield item, stream.record_event()
        finally:
            stream.synchronize()  # what makes the views goes after this, and its memory with it


def _to_current_stream(
    delivered: Iterator[tuple[tuple[Delivered, torch.cuda.Event], float]],
    device: torch.device,
    stalls: Stalls | None,
) -> Iterator[tuple[Delivered, float]]:
    """Let the model's stream, not the host, wait for each batch."""
    for ((batch, views), done), wait_s in delivered:
        current = torch.cuda.current_stream(device)
        with stalls.on(current) if stalls is not None else nullcontext():
            current.wait_event(done)
        for view in views:
            view.record_stream(current)
        yield (batch, views), wait_s
