"""Several datasets as one: a sample id names a dataset and one of its samples.

    mixture = Mixture([ShardSet.open("A"), ShardSet.open("B")], [1.0, 0.3])
    mixture.read(len_of_A + 7)  # sample 7 of B

Ids are numbered on from dataset to dataset. Which of them an epoch visits is decided by
pipeline/sampling/mixture_order.py from the weights.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TypeAlias

import numpy as np
from jaxtyping import Int64
from numpy.typing import ArrayLike

from pipeline.common.errors import UserError
from pipeline.dataset.dataset import BadSampleError, ShardSet, require_rgb, share_cache
from pipeline.dataset.shard_store import PrefetchPlan


class Mixture:
    """Several datasets with weights; it has what a loader needs of a ``ShardSet``. Thread-safe."""

    has_labels = False  # each dataset has classes of its own

    def __init__(self, parts: Sequence[ShardSet], weights: Sequence[float]) -> None:
        """``weights``: passes over each dataset in an epoch.

        Raises UserError for a weight that leaves no sample, and for a dataset that is there twice.
        """
        self.parts, self.weights = tuple(parts), tuple(weights)
        self.path = ", ".join(f"{part.path}:{weight:g}" for part, weight in zip(parts, weights, strict=True))
        self.names = _short_names(self.parts)
        for part in self.parts:
            require_rgb(part, "a mixture of several --data")
        _check_different(self.parts)
        self.samples_per_epoch = tuple(
            _samples_per_epoch(part, weight) for part, weight in zip(parts, weights, strict=True)
        )
        self._first = np.cumsum([0, *(part.num_samples for part in parts)])[:-1]
        self.first_samples: tuple[int, ...] = tuple(self._first.tolist())
        self.num_samples = sum(part.num_samples for part in parts)
        share_cache(self.parts)

    def __len__(self) -> int:
        """Number of samples in all datasets."""
        return self.num_samples

    channels = 3  # of each image

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch."""
        return sum(self.samples_per_epoch)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 that identifies the datasets and their order; the weights are not in it."""
        return hashlib.sha256(json.dumps([part.fingerprint for part in self.parts]).encode()).hexdigest()

    def part_of(self, ids: ArrayLike) -> Int64[np.ndarray, " n"]:
        """The number of the dataset of each of samples ``ids`` (int64[n])."""
        return np.searchsorted(self._first, np.asarray(ids, np.int64), side="right") - 1

    def draw_epochs(self, epoch: int, ids: ArrayLike) -> Int64[np.ndarray, " n"]:
        """For each sample of a batch the pass over its dataset, which its views are drawn from.

        ``ids``: int64[n] as the order gives them, plus ``num_samples`` for each time before in this epoch.
        """
        times, samples = np.divmod(np.asarray(ids, np.int64), self.num_samples)
        begun = [
            epoch * count // part.num_samples for part, count in zip(self.parts, self.samples_per_epoch, strict=True)
        ]
        return np.array(begun)[self.part_of(samples)] + times

    def sizes(self, ids: ArrayLike) -> np.ndarray:
        """As ShardSet."""
        ids = np.asarray(ids, np.int64)
        numbers, sizes = self.part_of(ids), np.empty((len(ids), 2), np.int32)
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            sizes[mine] = self.parts[number].sizes(ids[mine] - self.first_samples[number])
        return sizes

    def labels_in(self, number: int, ids: ArrayLike) -> np.ndarray:
        """As ShardSet's ``labels``, of the samples of dataset ``number``; -1 for those of others."""
        ids = np.asarray(ids, np.int64)
        labels, mine = np.full(len(ids), -1, np.int32), self.part_of(ids) == number
        labels[mine] = self.parts[number].labels(ids[mine] - self.first_samples[number])
        return labels

    def _local(self, sample_id: int) -> tuple[int, int]:
        number = int(self.part_of([sample_id])[0])
        return number, int(sample_id) - self.first_samples[number]

    def read(self, sample_id: int, cancelled: threading.Event | None = None) -> bytes:
        """As ShardSet."""
        number, local = self._local(sample_id)
        try:
            return self.parts[number].read(local, cancelled)
        except BadSampleError as error:
            raise self._of_mixture(number, error) from error

    def is_as_sharded(self, sample_id: int) -> bool:
        """As ShardSet."""
        number, local = self._local(sample_id)
        return self.parts[number].is_as_sharded(local)

    def bad_sample(self, sample_id: int, reason: str, as_sharded: bool = False) -> BadSampleError:
        """As ShardSet."""
        number, local = self._local(sample_id)
        return self._of_mixture(number, self.parts[number].bad_sample(local, reason, as_sharded))

    def _of_mixture(self, number: int, error: BadSampleError) -> BadSampleError:
        sample_id = self.first_samples[number] + error.sample_id
        shard = f"{self.names[number]}/{error.shard}"
        return BadSampleError(sample_id, shard, error.key, error.reason, error.as_sharded)

    def wait_until_verified(self) -> None:
        """As ShardSet."""
        for part in self.parts:
            part.wait_until_verified()

    @contextmanager
    def follow(
        self, plan: PrefetchPlan | None, cancelled: threading.Event, max_steps_behind: int, processes: int
    ) -> Iterator[Callable[[], None]]:
        """As ShardSet: each dataset prepares its own samples of the plan."""
        if plan is None:
            yield lambda: None
            return
        remote = [number for number, part in enumerate(self.parts) if part.is_remote]
        steps = _PerPart(self, plan.steps, remote)
        with ExitStack() as stack:
            begins = [
                stack.enter_context(
                    self.parts[number].follow(
                        PrefetchPlan(steps.of(number), plan.local_rank), cancelled, max_steps_behind, processes
                    )
                )
                for number in remote
            ]

            def begin() -> None:
                for one in begins:
                    one()

            yield begin


class _PerPart:
    """One iterator over the steps for each remote dataset; they advance apart from each other, in several threads."""

    def __init__(self, mixture: Mixture, steps: Iterator[np.ndarray], numbers: list[int]) -> None:
        self._mixture, self._steps = mixture, steps
        self._waiting: dict[int, deque[np.ndarray]] = {number: deque() for number in numbers}
        self._lock = threading.Lock()

    def of(self, number: int) -> Iterator[np.ndarray]:
        """For each step, the samples of dataset ``number``, as numbered there."""
        while True:
            with self._lock:
                if not self._waiting[number] and not self._take():
                    return
                ids = self._waiting[number].popleft()
            yield ids

    def _take(self) -> bool:
        ids = next(self._steps, None)
        if ids is None:
            return False
        ids = ids % self._mixture.num_samples
        numbers = self._mixture.part_of(ids)
        for number, waiting in self._waiting.items():
            waiting.append(ids[numbers == number] - self._mixture.first_samples[number])
        return True


Dataset: TypeAlias = ShardSet | Mixture


def _samples_per_epoch(part: ShardSet, weight: float) -> int:
    count = round(weight * part.num_samples)
    if count < 1:
        raise UserError(
            f"--data {part.path}:{weight:g} takes none of its {part.num_samples} samples in an epoch: take a weight of "
            f"{1 / part.num_samples:.2g} at least, or leave it out"
        )
    return count


def _check_different(parts: Sequence[ShardSet]) -> None:
    for one, other in itertools.combinations(parts, 2):
        if one.fingerprint == other.fingerprint:
            raise UserError(
                f"--data {one.path} and {other.path} are the same dataset: name it once, with the sum of the weights "
                "behind a colon"
            )


def _short_names(parts: Sequence[ShardSet]) -> tuple[str, ...]:
    """A name for each dataset, for metrics and reports: the last part of its path, with a number if it is taken."""
    names: list[str] = []
    for number, part in enumerate(parts):
        name = part.short_name or f"data{number}"
        names.append(name if name not in names else f"{name}.{number}")
    return tuple(names)
