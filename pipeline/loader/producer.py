"""Owns how a loader's batches are made ahead of use: threads that read, decode and transform, fed by one more thread.

On a GPU all of it happens on a stream of its own, so that it overlaps with the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from PIL import UnidentifiedImageError

from pipeline.backends.base import BackendContext, BackendOutput, Batch, UndecodableBatchError
from pipeline.backends.reference import decode
from pipeline.backends.select import open_backend
from pipeline.common.system import share_of_cores
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.dataset.remote_shards import PrefetchPlan
from pipeline.loader.bad_samples import BadSamples
from pipeline.loader.config import LoaderConfig
from pipeline.loader.prefetch_queue import fed_ahead
from pipeline.loader.read_batches import Assembler, DrawWindows
from pipeline.loader.timing import ReadCosts, Stalls
from pipeline.sampling.sampler import BatchIds, World
from pipeline.sampling.views import ViewRecipe


class ViewMaker:
    """Makes views of one dataset on one device."""

    def __init__(
        self,
        assembler: Assembler,
        recipe: ViewRecipe,
        config: LoaderConfig,
        *,
        max_batch: int,
        device: torch.device,
        dtype: torch.dtype,
        pool: ThreadPoolExecutor,
        threads: int,
    ) -> None:
        """``pool`` has ``threads`` workers; ``dtype`` is that of the views."""
        self._assembler = assembler
        self._read_ahead = config.read_ahead
        self._backend = open_backend(config.backend)
        self._setup = BackendContext(recipe, config.dali, max_batch, device, dtype, pool, threads)

    def deliver(self, places: Iterable[BatchIds]) -> Iterator[BackendOutput]:
        """The views of each place in order, bad images replaced."""
        made = self._make(self._assembler.read_ahead(places, self._read_ahead))
        while True:
            try:
                yield next(made)
            except StopIteration:
                return
            except UndecodableBatchError as error:
                yield self._recover(error)

    def _make(self, batches: Iterator[Batch]) -> Iterator[BackendOutput]:
        """Views of batches by the chosen back end; goes on after an UndecodableBatchError."""
        return self._backend.views(self._setup, batches)

    def _recover(self, error: UndecodableBatchError) -> BackendOutput:
        """Find the images that spoil a batch, put others in their place, and make it again."""
        while True:
            self._find_bad(error)
            batch = self._assembler.replace_bad(error.batch)
            try:
                return next(self._make(iter([batch])))
            except UndecodableBatchError as again:
                error = again

    def _find_bad(self, error: UndecodableBatchError) -> None:
        """Note the images that PIL cannot decode; if it can decode them all, those the back end cannot decode alone.

        Raises RuntimeError when every image is good by itself: then the trouble is not the images'.
        """
        for faults in (self._pil_faults(error.batch), self._backend_faults(error.batch)):
            found = False
            for sample, fault in faults:
                found = True
                self._assembler.note_bad(int(error.batch.sources[sample]), fault)
            if found:
                return
        raise RuntimeError(f"a batch of images, each of them good, could not be decoded: {error.reason}") from error

    def _pil_faults(self, batch: Batch) -> Iterator[tuple[int, str]]:
        """(sample, fault) of the images that PIL cannot decode."""
        faults = self._setup.pool.map(lambda sample: _pil_fault(batch, sample), range(len(batch)))
        for sample, fault in enumerate(faults):
            if fault is not None:
                yield sample, fault

    def _backend_faults(self, batch: Batch) -> Iterator[tuple[int, str]]:
        """(sample, fault) of those that the back end cannot decode alone. One pipeline does: to make one takes long."""
        made = self._make(batch.only(sample) for sample in range(len(batch)))
        for sample in range(len(batch)):
            try:
                next(made)
            except UndecodableBatchError as error:
                yield sample, f"cannot be decoded: {error.reason}"


def _pil_fault(batch: Batch, sample: int) -> str | None:
    """Why PIL cannot decode one image of a batch; None if it can."""
    try:
        decode(batch.encoded[sample].tobytes())
    except UnidentifiedImageError:  # its own text holds an address, and would not be the same after a resume
        return "cannot be decoded: not an image, or of an unknown format"
    except (OSError, ValueError, SyntaxError) as error:
        return f"cannot be decoded: {error}"
    return None


# The second pair of views of a sample in epoch e is drawn as that of epoch e + PAIR_EPOCHS would be.
PAIR_EPOCHS = 1 << 24
RANKS_APART = 2  # steps by which one rank of a machine may be behind another


def max_steps_behind(config: LoaderConfig) -> int:
    """Steps that some process of the machine may still read when another begins a later one."""
    return config.read_ahead + config.prefetch + config.dali.prefetch + RANKS_APART


@dataclass(frozen=True)
class LoaderContext:
    """What all kinds of loaders share."""

    dataset: ShardSet
    recipe: ViewRecipe
    config: LoaderConfig
    max_batch: int
    world: World
    dtype: torch.dtype
    on_bad_sample: Callable[[BadSampleError], None]
    read_costs: ReadCosts | None = None
    give_up: Callable[[], bool] = lambda: False
    stalls: Stalls | None = None


@contextmanager
def deliver_ahead(
    settings: LoaderContext, draw: DrawWindows, places: Callable[[], Iterator[BatchIds]], ahead: PrefetchPlan | None
) -> Iterator[Iterator[tuple[BackendOutput, float]]]:
    """The views of ``places`` with the time waited for each, made ahead by a thread, shards fetched by ``ahead``."""
    config, world = settings.config, settings.world
    device = world.device
    threads = config.threads or share_of_cores(world.local_world_size)
    with (
        ThreadPoolExecutor(threads, "read") as readers,
        ThreadPoolExecutor(threads, "transform") as transformers,
        ExitStack() as innermost,
    ):
        cancelled = threading.Event()
        begin = innermost.enter_context(
            settings.dataset.follow(ahead, cancelled, max_steps_behind(config), world.local_world_size)
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

        def make() -> Iterator[BackendOutput]:
            return maker.deliver(_begun(places(), begin))

        depth, give_up = config.prefetch, settings.give_up
        if device.type != "cuda":
            delivered = innermost.enter_context(fed_ahead(make, depth, give_up))
        else:
            made = innermost.enter_context(fed_ahead(lambda: _on_side_stream(make(), device), depth, give_up))
            delivered = _to_current_stream(made, device, settings.stalls)
        innermost.callback(cancelled.set)  # first of all: a reader that waits for a fetch would hold up the rest
        yield delivered


def _begun(places: Iterator[BatchIds], begin: Callable[[], None]) -> Iterator[BatchIds]:
    """The same places; ``begin`` is called with the first of each step."""
    newest = None
    for place in places:
        step = place[0] % PAIR_EPOCHS, place[1]
        if step != newest:
            begin()
            newest = step
        yield place


def _on_side_stream(
    delivered: Iterator[BackendOutput], device: torch.device
) -> Iterator[tuple[BackendOutput, torch.cuda.Event]]:
    """Work on a stream of the feeder's own, so that it overlaps with the model; an event tells when a batch is done."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        try:
            for item in delivered:
                yield item, stream.record_event()
        finally:
            stream.synchronize()  # what makes the views goes after this, and its memory with it


def _to_current_stream(
    delivered: Iterator[tuple[tuple[BackendOutput, torch.cuda.Event], float]],
    device: torch.device,
    stalls: Stalls | None,
) -> Iterator[tuple[BackendOutput, float]]:
    """Let the model's stream, not the host, wait for each batch."""
    for ((batch, views), done), wait_s in delivered:
        current = torch.cuda.current_stream(device)
        with stalls.on(current) if stalls is not None else nullcontext():
            current.wait_event(done)
        for view in views:
            view.record_stream(current)
        yield (batch, views), wait_s
