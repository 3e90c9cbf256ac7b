"""The store of a remote dataset: shards are fetched ahead of use, in the order in which they will be read.

A shard that the plan needs is fetched whole, into the cache. Any other image is read alone, by its range: one of a few,
one that replaces a bad sample, or one for whose shard there is no room. One ``RemoteShards`` serves one process.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

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
    read_dataset_file,
)
from pipeline.dataset.names import NAME_STARTS_FILE, NAMES_FILE, Names, map_names, name_starts_bytes, open_names
from pipeline.dataset.prefetch_window import Upcoming, Window
from pipeline.dataset.remote_cache import LEASE_S, CacheConfig, RemoteFile, ShardCache
from pipeline.dataset.remote_files import FetchCancelledError, RemoteFolder
from pipeline.dataset.shard_store import OpenFiles

LARGEST_DATASET_FILE = 256 << 20  # bytes of dataset.json: more than a million shards
_READ_ATTEMPTS = 3  # of a dataset.json that arrives damaged
_IDLE_S = 0.2  # between looks for more to fetch
_EVALUATION_SHARE = 0.25  # of a cache that does not hold all shards: for evaluation during training
_WHOLE_SHARE = 0.25  # of the shards' bytes must be wanted, or images are read one by one


class RemoteShards:
    """The ShardStore of the dataset below one URL, or of tars there whose index is a folder of this machine."""

    def __init__(self, url: Url, config: CacheConfig, index: Path | None = None) -> None:
        """``index``: the folder of dataset.json and samples.npy, where they do not lie below the URL.

        Raises UserError if the URL's file system or the cache's folder cannot be used.
        """
        self.path: Path | Url = url if index is None else index
        self.cache, self._index = config, index
        self._remote = RemoteFolder(url, config.retry_minutes)
        self._cache = ShardCache(self._remote, config)
        self._files = OpenFiles(self._open)
        self._entries: Sequence[dict[str, Any]] = ()
        self._samples: RemoteFile | None = None
        self._prefetchers: list[ShardPrefetcher] = []
        self._sharers: Sequence[RemoteShards] = (self,)  # all that share the room of the cache
        # Shard -> (offset, length) -> crc32 and sha256 of what the server gave for that range
        self._unverified: dict[int, dict[tuple[int, int], tuple[int, bytes]]] = {}
        self._failure: Exception | None = None  # of fetching ahead; the next reader raises it

    def open_dataset(self) -> tuple[dict[str, Any], Path, np.ndarray]:
        """As ShardStore; the path of samples.npy stays valid while this process lives.

        samples.npy is fetched unless the cache has it. Raises UserError also if either cannot be fetched.
        """
        if self._index is not None:
            info, file = read_dataset_file(self._index, check_files=False), self._index / SAMPLES_FILE
            check_counts(info, str(self._index / DATASET_FILE))
            self._check_places(info, str(self._index / DATASET_FILE))
            self._entries = info["shards"]
            return info, file, open_rows(file, info, str(file))
        info = self._dataset_file()
        self._entries = info["shards"]
        self._samples = RemoteFile(SAMPLES_FILE, _npy_bytes(info["num_samples"]), info["samples_sha256"])
        try:
            return info, *self._open_samples(info)
        except UserError:
            if not self._cache.has(self._samples):
                raise
            self._cache.discard(self._samples)  # it may have been damaged there
            return info, *self._open_samples(info)

    def open_names(self, info: dict[str, Any]) -> Names | None:
        """As ShardStore: fetched unless the cache has them."""
        if self._index is not None:
            return open_names(self._index, info)
        if "names" not in info:
            return None
        about = info["names"]
        wanted = (
            RemoteFile(NAMES_FILE, about["bytes"], about["sha256"]),
            RemoteFile(NAME_STARTS_FILE, name_starts_bytes(info["num_samples"]), about["starts_sha256"]),
        )
        handles: list[int] = []
        try:
            for file in wanted:
                handle = self._cache.open(file, self._needed, threading.Event())
                if handle is None:
                    raise UserError(
                        f"--cache-size {self.cache.cache_size} has no room for {file.name} of {self._remote.url} "
                        f"({file.bytes / 1e9:.3g} GB): take more, or another --cache-dir"
                    )
                handles.append(handle)
            text, starts = (Path(f"/dev/fd/{handle}") for handle in handles)
            return map_names(text, starts, info)
        finally:
            for handle in handles:
                os.close(handle)  # what is mapped stays

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
        self._check_places(info, name)
        return info

    def _check_places(self, info: dict[str, Any], name: str) -> None:
        for entry in info["shards"]:
            if os.path.isabs(entry["name"]):
                raise UserError(
                    f"{self._remote.url} is an index of tars that lie elsewhere ({entry['name']}): "
                    "put the tars into its folder and make the index there"
                )
            if not lies_below(entry["name"]):
                raise UserError(f"{name} is damaged: it names the shard {entry['name']!r} outside of its folder")

    def _open_samples(self, info: dict[str, Any]) -> tuple[Path, np.ndarray]:
        assert self._samples is not None
        handle = self._cache.open(self._samples, self._needed, threading.Event())
        if handle is None:
            raise UserError(
                f"--cache-size {self.cache.cache_size} has no room for {SAMPLES_FILE} of {self._remote.url} "
                f"({self._samples.bytes / 1e9:.3g} GB): take more, or another --cache-dir"
            )
        file = Path(f"/dev/fd/{handle}")
        return file, open_rows(file, info, f"{SAMPLES_FILE} of {self._remote.url}")

    def read(self, shard: int, offset: int, length: int, cancelled: threading.Event) -> bytes:
        """As ShardStore: from the cache if the shard is there or expected there, else by its range."""
        file = self._files.get(shard, cancelled)  # keeps the file open while other threads open more
        if file is not None:
            try:
                return os.pread(file.handle, length, offset)
            except OSError:  # the cache's disk fails; the source may not
                pass
        return self._read_range(shard, offset, length, cancelled)

    def read_from_source(self, shard: int, offset: int, length: int, cancelled: threading.Event) -> bytes | None:
        """As ShardStore: removes the shard from the cache, and reads the range from the URL."""
        self._cache.discard(self._file(shard))
        self._files.drop(shard)
        return self._read_range(shard, offset, length, cancelled)

    def _open(self, shard: int, cancelled: threading.Event) -> int | None:
        """A handle of the shard's tar, which the caller closes; None if its images should be read by their ranges.

        Waits while the shard is fetched. Raises UserError if it cannot be, FetchCancelledError if ``cancelled`` is set.
        """
        if self._failure is not None:
            raise self._failure
        file = self._file(shard)
        if not self._cache.has(file) and not self._is_awaited(shard):
            return None
        handle = self._cache.open(file, self._needed, cancelled)
        if handle is not None:
            self._verify_ranges(shard, handle)
        return handle

    def _read_range(self, shard: int, offset: int, length: int, cancelled: threading.Event) -> bytes:
        data = self._remote.read(self._entries[shard]["name"], offset, length, cancelled)
        self._unverified.setdefault(shard, {})[offset, length] = zlib.crc32(data), hashlib.sha256(data).digest()
        return data

    def _verify_ranges(self, shard: int, handle: int) -> None:
        """Compare what was read by range with the shard, whose sha256 is known to fit. Raises UserError.

        Another crc32 was noticed when the image was read; the same one over other bytes is intent.
        """
        for (offset, length), (checksum, digest) in self._unverified.pop(shard, {}).items():
            data = os.pread(handle, length, offset)
            if zlib.crc32(data) == checksum and hashlib.sha256(data).digest() != digest:
                os.close(handle)
                raise UserError(
                    f"the server of {self._remote.url} gave other bytes for a range of {self._entries[shard]['name']} "
                    f"(from byte {offset:,}) than the shard has: steps since then may rest on a forged image; look at "
                    "the server, then go on from a checkpoint of before"
                )

    @contextmanager
    def follow(
        self,
        upcoming: Upcoming,
        local_rank: int | None,
        cancelled: threading.Event,
        max_steps_behind: int,
        processes: int,
    ) -> Iterator[Callable[[], None]]:
        """As ShardStore: the first process of a machine fetches, into the cache."""
        if local_rank is None:
            budget = int(self._room * _EVALUATION_SHARE) // processes
        else:
            budget = self.budget
        window = Window(upcoming, self._sizes, budget, max_steps_behind)
        threads = self.cache.fetch_threads if not local_rank else 0
        prefetcher = ShardPrefetcher(self, window, cancelled, knows_machine=local_rank is not None, fetches=threads > 0)
        self._prefetchers.append(prefetcher)
        with ThreadPoolExecutor(max(threads, 1), "fetch") as pool:
            for _ in range(threads):
                pool.submit(prefetcher.work)
            try:
                yield prefetcher.advance
            finally:
                cancelled.set()
                self._prefetchers.remove(prefetcher)

    def share_cache(self, stores: Sequence[RemoteShards]) -> None:
        """Leave room in the cache for the others of ``stores``, and no shard unneeded that one of them needs."""
        self._sharers = stores

    @cached_property
    def budget(self) -> int:
        """Bytes of the cache that may hold shards fetched ahead for training."""
        return self._room if sum(self._sizes) <= self._room else int(self._room * (1 - _EVALUATION_SHARE))

    @property
    def _room(self) -> int:
        """Bytes of the cache for shards."""
        return (self._cache.limit - self._rows_bytes) * sum(self._sizes) // max(1, self._all_bytes)

    @property
    def _rows_bytes(self) -> int:
        """Bytes of samples.npy, of all datasets that share the cache."""
        return sum(store._samples.bytes for store in self._sharers if store._samples is not None)

    @property
    def _all_bytes(self) -> int:
        """Bytes of the shards of all of them. Each has a part of the cache by its size."""
        return sum(sum(store._sizes) for store in self._sharers)

    def check_room(self, shards_at_once: int, reason: str, remedy: str) -> None:
        """As ShardStore: of the cache."""
        needed, whole = sum(sorted(self._sizes)[-shards_at_once:]), sum(self._sizes)
        if needed > self.budget:
            least = self._rows_bytes + min(needed / (1 - _EVALUATION_SHARE), whole) * self._all_bytes / whole
            raise UserError(
                f"--cache-size {self.cache.cache_size} is too small for {self._remote.url}: {reason} reads from "
                f"{_gb(needed)} of shards at a time, and there is room for {_gb(max(self.budget, 0))}; {remedy}, or a "
                f"--cache-size of {_gb(least)} at least"
            )

    def worth_fetching_whole(self, shards: np.ndarray, wanted_bytes: int) -> bool:
        return wanted_bytes >= _WHOLE_SHARE * sum(self._sizes[shard] for shard in shards.tolist())

    def prefetch(self, shard: int, cancelled: threading.Event) -> bool:
        return self._cache.fetch(self._file(shard), self._needed, cancelled)

    def fail(self, error: Exception) -> None:
        """Have the next reader raise what ended the fetching ahead."""
        if not isinstance(error, UserError):  # a fault of this program: no reader may handle it by its class
            wrapped = RuntimeError(f"fetching ahead failed: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            error = wrapped
        self._failure = error

    def close_removed(self) -> None:
        """Close shards that were removed from the cache, so that their disk space is freed."""
        self._files.drop_removed()

    def renew_leases(self, shards: Iterator[int]) -> None:
        """Keep other users of the cache from removing these shards."""
        rows = () if self._samples is None else (self._samples,)
        for file in (*rows, *map(self._file, shards)):
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
        return any(shard in prefetcher for prefetcher in self._prefetchers)

    def _needed(self, sha256: str) -> bool | None:
        """Whether a file of the cache must stay; None where this process cannot know."""
        answers = [store._needed_here(sha256) for store in self._sharers]
        return True if True in answers else None if answers.count(None) == len(answers) else False

    def _needed_here(self, sha256: str) -> bool | None:
        if self._samples is not None and sha256 == self._samples.sha256:
            return True
        shard = self._numbers.get(sha256)
        if shard is None:
            return None
        if self._is_awaited(shard):
            return True
        return False if any(prefetcher.knows_machine for prefetcher in self._prefetchers) else None


class ShardPrefetcher:
    """One plan and the threads that fetch its shards."""

    def __init__(
        self, shards: RemoteShards, window: Window, cancelled: threading.Event, *, knows_machine: bool, fetches: bool
    ) -> None:
        self._shards, self._window, self._cancelled, self._fetches = shards, window, cancelled, fetches
        self.knows_machine = knows_machine  # so that shards outside the window may go at once
        self._changed = threading.Condition()
        self._renewed_s = time.monotonic()

    def __contains__(self, shard: int) -> bool:
        """Whether one of the next steps, as far as the cache holds them, reads the shard."""
        with self._changed:
            return shard in self._window

    def advance(self) -> None:
        with self._changed:
            self._window.advance()
            if not self._fetches:
                self._window.look_ahead()
            self._changed.notify_all()
        self._shards.close_removed()

    def work(self) -> None:
        """Fetch what comes next, until cancelled or something fails for good; the next reader raises that."""
        try:
            self._work()
        except FetchCancelledError:
            return
        except Exception as error:  # noqa: BLE001  passed on to the next reader
            self._shards.fail(error)

    def _work(self) -> None:
        while not self._cancelled.is_set():
            with self._changed:
                shard = self._window.take()
                if shard is None:
                    self._changed.wait(_IDLE_S)
            if shard is not None and not self._shards.prefetch(shard, self._cancelled):
                self._later(shard)
            self._renew_leases()

    def _later(self, shard: int) -> None:
        with self._changed:
            self._window.put_back(shard)
            self._changed.wait(_IDLE_S)

    def _renew_leases(self) -> None:
        with self._changed:
            if time.monotonic() - self._renewed_s < LEASE_S / 10:
                return
            self._renewed_s, window = time.monotonic(), iter(self._window)
        self._shards.renew_leases(window)


def lies_below(name: str) -> bool:
    """Whether a shard's name is that of a file in the folder or below it, however a server reads it."""
    return "\0" not in name and not {"", ".", ".."} & set(name.replace("\\", "/").split("/"))


def _npy_bytes(rows: int) -> int:
    header = BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(SAMPLE_DTYPE), "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(header, fields)
    return len(header.getvalue()) + rows * SAMPLE_DTYPE.itemsize


def _gb(size: float) -> str:
    return f"{size / 1e9:.4g} GB"
