"""The stages of training, from reading bytes to a trained step, each as a function that runs the project's own code.

A stage is a context that gives ``advance(batches)``: it processes so many batches to the end, the GPU's part included,
and returns the seconds by part of the work. The inputs of a stage are prepared once and kept in memory (on the device
where the stage reads them there), so that each stage is measured alone; only the loader and end to end are chains.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from pipeline.backends import reference
from pipeline.backends.base import BackendContext, BackendStages, Batch
from pipeline.backends.select import open_backend
from pipeline.common.system import share_of_cores
from pipeline.dataset.mixture import Dataset
from pipeline.loader.bad_samples import BadSamples
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import ViewBatch, draws_of, open_views, order_of
from pipeline.loader.read_batches import Assembler
from pipeline.loader.timing import Stalls
from pipeline.sampling.order import OrderConfig
from pipeline.sampling.sampler import BatchIds, BatchSampler, World
from pipeline.sampling.views import ViewParams, ViewRecipe
from train.engine.loop import train_step
from train.engine.run import Run

StageName = Literal["read", "decode", "crops", "photometric", "loader", "model", "end_to_end"]
Advance = Callable[[int], dict[str, float]]  # batches -> seconds by part of the work, where parts are measured
ENDLESS = 1_000_000  # epochs; no measurement lasts so long
RESIDENT_BATCHES = 3  # kept in memory as inputs of the stages in the middle


@dataclass(frozen=True)
class Bench:
    """Data and settings that all stages share."""

    dataset: Dataset
    recipe: ViewRecipe
    loader: LoaderConfig
    order: OrderConfig
    batch: int  # source images
    seed: int
    ranks_per_machine: int  # the loader gets one rank's share of the cores
    device: torch.device
    dtype: torch.dtype  # of the views

    @property
    def threads(self) -> int:
        return self.loader.threads or share_of_cores(self.ranks_per_machine)

    @property
    def sampler(self) -> BatchSampler:
        """A sampler without an end."""
        return BatchSampler(self.seed, self.batch, ENDLESS)

    def batches(self) -> Iterator[BatchIds]:
        """Sample ids batch by batch, as in a run of one rank, without end."""
        order = order_of(self.dataset, self.order, self.seed, self.batch)
        return self.sampler.batches(self.dataset.epoch_samples, order, World.alone(self.device))

    def views(self, stalls: Stalls | None = None) -> AbstractContextManager[Iterator[ViewBatch]]:
        """The loader of a run of one rank, without end; ``stalls`` counts the GPU's waits for it."""
        return open_views(
            self.dataset,
            self.recipe,
            replace(self.loader, threads=self.threads),
            self.sampler,
            World.alone(self.device),
            dtype=self.dtype,
            order=self.order,
            stalls=stalls,
        )

    @contextmanager
    def encoded(self) -> Iterator[Iterator[Batch]]:
        """Batches of encoded images, read ahead as in the loader."""
        with ThreadPoolExecutor(self.threads, "read") as readers:
            first = self.dataset.first_samples
            bad = BadSamples(self.dataset.num_samples, self.loader.max_bad_samples, first_samples=first)
            draw = draws_of(self.recipe, self.seed, self.dataset)
            yield Assembler(self.dataset, draw, readers, bad).read_ahead(self.batches(), self.loader.read_ahead)

    def resident(self) -> list[Batch]:
        """A few encoded batches, to be used repeatedly."""
        with self.encoded() as batches:
            return list(itertools.islice(batches, RESIDENT_BATCHES))

    def resident_views(self) -> list[ViewBatch]:
        """A few batches of views, to be used repeatedly."""
        with self.views() as batches:
            return list(itertools.islice(batches, RESIDENT_BATCHES))

    @contextmanager
    def backend_stages(self) -> Iterator[tuple[BackendStages, ThreadPoolExecutor]]:
        """The back end's stages and their thread pool."""
        with ThreadPoolExecutor(self.threads, "transform") as pool:
            setup = BackendContext(
                self.recipe, self.loader.dali, self.batch, self.device, self.dtype, pool, self.threads
            )
            yield open_backend(self.loader.backend).stages(setup), pool

    def tidy(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            open_backend(self.loader.backend).release_memory()

    def finish(self) -> None:
        """Wait for all work on the current stream."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


@dataclass(frozen=True)
class Stage:
    """One thing to be timed."""

    open: Callable[[], AbstractContextManager[Advance]]
    batch: int  # source images
    ahead: int  # batches that its queues hold


def make_stages(bench: Bench, run: Run | None) -> dict[StageName, Stage]:
    """All stages from bytes to end to end; without a ``run`` the loader's only."""
    read_ahead = bench.loader.read_ahead
    dali = bench.loader.dali.prefetch
    queues = read_ahead + dali + bench.loader.prefetch + 1
    stages: dict[StageName, Stage] = {
        "read": Stage(lambda: read_bytes(bench), bench.batch, read_ahead),
        "decode": Stage(lambda: decode(bench), bench.batch, dali),
        "crops": Stage(lambda: crops(bench), bench.batch, dali),
        "photometric": Stage(lambda: photometric(bench), bench.batch, 0),
        "loader": Stage(lambda: whole_loader(bench), bench.batch, queues),
    }
    if run is not None:
        stages["model"] = Stage(lambda: model_step(bench, run), bench.batch, 0)
        stages["end_to_end"] = Stage(lambda: end_to_end(bench, run), bench.batch, queues)
    return stages


def decoded_batch(batch: Batch, pool: ThreadPoolExecutor, device: torch.device) -> Batch:
    """The batch with its images decoded to uint8 ``[h, w, 3]``, on the device whose crops read them."""
    images = pool.map(lambda encoded: reference.decode(encoded.tobytes()), batch.encoded)
    arrays = [image.permute(1, 2, 0).contiguous() for image in images]
    on_device = [array.to(device) if device.type == "cuda" else array.numpy() for array in arrays]
    return replace(batch, encoded=on_device)  # type: ignore[arg-type]


@contextmanager
def read_bytes(bench: Bench) -> Iterator[Advance]:
    """Sample order, view parameters, positioned reads in threads, checksums."""
    with bench.encoded() as batches:
        yield lambda count: _drain(bench, batches, count)


@contextmanager
def decode(bench: Bench) -> Iterator[Advance]:
    """Encoded images in memory to decoded ones."""
    resident = bench.resident()
    with bench.backend_stages() as (stages, _):
        decoded = stages.decode(itertools.cycle(resident))
        yield lambda count: _drain(bench, decoded, count)


@contextmanager
def crops(bench: Bench) -> Iterator[Advance]:
    """Decoded images in memory to crops: cut and resized."""
    with bench.backend_stages() as (stages, pool):
        resident = [decoded_batch(batch, pool, bench.device) for batch in bench.resident()]
        squares = stages.crop(itertools.cycle(resident))
        yield lambda count: _drain(bench, squares, count)


@contextmanager
def photometric(bench: Bench) -> Iterator[Advance]:
    """Crops in memory to views: colour, gray, blur, solarize, normalise, flip."""
    with bench.backend_stages() as (stages, pool):
        batches = bench.resident()
        decoded = [decoded_batch(batch, pool, bench.device) for batch in batches]
        # An endless input keeps DALI's queue running while its last outputs are in use.
        squares = list(itertools.islice(stages.crop(itertools.cycle(decoded)), len(batches)))
        inputs = itertools.cycle([(square, batch.windows) for square, batch in zip(squares, batches, strict=True)])
        views = (stages.photometric(square, windows) for square, windows in inputs if isinstance(windows, ViewParams))
        yield lambda count: _drain(bench, views, count)


@contextmanager
def whole_loader(bench: Bench) -> Iterator[Advance]:
    """Shards to views: the loader of training."""
    with bench.views() as batches:
        yield lambda count: _drain(bench, batches, count)


@contextmanager
def model_step(bench: Bench, run: Run, views: list[ViewBatch] | None = None) -> Iterator[Advance]:
    """Training steps on resident views; forward, backward and optimizer are timed by events on the device's stream."""
    resident, on_gpu = itertools.cycle(views or bench.resident_views()), bench.device.type == "cuda"
    marks: list[tuple[str, Any]] = []  # a part, and its begin as an event or, on a CPU, in seconds

    def mark(part: str) -> None:
        now: Any = time.perf_counter()
        if on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(bench.device))
        marks.append((part, now))

    def advance(count: int) -> dict[str, float]:
        marks.clear()
        start_s = time.perf_counter()
        train_step(run, resident)  # the GPU's queue is empty: launching waits for nothing
        host_s = time.perf_counter() - start_s
        for _ in range(count - 1):
            train_step(run, resident)
        mark("end")
        bench.finish()
        parts = dict.fromkeys(("forward", "backward", "optimizer", "rest"), 0.0)
        for (part, begin), (_, end) in itertools.pairwise(marks):
            parts[part] += begin.elapsed_time(end) / 1e3 if on_gpu else end - begin
        del parts["rest"]
        return {**parts, "host": host_s * count} if on_gpu else parts

    with ExitStack() as hooks:
        for hook in (
            run.parallel.register_forward_pre_hook(lambda *_: mark("forward")),
            run.parallel.register_forward_hook(lambda *_: mark("backward")),
            run.optimizer.register_step_pre_hook(lambda *_: mark("optimizer")),
            run.optimizer.register_step_post_hook(lambda *_: mark("rest")),
        ):
            hooks.callback(hook.remove)
        yield advance


@contextmanager
def end_to_end(bench: Bench, run: Run) -> Iterator[Advance]:
    """Shards to weights: training steps with the loader; ``data_wait`` is the time that they waited for it."""
    stalls = Stalls()
    with bench.views(stalls) as batches:

        def advance(count: int) -> dict[str, float]:
            waited = sum(train_step(run, batches).wait_s for _ in range(count))
            bench.finish()
            return {"data_wait": waited + stalls.read_s()}

        yield advance


def _drain(bench: Bench, batches: Iterator[object], count: int) -> dict[str, float]:
    taken: deque[object] = deque(itertools.islice(batches, count), maxlen=1)
    assert taken, "the input of a stage is endless"
    bench.finish()
    return {}
