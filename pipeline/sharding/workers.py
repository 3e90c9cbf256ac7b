"""Build shards in worker processes, with a progress bar, and end cleanly on errors, Ctrl-C and a killed main process.

Workers share only counters and a stop flag. The bytes of a shard do not depend on the worker that builds it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import Any

from tqdm import tqdm
from typing_extensions import assert_never

from pipeline.common.engine import EngineConfig, NodeRate, describe_rates, ray_engine
from pipeline.common.errors import UserError
from pipeline.common.files import disk_errors
from pipeline.common.system import cores, progress
from pipeline.dataset.format import PARTIAL_DIR
from pipeline.sharding.decode_service import Decoders, DecodeService
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.write_shard import Job
from pipeline.sources.readers import check_room


def keep_torch_out() -> None:
    """Prevent `import webdataset` from importing torch in this process; the tar writer does not need it.

    Measured: the import takes 0.2 s and 37 MB instead of 2.6 s and 541 MB.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


@contextmanager
def torch_kept_out() -> Iterator[None]:
    """As ``keep_torch_out``, for a process that others may use afterwards."""
    kept_out = "torch" not in sys.modules
    if kept_out:
        keep_torch_out()
    try:
        yield
    finally:
        if kept_out and sys.modules.get("torch", sys) is None:
            del sys.modules["torch"]


_REPORT_EVERY = 32  # images between two updates of the shared counters


def build_missing(
    job: Job,
    options: ShardingOptions,
    quiet: bool,
    in_process: bool = False,
    *,
    numbers: Sequence[int] | None = None,
    engine: EngineConfig | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Build the shards of this part that have no marker yet. Raises UserError, or the OSError of the disk.

    ``engine``: where; default: in processes of this machine.

    ``in_process``: build them in this process, one after the other. ``numbers``: these shards instead of a part.
    ``check`` is called now and then, and raises what should end the work.
    """
    part, parts = options.part_of()
    mine = list(range(part, len(job), parts)) if numbers is None else list(numbers)
    missing = [n for n, record in zip(mine, job.records(mine), strict=True) if record is None]
    workers = min(options.workers or cores(), len(missing))
    check_room(job.out, _room(job, missing, workers), "writing the shards")
    total, left = job.images(mine), job.images(missing)
    done = 0 if total is None or left is None else total - left
    quiet = quiet or not missing
    with progress(quiet, total=total, initial=done, unit=" images", smoothing=0.05) as bar:
        meter = _Meter(bar, check)
        if in_process:
            for number in missing:
                job.build(number, meter.add)
        elif missing:
            try:
                _build_with(engine or EngineConfig(), job, missing, workers, meter)
            except BrokenProcessPool as error:
                raise UserError(
                    "a worker process was killed, most likely for lack of memory: run the same command again with "
                    "fewer --workers; it goes on with the missing shards"
                ) from error


def _build_with(engine: EngineConfig, job: Job, missing: list[int], workers: int, meter: _Meter) -> None:
    match engine.engine:
        case "local":
            _build_parallel(job, missing, workers, meter)
        case "ray":
            _build_on_ray(engine, job, missing, meter)
        case _:
            assert_never(engine.engine)


def _build_on_ray(config: EngineConfig, job: Job, missing: list[int], meter: _Meter) -> None:
    with ray_engine(config, count=lambda built: built[0]) as engine:
        tasks = ((number, job.only(number)) for number in missing)
        for (number, _), (images, size) in engine.run(_build_there, tasks):
            if not job.has_marker(number):
                raise UserError(
                    f"shard {number} was written by another node of the Ray cluster, and is not in {job.out} here: OUT "
                    "must lie on a file system that all nodes share, or in a bucket (s3://, gs://)"
                )
            meter.add(images, size, engine.rates())


def _build_there(task: tuple[int, Job]) -> tuple[int, int]:
    """Build a shard on a node of a cluster; gives its images and their bytes. Raises UserError."""
    number, job = task
    done = [0, 0]

    def tick(images: int, size: int) -> None:
        done[0] += images
        done[1] += size

    if job.remote is None and not (job.out / PARTIAL_DIR).is_dir():
        raise UserError(
            f"{job.out} is not there: OUT must lie on a file system that all nodes share, or in a bucket (s3://, gs://)"
        )
    if missing := [place for place in job.sources() if not place.exists()]:
        raise UserError(
            f"SOURCE {missing[0]} is not there: it must lie on a file system that all nodes share, or behind a URL"
        )
    if job.decoders is not None:
        job.decoders = worker_decoders()
    with torch_kept_out(), disk_errors(f"writing shard {number} of {job.store.place}"):
        job.build(number, tick)
    return done[0], done[1]


@cache
def worker_decoders() -> Decoders:
    """Decoders of a worker of a cluster: a process of their own, started once an image is to be compared."""
    service = DecodeService()

    def watch() -> None:
        while True:
            time.sleep(0.2)
            service.start_if_wanted()

    threading.Thread(target=watch, daemon=True).start()
    atexit.register(service.__exit__)
    return service.client


def _room(job: Job, missing: list[int], workers: int) -> int:
    """Bytes that the shards take on the disk; on the way into a bucket one for each worker does."""
    if job.remote is None:
        return job.room(missing)
    return workers * max((job.room([number]) for number in missing[: 4 * workers]), default=0)


class _Meter:
    """Progress bar with images/s and MB/s."""

    def __init__(self, bar: tqdm, check: Callable[[], None]) -> None:
        self.bar, self.check, self.bytes, self.started = bar, check, 0, time.monotonic()

    def add(self, images: int, size: int, nodes: Sequence[NodeRate] = ()) -> None:
        """Count what was done; ``nodes``: their rates, where several machines work."""
        self.check()
        self.bytes += size
        rate = self.bytes / 1e6 / max(time.monotonic() - self.started, 1e-3)
        self.bar.set_postfix_str(f"{rate:.1f} MB/s{describe_rates(nodes)}", refresh=False)
        self.bar.update(images)


class _StoppedError(Exception):
    """The main process asked a worker to give up."""


def _build_parallel(job: Job, missing: list[int], workers: int, meter: _Meter) -> None:
    context = multiprocessing.get_context("spawn")
    images, size, stop = context.Value("q", 0), context.Value("q", 0), context.Event()
    shown = (0, 0)
    with (
        DecodeService(context) as service,
        ProcessPoolExecutor(workers, context, _start_worker, (job, service.client, images, size, stop)) as pool,
    ):
        try:
            for _ in _while_building(pool, missing, workers):
                service.start_if_wanted()
                now = (images.value, size.value)
                meter.add(now[0] - shown[0], now[1] - shown[1])
                shown = now
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _while_building(pool: ProcessPoolExecutor, missing: list[int], workers: int) -> Iterator[None]:
    """Build all shards; yields every 0.2 s. Raises the exceptions of the workers."""
    todo = iter(missing)
    # two tasks per worker: no worker idles, and few tasks remain to be cancelled after an error
    running: set[Future[None]] = {pool.submit(_build_one, n) for n in islice(todo, 2 * workers)}
    while running:
        done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        running |= {pool.submit(_build_one, n) for n in islice(todo, len(done))}
        yield


_worker: dict[str, Any] = {}  # arguments of _start_worker, in a worker process


def _start_worker(job: Job, decoders: Decoders, images: Any, size: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C and sets the stop flag
    keep_torch_out()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if job.decoders is not None:
        job.decoders = decoders
    _worker.update(job=job, images=images, size=size, stop=stop)


def _end_with_parent() -> None:
    """Exit when the main process has been killed: no worker may keep writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _build_one(number: int) -> None:
    waiting = [0, 0]

    def flush() -> None:
        for counter, value in zip((_worker["images"], _worker["size"]), waiting, strict=True):
            with counter.get_lock():
                counter.value += value
        waiting[:] = [0, 0]
        if _worker["stop"].is_set():
            raise _StoppedError

    def tick(images: int, size: int) -> None:
        waiting[0] += images
        waiting[1] += size
        if waiting[0] >= _REPORT_EVERY:
            flush()

    _worker["job"].build(number, tick)
    flush()
