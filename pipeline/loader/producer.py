"""Makes a loader's batches ahead of use: threads that read, decode and transform, and one that runs the chain.

On a GPU all of it happens on a stream of its own, so that it overlaps with the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from PIL import UnidentifiedImageError

from pipeline.backends.base import BackendContext, Batch, UndecodableBatchError, ViewBatch
from pipeline.backends.reference import decode
from pipeline.backends.select import check_compiler, open_backend
from pipeline.common.errors import UserError
from pipeline.common.system import share_of_cores
from pipeline.dataset.mixture import Dataset
from pipeline.dataset.shard_store import PrefetchPlan
from pipeline.loader.bad_samples import BadSamples
from pipeline.loader.config import LoaderConfig
from pipeline.loader.prefetch_queue import prefetched
from pipeline.loader.read_batches import Assembler, DrawWindows
from pipeline.loader.timing import Stalls
from pipeline.sampling.sampler import BatchIds, World
from pipeline.sampling.views import ViewRecipe


@dataclass(frozen=True)
class LoaderContext:
    """What all kinds of loaders share."""

    dataset: Dataset
    recipe: ViewRecipe
    config: LoaderConfig
    max_batch: int  # images
    world: World
    dtype: torch.dtype  # of the views
    bad_samples: BadSamples
    give_up: Callable[[], bool] = lambda: False
    stalls: Stalls | None = None


@contextmanager
def produce(
    context: LoaderContext, draw: DrawWindows, batches: Callable[[], Iterator[BatchIds]], plan: PrefetchPlan | None
) -> Iterator[Iterator[ViewBatch]]:
    """The views of ``batches``, made ahead by a thread, each with the time waited for it; shards fetched by ``plan``.

    Leaving the context ends the threads. Raises UserError for images of other channels than the recipe's.
    """
    config, world = context.config, context.world
    device = world.device
    if context.dataset.channels != context.recipe.channels:
        raise UserError(
            f"{context.dataset.path} has images of {context.dataset.channels} channels, and they are read for an "
            f"encoder of {context.recipe.channels} channels: take a dataset, or an encoder, of the same number "
            "(make_shards --channels)"
        )
    threads = config.threads or share_of_cores(world.local_world_size)
    with (
        ThreadPoolExecutor(threads, "read") as readers,
        ThreadPoolExecutor(threads, "transform") as transformers,
        ExitStack() as innermost,
    ):
        cancelled = threading.Event()
        begin_step = innermost.enter_context(
            context.dataset.follow(plan, cancelled, config.max_steps_behind, world.local_world_size)
        )
        assembler = Assembler(context.dataset, draw, readers, context.bad_samples, cancelled)
        maker = ViewMaker(
            assembler,
            config,
            BackendContext(
                context.recipe, config.dali, context.max_batch, device, context.dtype, transformers, threads
            ),
        )

        def make() -> Iterator[ViewBatch]:
            return maker.views(_announced(batches(), begin_step))

        depth, give_up = config.prefetch, context.give_up
        if device.type != "cuda":
            made = innermost.enter_context(prefetched(make, depth, give_up))
        else:
            on_side = innermost.enter_context(prefetched(lambda: _on_side_stream(make(), device), depth, give_up))
            made = _to_current_stream(on_side, device, context.stalls)
        innermost.callback(cancelled.set)  # first of all: a reader that waits for a fetch would block the other exits
        samples = context.dataset.num_samples
        yield (replace(batch, wait_s=wait_s, ids=batch.ids % samples) for batch, wait_s in made)


class ViewMaker:
    """Turns batches of ids into views on one device; bad images are found and replaced."""

    def __init__(self, assembler: Assembler, config: LoaderConfig, context: BackendContext) -> None:
        """``assembler`` reads the batches; ``config`` chooses the back end, which works with ``context``.

        Raises UserError for what the machine lacks.
        """
        self._assembler = assembler
        self._read_ahead = config.read_ahead
        check_compiler(context.device)
        self._backend = open_backend(config.backend, context.recipe.channels)
        assembler.check_headers(self._backend.header_check())
        self._context = context

    def views(self, batches: Iterable[BatchIds]) -> Iterator[ViewBatch]:
        """The views of each batch in order, bad images replaced."""
        made = self._make(self._assembler.read_ahead(batches, self._read_ahead))
        while True:
            try:
                yield next(made)
            except StopIteration:
                return
            except UndecodableBatchError as error:
                yield self._recover(error)

    def _make(self, batches: Iterator[Batch]) -> Iterator[ViewBatch]:
        """Views by the chosen back end; the iterator goes on after an UndecodableBatchError."""
        return self._backend.views(self._context, batches)

    def _recover(self, error: UndecodableBatchError) -> ViewBatch:
        batch, reason = error.batch, error.reason
        while True:
            self._find_bad(batch, reason)
            batch = self._assembler.replace_bad(batch)
            try:
                return next(self._make(iter([batch])))
            except UndecodableBatchError as again:
                # Not kept: its frames refer to this one, and in such a cycle the loader and its images would stay until
                # a full collection, which is as good as never due.
                batch, reason = again.batch, again.reason

    def _find_bad(self, batch: Batch, reason: str) -> None:
        """Note the images that PIL cannot decode; if it can decode them all, those the back end cannot decode alone.

        Raises RuntimeError when every image can be decoded alone: then no image is the cause.
        """
        for faults in (self._pil_faults(batch), self._backend_faults(batch)):
            found = False
            for sample, fault in faults:
                found = True
                self._assembler.note_bad(int(batch.sources[sample]), fault)
            if found:
                return
        raise RuntimeError(f"a batch of images, each of them good, could not be decoded: {reason}")

    def _pil_faults(self, batch: Batch) -> Iterator[tuple[int, str]]:
        """(sample, fault) of the images that PIL cannot decode."""
        faults = self._context.pool.map(lambda sample: _pil_fault(batch, sample), range(len(batch)))
        for sample, fault in enumerate(faults):
            if fault is not None:
                yield sample, fault

    def _backend_faults(self, batch: Batch) -> Iterator[tuple[int, str]]:
        """(sample, fault) of those that the back end cannot decode alone, by one pipeline: it takes long to build."""
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
    except UnidentifiedImageError:  # PIL's text holds an address, which would differ after a resume
        return "cannot be decoded: not an image, or of an unknown format"
    except (OSError, ValueError, SyntaxError) as error:
        return f"cannot be decoded: {error}"
    return None


def _announced(batches: Iterator[BatchIds], begin_step: Callable[[], None]) -> Iterator[BatchIds]:
    """The same batches; ``begin_step`` is called before the first of each step."""
    newest = None
    for batch in batches:
        step = batch.epoch, batch.step
        if step != newest:
            begin_step()
            newest = step
        yield batch


def _on_side_stream(batches: Iterator[ViewBatch], device: torch.device) -> Iterator[tuple[ViewBatch, torch.cuda.Event]]:
    """Make the batches on a stream of the producer's own, so that it overlaps with the model.

    The event with each batch marks its end on that stream.
    """
    stream = torch.cuda.Stream(device, priority=0)  # the lowest there is: the model's kernels go first
    with torch.cuda.device(device), torch.cuda.stream(stream):
        try:
            for batch in batches:
                yield batch, stream.record_event()
        finally:
            stream.synchronize()  # before the back end and its memory are freed


def _to_current_stream(
    made: Iterator[tuple[tuple[ViewBatch, torch.cuda.Event], float]], device: torch.device, stalls: Stalls | None
) -> Iterator[tuple[ViewBatch, float]]:
    """Let the model's stream, not the host, wait for each batch."""
    for (batch, done), wait_s in made:
        current = torch.cuda.current_stream(device)
        with stalls.on(current) if stalls is not None else nullcontext():
            current.wait_event(done)
        for view in batch.views:
            view.record_stream(current)
        yield batch, wait_s
