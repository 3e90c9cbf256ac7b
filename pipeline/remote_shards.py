"""Owns the shards of one remote dataset in one process: fetched ahead in the order in which they will be read.

A shard that the known future needs is fetched whole, into the cache. Any other picture is read alone, by its range: one
of a few that are looked at, one that replaces a bad sample, or one for whose shard there is no room.
"""

from __future__ import annotations

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

from pipeline.errors import UserError
from pipeline.fetch_plan import Turns, Window
from pipeline.location import Url
from pipeline.remote import FetchCancelledError, RemoteFolder
from pipeline.shard_cache import LEASE_S, CacheConfig, RemoteFile, ShardCache

_IDLE_S = 0.2  # between looks for more to fetch
_EVALUATION_SHARE = 0.25  # of a cache that does not hold everything: kept free for other datasets
_WHOLE_SHARE = 0.25  # of the shards' bytes must be wanted, or pictures are read one by one


@dataclass(frozen=True)
class Place:
    """This process among those of its machine."""

    number: int
    processes: int


class RemoteShards:
    """Reads the shards of the dataset below one URL. Thread-safe."""

    def __init__(self, url: Url, config: CacheConfig) -> None:
        """Raises UserError if the URL's file system or the cache's folder cannot be used."""
        self._config = config
        self._remote = RemoteFolder(url, config.retry_minutes)
        self._cache = ShardCache(self._remote, config)
        self._entries: Sequence[dict[str, Any]] = ()
        self._samples: RemoteFile | None = None
        self._followings: list[Following] = []
        self._failure: UserError | None = None  # of fetching ahead; the next reader raises it

    def read_file(self, name: str) -> bytes:
        """All of a small file of the dataset. Raises UserError if it cannot be had."""
        return self._remote.read_whole(name)

    def open_samples(self, name: str, info: dict[str, Any], dtype: np.dtype) -> Path:
        """Fetch samples.npy unless the cache has it; a path that stays good while this process lives.

        ``info``: dataset.json, whose shards are those that this object will read. Raises UserError.
        """
        self._entries = info["shards"]
        for entry in self._entries:
            if Path(entry["name"]).is_absolute():
                raise UserError(
                    f"{self._remote.url} is an index of tars that lie elsewhere ({entry['name']}); "
                    "index them where they are by a relative path, or copy them into its folder"
                )
        size = _npy_bytes(dtype, info["num_samples"])
        self._samples = RemoteFile(name, size, info["samples_sha256"])
        handle = self._cache.open(self._samples, self._needed, threading.Event())
        if handle is None:
            raise UserError(
                f"--cache-size {self._config.cache_size} has no room for {name} of {self._remote.url} "
                f"({size / 1e9:.3g} GB): take more, or another --cache-dir"
            )
        return Path(f"/dev/fd/{handle}")

    def open(self, shard: int, cancelled: threading.Event) -> int | None:
        """A handle of the shard's tar, which the caller closes; None if its pictures should be read by their ranges.

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
        self, turns: Turns, cancelled: threading.Event, *, slack: int, place: Place, together: bool
    ) -> Iterator[Following]:
        """Fetch the shards of ``turns`` ahead of use; tell ``advance`` of the returned object when a step begins.

        ``cancelled`` ends it. ``slack``: steps that some process may still read when a later one begins. ``together``:
        the steps are those of all processes of this machine, and its first one fetches; else each follows its own.
        """
        window = Window(turns, self._sizes, self.budget // (1 if together else place.processes), slack)
        following = Following(self, window, cancelled, knows_machine=together)
        threads = self._config.fetch_threads if place.number == 0 or not together else 0
        self._followings.append(following)
        with ThreadPoolExecutor(max(threads, 1), "fetch") as pool:
            for _ in range(threads):
                pool.submit(following.work)
            try:
                yield following
            finally:
                cancelled.set()
                self._followings.remove(following)

    @property
    def budget(self) -> int:
        """Bytes of the cache that may hold shards fetched ahead."""
        assert self._samples is not None
        room = self._cache.limit - self._samples.bytes
        return room if sum(self._sizes) <= room else int(room * (1 - _EVALUATION_SHARE))

    def check_room(self, needed: int, reason: str, remedy: str) -> None:
        """Raise UserError unless ``needed`` bytes of shards fit the cache at once."""
        if needed > self.budget:
            raise UserError(
                f"--cache-size {self._config.cache_size} is too small for {self._remote.url}: {reason} needs "
                f"{needed / 1e9:.3g} GB of shards at once, and there is room for {max(self.budget, 0) / 1e9:.3g} GB; "
                f"{remedy}"
            )

    def pays(self, shards: np.ndarray, wanted_bytes: int) -> bool:
        """Whether to fetch whole ``shards`` for the sake of ``wanted_bytes`` in them."""
        return wanted_bytes >= _WHOLE_SHARE * sum(self._sizes[shard] for shard in shards.tolist())

    def prefetch(self, shard: int, cancelled: threading.Event) -> bool:
        """As ShardCache.fetch; a failure is kept for the next reader."""
        try:
            return self._cache.fetch(self._file(shard), self._needed, cancelled)
        except UserError as error:
            self._failure = error
            raise

    def announce(self, shards: Iterator[int]) -> None:
        """Keep files of the cache from its other users."""
        assert self._samples is not None
        for file in (self._samples, *map(self._file, shards)):
            self._cache.announce(file)

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


class Following:
    """One known future and the threads that fetch it."""

    def __init__(self, shards: RemoteShards, window: Window, cancelled: threading.Event, knows_machine: bool) -> None:
        """Use ``RemoteShards.follow``."""
        self._shards, self._window, self._cancelled = shards, window, cancelled
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
            self._changed.notify_all()

    def work(self) -> None:
        """Fetch what comes next, until cancelled or a fetch fails for good."""
        while not self._cancelled.is_set():
            with self._changed:
                shard = self._window.take()
                if shard is None:
                    self._changed.wait(_IDLE_S)
            try:
                if shard is not None and not self._shards.prefetch(shard, self._cancelled):
                    self._later(shard)
            except (UserError, FetchCancelledError):
                return  # the next reader raises what was kept; the cancelled need nothing any more
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
        self._shards.announce(window)


def _npy_bytes(dtype: np.dtype, rows: int) -> int:
    """The size of a .npy file of a one-dimensional array."""
    header = BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(header, fields)
    return len(header.getvalue()) + rows * dtype.itemsize
