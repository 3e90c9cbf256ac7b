"""From sample ids to batches of encoded images: read ahead in threads, good samples in the place of bad ones."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from pipeline.backends.base import Batch, HeaderCheck
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import BadSampleError
from pipeline.dataset.mixture import Dataset
from pipeline.loader.bad_samples import BadSamples
from pipeline.sampling.sampler import BatchIds
from pipeline.sampling.views import CentreCrops, ViewParams

IDS_PER_READ = 16  # samples that one task of a thread reads; for small images the hand-over costs more than the read
# The sample that was read, its encoded image, and what the back end has against its header
Read = tuple[int, NDArray[np.uint8], "str | None"]
# (batch, sources) -> what to cut out of the images of samples ``sources``
DrawWindows = Callable[[BatchIds, Int64[np.ndarray, " n"]], "ViewParams | CentreCrops"]


class Assembler:
    """Reads batches of a dataset, or of a mixture."""

    def __init__(
        self,
        dataset: Dataset,
        draw: DrawWindows,
        pool: ThreadPoolExecutor,
        bad: BadSamples,
        cancelled: threading.Event | None = None,
    ) -> None:
        """``draw`` gives what to cut out of each sample; ``cancelled`` ends reads that wait for a remote dataset."""
        self._dataset = dataset
        self._draw = draw
        self._pool = pool
        self._bad = bad
        self._cancelled = cancelled or threading.Event()
        self._header_check: HeaderCheck | None = None

    def check_headers(self, check: HeaderCheck | None) -> None:
        """Let the reading threads ask ``check`` of each image. To be called before anything is read."""
        self._header_check = check

    def read_ahead(self, batches: Iterable[BatchIds], depth: int) -> Iterator[Batch]:
        """The batches in order, ``depth`` of them being read while one is used."""
        batches = iter(batches)
        waiting = deque((batch, self._start(batch.ids)) for batch in islice(batches, depth))
        while waiting:
            batch, parts = waiting.popleft()
            waiting.extend((later, self._start(later.ids)) for later in islice(batches, 1))
            yield self._batch(batch, [read for part in parts for read in part.result()])

    def replace_bad(self, batch: Batch) -> Batch:
        """The same batch without the samples that have become known as bad since it was read."""
        reads = [read for part in self._start(batch.ids) for read in part.result()]
        return self._batch(BatchIds(batch.epoch, batch.step, batch.ids, batch.pair), reads)

    def note_bad(self, sample_id: int, reason: str) -> None:
        """Note that a sample's image, which was read, cannot be decoded. Raises UserError when there are too many."""
        self._bad.add(self._dataset.bad_sample(sample_id, reason, self._dataset.is_as_sharded(sample_id)))

    def _start(self, ids: Int64[np.ndarray, " n"]) -> list[Future[list[Read]]]:
        ids = ids % self._dataset.num_samples  # of a mixture they also say how often before in the epoch
        groups = (ids[start : start + IDS_PER_READ].tolist() for start in range(0, len(ids), IDS_PER_READ))
        return [self._pool.submit(self._read_group, group) for group in groups]

    def _read_group(self, group: list[int]) -> list[Read]:
        return [self._read(sample_id) for sample_id in group]

    def _batch(self, batch: BatchIds, reads: list[Read]) -> Batch:
        sources = np.array([source for source, _, _ in reads], dtype=np.int64)
        encoded, windows = [image for _, image, _ in reads], self._draw(batch, sources)
        faults = None if self._header_check is None else [fault for _, _, fault in reads]
        return Batch(batch.epoch, batch.step, batch.ids, sources, encoded, windows, batch.pair, faults)

    def _read(self, sample_id: int) -> Read:
        """The first good sample from ``sample_id`` on, and its bytes."""
        for source in self._bad.candidates(sample_id):
            try:
                image = np.frombuffer(self._dataset.read(source, self._cancelled), dtype=np.uint8)
                return source, image, None if self._header_check is None else self._header_check(image)
            except BadSampleError as error:
                self._bad.add(error)
        raise UserError(f"no sample of {self._dataset.path} can be read or decoded: the reports of bad samples say why")
