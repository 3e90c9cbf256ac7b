"""Owns the ladder of throughput: rungs from bytes to a trained step, each the project's own code, a function for each.

A rung is a context that gives ``advance(batches)``: work through so many batches to the end, the GPU's part included,
and say how the time was spent. What lies before a rung is prepared once and kept in memory (on the device where the
rung wants it there), so that each rung is measured alone; only the whole loader and end to end are chains.
"""

from __future__ import annotations

import gc
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from pipeline.backends import reference
from pipeline.backends.base import BackendContext, BackendStages, Batch
from pipeline.backends.select import open_backend
from pipeline.common.system import share_of_cores
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.bad_samples import BadSamples, print_bad_sample
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import ViewBatch, open_views
from pipeline.loader.read_batches import Assembler
from pipeline.loader.timing import Stalls
from pipeline.sampling.order import OrderConfig, choose_order
from pipeline.sampling.sampler import BatchIds, BatchSampler, World
from pipeline.sampling.views import ViewParams, ViewRecipe, draw_views
from tools.throughput.step_timer import StepClock
from train.engine.loop import train_step
from train.engine.run import Run


def decoded_batch(batch: Batch, pool: ThreadPoolExecutor, device: torch.device) -> Batch:
    """The batch with its images decoded, uint8 ``[h, w, 3]``, where the crops want them."""
    images = pool.map(lambda encoded: reference.decode(encoded.tobytes()), batch.encoded)
    arrays = [image.permute(1, 2, 0).contiguous() for image in images]
    on_device = [array.to(device) if device.type == "cuda" else array.numpy() for array in arrays]
    return replace(batch, encoded=on_device)  # type: ignore[arg-type]


RungName = Literal["read", "decode", "crops", "photometric", "loader", "model", "end_to_end"]
Advance = Callable[[int], dict[str, float]]  # batches -> seconds by part of the work, where parts are known
ENDLESS = 1_000_000  # epochs; nobody measures that long
RESIDENT_BATCHES = 3  # kept in memory for the rungs that begin in the middle


@dataclass(frozen=True)
class Bench:
    """What the rungs share."""

    dataset: ShardSet
    recipe: ViewRecipe
    loader: LoaderConfig
    order: OrderConfig
    batch: int  # source images
    seed: int
    ranks_per_machine: int  # cores are shared as if so many ranks ran here
    device: torch.device
    dtype: torch.dtype  # of the views

    @property
    def threads(self) -> int:
        """Threads of the loader."""
        return self.loader.threads or share_of_cores(self.ranks_per_machine)

    @property
    def sampler(self) -> BatchSampler:
        """Steps without end."""
        return BatchSampler(self.seed, self.batch, ENDLESS)

    def places(self) -> Iterator[BatchIds]:
        """The order of a run of one rank, without end."""
        order = choose_order(self.order, self.seed, self.dataset.shard_samples, self.batch)
        return self.sampler.places(self.dataset.num_samples, order, World.alone(self.device))

    @contextmanager
    def views(self, stalls: Stalls | None = None) -> Iterator[Iterator[ViewBatch]]:
        """The loader of a run of one rank, without end; ``stalls`` are those of the GPU."""
        with open_views(
            self.dataset,
            self.recipe,
            replace(self.loader, threads=self.threads),
            self.sampler,
            World.alone(self.device),
            dtype=self.dtype,
            order=self.order,
            stalls=stalls,
        ) as batches:
            yield batches

    @contextmanager
    def encoded(self) -> Iterator[Iterator[Batch]]:
        """Batches read ahead as the loader does it, not decoded."""

        def draw(epoch: int, ids: Any) -> ViewParams:
            return draw_views(self.recipe, self.seed, epoch, ids, self.dataset.sizes(ids))

        with ThreadPoolExecutor(self.threads, "read") as readers:
            bad = BadSamples(self.loader.max_bad_samples, print_bad_sample)
            yield Assembler(self.dataset, draw, readers, bad).read_ahead(self.places(), self.loader.read_ahead)

    def resident(self) -> list[Batch]:
        """A few encoded batches to be used again and again."""
        with self.encoded() as batches:
            return list(itertools.islice(batches, RESIDENT_BATCHES))

    def resident_views(self) -> list[ViewBatch]:
        """A few batches of views to be used again and again."""
        with self.views() as batches:
            return list(itertools.islice(batches, RESIDENT_BATCHES))

    @contextmanager
    def stages(self) -> Iterator[tuple[BackendStages, ThreadPoolExecutor]]:
        """The back end's stages, and the threads that they share."""
        with ThreadPoolExecutor(self.threads, "transform") as pool:
            setup = BackendContext(
                self.recipe, self.loader.dali, self.batch, self.device, self.dtype, pool, self.threads
            )
            yield open_backend(self.loader.backend).stages(setup), pool

    def tidy(self) -> None:
        """Give back the GPU memory that is kept for later use."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            open_backend(self.loader.backend).release_memory()

    def finish(self) -> None:
        """Wait for what was put on the current stream."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


@dataclass(frozen=True)
class Rung:
    """One step of the ladder."""

    name: str
    open: Callable[[], AbstractContextManager[Advance]]
    batch: int  # source images
    ahead: int  # batches that its queues hold


def make_ladder(bench: Bench, run: Run | None) -> dict[RungName, Rung]:
    """All rungs, bottom up; without a ``run`` those of the loader."""
    read_ahead = bench.loader.read_ahead
    dali = bench.loader.dali.prefetch
    queues = read_ahead + dali + bench.loader.prefetch + 1
    rungs: dict[RungName, Rung] = {
        "read": Rung("read", lambda: read_bytes(bench), bench.batch, read_ahead),
        "decode": Rung("decode", lambda: decode(bench), bench.batch, dali),
        "crops": Rung("crops", lambda: crops(bench), bench.batch, dali),
        "photometric": Rung("photometric", lambda: photometric(bench), bench.batch, 0),
        "loader": Rung("loader", lambda: whole_loader(bench), bench.batch, queues),
    }
    if run is not None:
        rungs["model"] = Rung("model", lambda: model_step(bench, run), bench.batch, 0)
        rungs["end_to_end"] = Rung("end_to_end", lambda: end_to_end(bench, run), bench.batch, queues)
    return rungs


@contextmanager
def read_bytes(bench: Bench) -> Iterator[Advance]:
    """Order, parameters and positioned reads in threads; checksums compared."""
    with bench.encoded() as batches:
        yield lambda count: _drain(bench, batches, count)


@contextmanager
def decode(bench: Bench) -> Iterator[Advance]:
    """Encoded images in memory to decoded ones."""
    resident = bench.resident()
    with bench.stages() as (stages, _):
        decoded = stages.decode(itertools.cycle(resident))
        yield lambda count: _drain(bench, decoded, count)


@contextmanager
def crops(bench: Bench) -> Iterator[Advance]:
    """Decoded images in memory to two squares each: cut and resized."""
    with bench.stages() as (stages, pool):
        resident = [decoded_batch(batch, pool, bench.device) for batch in bench.resident()]
        squares = stages.crop(itertools.cycle(resident))
        yield lambda count: _drain(bench, squares, count)


@contextmanager
def photometric(bench: Bench) -> Iterator[Advance]:
    """Squares in memory to views: colour, gray, blur, solarize, normalise, flip."""
    with bench.stages() as (stages, pool):
        batches = bench.resident()
        decoded = [decoded_batch(batch, pool, bench.device) for batch in batches]
        # A queue that is pulled ahead must not run dry while its last outputs are in use: cycle, and take a few.
        squares = list(itertools.islice(stages.crop(itertools.cycle(decoded)), len(batches)))
        inputs = itertools.cycle([(square, batch.windows) for square, batch in zip(squares, batches, strict=True)])
        views = (stages.photometric(square, windows) for square, windows in inputs if isinstance(windows, ViewParams))
        yield lambda count: _drain(bench, views, count)


@contextmanager
def whole_loader(bench: Bench) -> Iterator[Advance]:
    """Shards to views, as training gets them."""
    with bench.views() as batches:
        yield lambda count: _drain(bench, batches, count)


@contextmanager
def model_step(bench: Bench, run: Run, views: list[ViewBatch] | None = None) -> Iterator[Advance]:
    """Training steps on views that lie on the device: forward, backward and optimizer told apart."""
    resident = itertools.cycle(views or bench.resident_views())
    with StepClock(run, bench.device) as clock:

        def advance(count: int) -> dict[str, float]:
            clock.start()
            for _ in range(count):
                train_step(clock.run, resident)
            bench.finish()
            return clock.read()

        yield advance


@contextmanager
def end_to_end(bench: Bench, run: Run) -> Iterator[Advance]:
    """Shards to weights: training steps fed by the loader. The time that the loop waited for it is told apart."""
    stalls = Stalls()
    with bench.views(stalls) as batches:

        def advance(count: int) -> dict[str, float]:
            waited = sum(train_step(run, batches).wait_s for _ in range(count))
            bench.finish()
            return {"data_wait": waited + stalls.read_s()}

        yield advance


def _drain(bench: Bench, batches: Iterator[object], count: int) -> dict[str, float]:
    """Take ``count`` batches and keep none."""
    taken: deque[object] = deque(itertools.islice(batches, count), maxlen=1)
    assert taken, "a rung's batches have no end"
    bench.finish()
    return {}
