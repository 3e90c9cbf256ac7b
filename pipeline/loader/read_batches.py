"""Owns the way from sample ids to a batch of encoded images: read ahead in threads, put good samples for bad ones.

The rule of replacement: sample i that cannot be read or decoded is replaced by (i + 1) mod num_samples, again until
one is good, with that sample's own views. It is a function of integers and of what is on disk, so every rank and every
resumed run replaces alike.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from pipeline.backends.base import Batch
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.loader.bad_samples import BadSamples
from pipeline.loader.timing import ReadCosts
from pipeline.sampling.sampler import BatchIds
from pipeline.sampling.views import CentreCrops, ViewParams

IDS_PER_READ = 16  # samples a thread reads at a time; small images cost more in hand-over than in reading
Read = tuple[int, NDArray[np.uint8]]  # the sample that was read, and its encoded image
DrawWindows = Callable[[int, Int64[np.ndarray, " n"]], "ViewParams | CentreCrops"]  # (epoch, ids) -> windows


class Assembler:
    """Reads batches of one dataset."""

    def __init__(
        self,
        dataset: ShardSet,
        draw: DrawWindows,
        pool: ThreadPoolExecutor,
        bad: BadSamples,
        costs: ReadCosts | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        """``draw`` says what to cut out of each sample; ``pool`` reads; ``costs`` hears how long each read took.

        ``cancelled`` ends reads that wait for a remote dataset.
        """
        self._dataset = dataset
        self._draw = draw
        self._pool = pool
        self._bad = bad
        self._costs = costs
        self._cancelled = cancelled or threading.Event()

    def read_ahead(self, places: Iterable[BatchIds], depth: int) -> Iterator[Batch]:
        """The batches of ``places`` in order, ``depth`` of them being read while one is used."""
        places = iter(places)
        waiting = deque((place, self._start(place[2])) for place in islice(places, depth))
        while waiting:
            (epoch, step, ids), parts = waiting.popleft()
            waiting.extend((place, self._start(place[2])) for place in islice(places, 1))
            yield self._batch(epoch, step, ids, [read for part in parts for read in part.result()])

    def replace_bad(self, batch: Batch) -> Batch:
        """The same batch without the samples that have become known as bad since it was read."""
        reads = [part.result() for part in self._start(batch.ids)]
        return self._batch(batch.epoch, batch.step, batch.ids, [read for part in reads for read in part])

    def note_bad(self, sample_id: int, reason: str) -> None:
        """Note that a sample's image cannot be used. Raises UserError when there are too many."""
        self._bad.add(self._dataset.bad_sample(sample_id, reason))

    def _start(self, ids: Int64[np.ndarray, " n"]) -> list[Future[list[Read]]]:
        groups = (ids[start : start + IDS_PER_READ].tolist() for start in range(0, len(ids), IDS_PER_READ))
        return [self._pool.submit(self._read_group, group) for group in groups]

    def _read_group(self, group: list[int]) -> list[Read]:
        if self._costs is None:
            return [self._read(sample_id) for sample_id in group]
        reads, seconds = [], []
        for sample_id in group:
            start = time.perf_counter()
            reads.append(self._read(sample_id))
            seconds.append(time.perf_counter() - start)
        self._costs.add(self._dataset.shards_of([source for source, _ in reads]), seconds)
        return reads

    def _batch(self, epoch: int, step: int, ids: Int64[np.ndarray, " n"], reads: list[Read]) -> Batch:
        sources = np.array([source for source, _ in reads], dtype=np.int64)
        return Batch(epoch, step, ids, sources, [encoded for _, encoded in reads], self._draw(epoch, sources))

    def _read(self, sample_id: int) -> Read:
        """The first good sample from ``sample_id`` on, and its bytes."""
        for distance in range(self._dataset.num_samples):
            source = (sample_id + distance) % self._dataset.num_samples
            if source in self._bad:
                continue
            try:
                return source, np.frombuffer(self._dataset.read(source, self._cancelled), dtype=np.uint8)
            except BadSampleError as error:
                self._bad.add(error)
        raise UserError(f"no sample of {self._dataset.path} can be read: check the disk or write the dataset again")
