"""Owns the shards of one remote dataset in one process: fetched ahead in the order in which they will be read.

A shard that the known future needs is fetched whole, into the cache. Any other image is read alone, by its range: one
of a few that are looked at, one that replaces a bad sample, or one for whose shard there is no room.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from pipeline.common.errors import UserError
from pipeline.common.locations import Url
from pipeline.dataset.format import (
    DATASET_FILE,
    SAMPLE_DTYPE,
    SAMPLES_FILE,
    DamagedError,
    check_counts,
    open_rows,
    parse_dataset_file,
)
from pipeline.dataset.prefetch_window import Upcoming, Window
from pipeline.dataset.remote_cache import LEASE_S, CacheConfig, RemoteFile, ShardCache
from pipeline.dataset.remote_files import FetchCancelledError, RemoteFolder

LARGEST_DATASET_FILE = 256 << 20  # bytes of dataset.json: more than a million shards
_READ_ATTEMPTS = 3  # of a dataset.json that comes damaged
_IDLE_S = 0.2  # between looks for more to fetch
_EVALUATION_SHARE = 0.25  # of a cache that does not hold everything: for what is read beside training
_WHOLE_SHARE = 0.25  # of the shards' bytes must be wanted, or images are read one by one


@dataclass(frozen=True)
class PrefetchPlan:
    """What is known of a loader's future."""

    steps: Iterator[Int64[np.ndarray, "_"]]  # the samples of each step  # noqa: F821
    # Which of its machine's processes this is, where the steps are those of all of them; None: they are this one's own
    local_rank: int | None


class RemoteShards:
    """Reads the shards of the dataset below one URL. Thread-safe."""

    def __init__(self, url: Url, config: CacheConfig) -> None:
        """Raises UserError if the URL's file system or the cache's folder cannot be used."""
        self.config = config
        self._remote = RemoteFolder(url, config.retry_minutes)
        self._cache = ShardCache(self._remote, config)
        self._entries: Sequence[dict[str, Any]] = ()
        self._samples: RemoteFile | None = None
        self._followings: list[ShardPrefetcher] = []
        self._failure: Exception | None = None  # of fetching ahead; the next reader raises it

    def open_dataset(self) -> tuple[dict[str, Any], Path, np.ndarray]:
        """dataset.json, a path of samples.npy that stays good while this process lives, and its rows.

        samples.npy is fetched unless the cache has it. Raises UserError if either cannot be had or is damaged.
        """
        info = self._dataset_file()
        self._entries = info["shards"]
        self._samples = RemoteFile(SAMPLES_FILE, _npy_bytes(info["num_samples"]), info["samples_sha256"])
        try:
            return info, *self._open_samples(info)
        except UserError:
            if not self._cache.has(self._samples):
                raise
            self._cache.discard(self._samples)  # it may have rotted there
            return info, *self._open_samples(info)

    def _dataset_file(self) -> dict[str, Any]:
        name = f"{DATASET_FILE} of {self._remote.url}"
        for attempt in range(_READ_ATTEMPTS):
            try:
                info = parse_dataset_file(self._remote.read_whole(DATASET_FILE, LARGEST_DATASET_FILE), name)
                check_counts(info, name)
                break
            except DamagedError:
                if attempt == _READ_ATTEMPTS - 1:
                    raise
        for entry in info["shards"]:
            if os.path.isabs(entry["name"]):
                raise UserError(
                    f"{self._remote.url} is an index of tars that lie elsewhere ({entry['name']}): "
                    "put the tars into its folder and make the index there"
                )
        return info

    def _open_samples(self, info: dict[str, Any]) -> tuple[Path, np.ndarray]:
        assert self._samples is not None
        handle = self._cache.open(self._samples, self._needed, threading.Event())
        if handle is None:
            raise UserError(
                f"--cache-size {self.config.cache_size} has no room for {SAMPLES_FILE} of {self._remote.url} "
                f"({self._samples.bytes / 1e9:.3g} GB): take more, or another --cache-dir"
            )
        file = Path(f"/dev/fd/{handle}")
        return file, open_rows(file, info, f"{SAMPLES_FILE} of {self._remote.url}")

    def open(self, shard: int, cancelled: threading.Event) -> int | None:
        """A handle of the shard's tar, which the caller closes; None if its images should be read by their ranges.

        Waits while it is fetched. Raises UserError if it cannot be had, FetchCancelledError if ``cancelled`` is set.
        """
        if self._failure is not None:
            raise self._failure
        file = self._file(shard)
        if not self._cache.has(file) and not self._is_awaited(shard):
            return None
        return self._cache.open(file, self._needed, cancelled)

    def read_range(self, shard: int, offset: int, length: int, cancelled: threading.Event) -> bytes:
        """``length`` bytes from byte ``offset`` of a shard, not through the cache. Raises as ``open``."""
        return self._remote.read(self._entries[shard]["name"], offset, length, cancelled)

    def discard(self, shard: int) -> None:
        """Remove a shard from the cache that has turned out to be damaged there."""
        self._cache.discard(self._file(shard))

    @contextmanager
    def follow(
        self,
        upcoming: Upcoming,
        local_rank: int | None,
        cancelled: threading.Event,
        max_steps_behind: int,
        processes: int,
    ) -> Iterator[ShardPrefetcher]:
        """Fetch the shards of ``upcoming`` ahead of use; tell ``advance`` of the returned object when a step begins.

        ``local_rank``: as in ``PrefetchPlan``. ``cancelled`` ends it all. ``max_steps_behind``: steps that some process
        may still read when a later one begins. ``processes`` of this machine.
        """
        if local_rank is None:
            budget = int(self._room * _EVALUATION_SHARE) // processes
        else:
            budget = self.budget
        window = Window(upcoming, self._sizes, budget, max_steps_behind)
        threads = self.config.fetch_threads if not local_rank else 0
        following = ShardPrefetcher(self, window, cancelled, knows_machine=local_rank is not None, fetches=threads > 0)
        self._followings.append(following)
        with ThreadPoolExecutor(max(threads, 1), "fetch") as pool:
            for _ in range(threads):
                pool.submit(following.work)
            try:
                yield following
            finally:
                cancelled.set()
                self._followings.remove(following)

    @cached_property
    def budget(self) -> int:
        """Bytes of the cache that may hold shards fetched ahead for training."""
        return self._room if sum(self._sizes) <= self._room else int(self._room * (1 - _EVALUATION_SHARE))

    @property
    def _room(self) -> int:
        assert self._samples is not None
        return self._cache.limit - self._samples.bytes

    def check_room(self, shards_at_once: int, reason: str, remedy: str) -> None:
        """Raise UserError unless the cache holds so many shards at once; ``reason`` is what needs them."""
        assert self._samples is not None
        needed, whole = sum(sorted(self._sizes)[-shards_at_once:]), sum(self._sizes)
        if needed > self.budget:
            least = self._samples.bytes + min(needed / (1 - _EVALUATION_SHARE), whole)
            raise UserError(
                f"--cache-size {self.config.cache_size} is too small for {self._remote.url}: {reason} reads from "
                f"{_gb(needed)} of shards at a time, and there is room for {_gb(max(self.budget, 0))}; {remedy}, or a "
                f"--cache-size of {_gb(least)} at least"
            )

    def worth_fetching_whole(self, shards: np.ndarray, wanted_bytes: int) -> bool:
        """Whether to fetch whole ``shards`` for the sake of ``wanted_bytes`` in them."""
        return wanted_bytes >= _WHOLE_SHARE * sum(self._sizes[shard] for shard in shards.tolist())

    def prefetch(self, shard: int, cancelled: threading.Event) -> bool:
        """As ShardCache.fetch."""
        return self._cache.fetch(self._file(shard), self._needed, cancelled)

    def fail(self, error: Exception) -> None:
        """Let the next reader raise what ended the fetching ahead."""
        if not isinstance(error, UserError):  # a fault of this program, whatever its class: no reader may take it on
            wrapped = RuntimeError(f"fetching ahead failed: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        self._failure = error

    def renew_leases(self, shards: Iterator[int]) -> None:
        """Keep files of the cache from its other users."""
        assert self._samples is not None
        for file in (self._samples, *map(self._file, shards)):
            self._cache.renew_lease(file)

    @cached_property
    def _sizes(self) -> list[int]:
        return [entry["bytes"] for entry in self._entries]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {entry["sha256"]: number for number, entry in enumerate(self._entries)}

    def _file(self, shard: int) -> RemoteFile:
        entry = self._entries[shard]
        return RemoteFile(entry["name"], entry["bytes"], entry["sha256"])

    def _is_awaited(self, shard: int) -> bool:
        return any(shard in following for following in self._followings)

    def _needed(self, sha256: str) -> bool | None:
        """Whether a file of the cache must stay; None where this process cannot know."""
        if self._samples is not None and sha256 == self._samples.sha256:
            return True
        shard = self._numbers.get(sha256)
        if shard is None:
            return None
        if self._is_awaited(shard):
            return True
        return False if any(following.knows_machine for following in self._followings) else None


class ShardPrefetcher:
    """One known future and the threads that fetch it."""

    def __init__(
        self, shards: RemoteShards, window: Window, cancelled: threading.Event, *, knows_machine: bool, fetches: bool
    ) -> None:
        """Use ``RemoteShards.follow``."""
        self._shards, self._window, self._cancelled, self._fetches = shards, window, cancelled, fetches
        self.knows_machine = knows_machine  # so that shards outside the window may go at once
        self._changed = threading.Condition()
        self._announced_s = time.monotonic()

    def __contains__(self, shard: int) -> bool:
        """Whether one of the next steps, as far as the cache holds them, reads the shard."""
        with self._changed:
            return shard in self._window

    def advance(self) -> None:
        """The next step begins to be read."""
        with self._changed:
            self._window.advance()
            if not self._fetches:
                self._window.look_ahead()
            self._changed.notify_all()

    def work(self) -> None:
        """Fetch what comes next, until cancelled or something fails for good; the next reader raises that."""
        try:
            self._work()
        except FetchCancelledError:
            return
        except Exception as error:  # noqa: BLE001  handed on, whatever it is
            self._shards.fail(error)

    def _work(self) -> None:
        while not self._cancelled.is_set():
            with self._changed:
                shard = self._window.take()
                if shard is None:
                    self._changed.wait(_IDLE_S)
            if shard is not None and not self._shards.prefetch(shard, self._cancelled):
                self._later(shard)
            self._announce()

    def _later(self, shard: int) -> None:
        with self._changed:
            self._window.put_back(shard)
            self._changed.wait(_IDLE_S)

    def _announce(self) -> None:
        with self._changed:
            if time.monotonic() - self._announced_s < LEASE_S / 10:
                return
            self._announced_s, window = time.monotonic(), iter(self._window)
        self._shards.renew_leases(window)


def _npy_bytes(rows: int) -> int:
    """The size of samples.npy."""
    header = BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(SAMPLE_DTYPE), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(header, fields)
    return len(header.getvalue()) + rows * SAMPLE_DTYPE.itemsize


def _gb(size: float) -> str:
    return f"{size / 1e9:.4g} GB"
