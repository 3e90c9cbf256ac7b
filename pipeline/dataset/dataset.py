"""Owns one dataset: reading its images by sample id, from a folder or, through the cache, from a URL."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pipeline.common.locations import Url
from pipeline.dataset.format import (
    FORMAT_VERSION,
    REPLACE,
    SAMPLES_FILE,
    Shard,
    Shards,
    open_rows,
    read_dataset_file,
    too_large_to_hash,
)
from pipeline.dataset.remote_cache import CacheConfig
from pipeline.dataset.remote_shards import PrefetchPlan, RemoteShards
from pipeline.dataset.row_check import RowCheck
from pipeline.dataset.shard_tar import split_key

MOST = 512  # shards kept open at once, well below the usual limit of 1024 per process
Opener = Callable[[int, threading.Event], "int | None"]  # (shard, cancelled) -> handle; None: it cannot be had whole


class OpenFile:
    """A file handle that closes when nobody uses it any more: a reader's own reference keeps it open while it reads."""

    def __init__(self, handle: int) -> None:
        """Takes over ``handle``."""
        self.handle = handle

    def __del__(self) -> None:
        """Close it."""
        os.close(self.handle)


class OpenFiles:
    """The shards read last. Thread-safe."""

    def __init__(self, opener: Opener) -> None:
        """``opener`` opens a shard when it is asked for; it may take its time, and others go on meanwhile."""
        self._opener = opener
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Shards that are open."""
        return len(self._files)

    def get(self, shard: int, cancelled: threading.Event) -> OpenFile | None:
        """The shard's file, opened if need be. Raises what the opener raises."""
        with self._lock:
            file = self._files.get(shard)
            if file is not None:
                self._files.move_to_end(shard)
                return file
        handle = self._opener(shard, cancelled)
        if handle is None:
            return None
        file = OpenFile(handle)
        with self._lock:
            self._files[shard] = file
            if len(self._files) > MOST:
                self._files.popitem(last=False)
        return file

    def drop(self, shard: int) -> None:
        """Open the shard anew next time."""
        with self._lock:
            self._files.pop(shard, None)

    def drop_removed(self) -> None:
        """Let go of files that were removed from their folder, so that the disk gets their room back."""
        with self._lock:
            for shard in [shard for shard, file in self._files.items() if os.fstat(file.handle).st_nlink == 0]:
                del self._files[shard]


_SYSTEM_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class BadSampleError(Exception):
    """One sample cannot be used. Training replaces it; the fields name it for the report."""

    def __init__(self, sample_id: int, shard: str, key: str, reason: str) -> None:
        """``shard`` is the tar's name, ``key`` the sample's key in it."""
        super().__init__(sample_id, shard, key, reason)
        self.sample_id, self.shard, self.key, self.reason = sample_id, shard, key, reason

    def __str__(self) -> str:
        """One line for people."""
        return f"sample {self.sample_id} (key {self.key} in {self.shard}): {self.reason}"


class ShardSet:
    """One complete dataset. Thread-safe; picklable (a copy opens the same folder again)."""

    def __init__(
        self,
        path: Path | Url,
        info: dict[str, Any],
        samples: np.ndarray,
        verify_checksums: bool,
        row_check: RowCheck | None = None,
        remote: RemoteShards | None = None,
    ) -> None:
        """Use ``ShardSet.open``."""
        self.path = path
        self.info = info  # dataset.json
        self.samples = samples
        self._rows = samples.view(np.ndarray)  # the same memory; indexing a memmap object costs several times more
        self.verify_checksums = verify_checksums
        self._row_check = row_check  # None: nothing is left to be compared
        self._remote = remote  # None: the shards lie in the folder ``path``
        self.shards: Sequence[Shard] = Shards(info["shards"])
        self.classes: tuple[str, ...] = tuple(info["classes"])
        self.num_samples: int = info["num_samples"]
        self.has_labels: bool = info["has_labels"]  # True: every sample has a label
        self.name: str = info["source"]
        self.split: str | None = info["split"]
        self.seed: int = info["seed"]  # of the shuffle when the shards were written
        self._files = OpenFiles(self._open_shard)

    @classmethod
    def open(
        cls,
        path: str | Path | Url,
        *,
        verify_checksums: bool = True,
        cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen
    ) -> ShardSet:
        """Open the dataset in folder ``path`` in well under a second: nothing is loaded, samples.npy is mapped.

        A large samples.npy is compared with its sha256 in a thread; what depends on that waits or is told. Of a remote
        dataset, samples.npy is fetched first, into ``cache``.

        Raises UserError if it is missing, half-written, of another version, or its files' sizes disagree with
        dataset.json. ``verify_checksums``: compare each image with its crc32 when it is read.
        """
        remote = None
        if isinstance(path, Url):
            remote = RemoteShards(path, cache)
            info, file, samples = remote.open_dataset()
        else:
            path = Path(path)
            info, file = read_dataset_file(path), path / SAMPLES_FILE
            samples = open_rows(file, info, str(file))
        row_check = None
        if isinstance(samples, np.memmap) and too_large_to_hash(samples):
            row_check = RowCheck(file, samples, info["samples_sha256"], len(info["classes"]), REPLACE)
        return cls(path, info, samples, verify_checksums, row_check, remote)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the path: the copy maps the same files."""
        cache = CacheConfig() if self._remote is None else self._remote.config
        return _reopen, (self.path, self.verify_checksums, cache)

    def __len__(self) -> int:
        """Number of samples."""
        return self.num_samples

    def __repr__(self) -> str:
        """Path and size, for messages."""
        return f"ShardSet({str(self.path)!r}, {self.num_samples} samples in {len(self.shards)} shards)"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 that identifies the content (images, order, labels), wherever the files lie."""
        shards = [[s["samples"], s["bytes"], s["sha256"]] for s in self.info["shards"]]
        parts = [FORMAT_VERSION, self.num_samples, self.classes, self.info["samples_sha256"], shards]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def shard_samples(self) -> np.ndarray:
        """Int64[shards]: samples of each shard; sample ids count on from shard to shard."""
        return np.array([shard["samples"] for shard in self.info["shards"]], np.int64)

    def shards_of(self, ids: ArrayLike) -> np.ndarray:
        """Int64[n]: the shards that hold samples ``ids`` (int64[n])."""
        return self._rows[np.asarray(ids, np.int64)]["shard"].astype(np.int64)

    def sizes(self, ids: ArrayLike) -> np.ndarray:
        """Int32[n, 2]: height and width in pixels of samples ``ids`` (int64[n]), as stored."""
        rows = self._rows[np.asarray(ids, np.int64)]
        return np.stack([rows["height"], rows["width"]], axis=-1).astype(np.int32)

    def labels(self, ids: ArrayLike) -> np.ndarray:
        """Int32[n]: class numbers of samples ``ids`` (int64[n]); -1 = none. Waits as ``wait_until_verified`` does."""
        self.wait_until_verified()
        return self._rows[np.asarray(ids, np.int64)]["label"].astype(np.int32)

    def wait_until_verified(self) -> None:
        """Wait until samples.npy is known to be the recorded one. Raises UserError if it is not, or cannot be read."""
        if self._row_check is not None:
            self._row_check.wait()

    def shard_path(self, shard: int) -> Path:
        """Where the tar of shard ``shard`` of a local dataset lies."""
        assert isinstance(self.path, Path)
        return self.path / self.shards[shard].name

    def index_path(self, shard: int) -> Path:
        """Where DALI's index of shard ``shard`` of a local dataset lies."""
        assert isinstance(self.path, Path)
        return self.path / self.shards[shard].index

    def read(self, sample_id: int, cancelled: threading.Event | None = None) -> bytes:
        """The encoded image. Raises BadSampleError if it cannot be read or is not what was written.

        Raises UserError once samples.npy has turned out not to be the recorded one, or if a remote shard cannot be had,
        and FetchCancelledError if ``cancelled`` is set while it is waited for.
        """
        if self._row_check is not None:
            self._row_check.raise_if_wrong()
        row = self._rows[sample_id]
        shard, offset, length = int(row["shard"]), int(row["offset"]), int(row["length"])
        cancelled = cancelled or threading.Event()
        try:
            if offset + length > self.shards[shard].bytes:
                raise self.bad_sample(sample_id, "samples.npy points beyond the end of the shard")
            if row["height"] == 0 or row["width"] == 0:
                raise self.bad_sample(sample_id, "samples.npy gives it no pixels")
            data = self._bytes(shard, offset, length, cancelled)
            flaw = self._flaw(row, data)
            if flaw is not None and self._remote is not None:  # what was fetched may have rotted in the cache
                self._remote.discard(shard)
                self._files.drop(shard)
                data = self._remote.read_range(shard, offset, length, cancelled)
                flaw = self._flaw(row, data)
        except OSError as error:
            if error.errno in _SYSTEM_LIMITS:  # this process' trouble, not the sample's
                raise
            raise self.bad_sample(sample_id, f"cannot be read: {error.strerror}") from error
        except IndexError:
            raise self.bad_sample(sample_id, f"samples.npy names shard {shard} of {len(self.shards)}") from None
        if flaw is not None:
            raise self.bad_sample(sample_id, flaw)
        return data

    def _flaw(self, row: np.void, data: bytes) -> str | None:
        """Why ``data`` is not the image that ``row`` tells of; None if it is."""
        if len(data) != int(row["length"]):
            return f"the shard ends early: {len(data)} of {int(row['length'])} bytes"
        if self.verify_checksums and zlib.crc32(data) != int(row["checksum"]):
            return "checksum differs: the bytes have changed since the shard was written"
        return None

    def key(self, sample_id: int) -> str:
        """KEY of the sample, from the tar header before its bytes. Raises OSError or tarfile.TarError."""
        row = self._rows[sample_id]
        header = self._bytes(int(row["shard"]), int(row["offset"]) - 512, 512, threading.Event())
        return split_key(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[0]

    def bad_sample(self, sample_id: int, reason: str) -> BadSampleError:
        """The error that names a sample for the report."""
        shard = int(self._rows[sample_id]["shard"])
        name = self.shards[shard].name if shard < len(self.shards) else f"shard {shard}"
        try:
            key = self.key(sample_id)
        except (OSError, IndexError, OverflowError, tarfile.TarError):
            key = "(unreadable)"
        return BadSampleError(int(sample_id), name, key, reason)

    @contextmanager
    def follow(
        self, ahead: PrefetchPlan | None, cancelled: threading.Event, max_steps_behind: int, processes: int
    ) -> Iterator[Callable[[], None]]:
        """Have the shards of a remote dataset fetched in the order of ``ahead``; call what is given as a step begins.

        Arguments as in ``RemoteShards.follow``; ``ahead`` None: read image by image. Of a local dataset: nothing.
        """
        if self._remote is None or ahead is None:
            yield lambda: None
            return
        upcoming = (np.unique(self.shards_of(ids)) for ids in ahead.steps)
        with self._remote.follow(upcoming, ahead.local_rank, cancelled, max_steps_behind, processes) as following:

            def begin() -> None:
                following.advance()
                self._files.drop_removed()

            yield begin

    def worth_fetching_whole(self, ids: ArrayLike) -> bool:
        """Whether whole shards should be fetched for the sake of samples ``ids`` (int64[n])."""
        if self._remote is None:
            return False
        rows = self._rows[np.asarray(ids, np.int64)]
        return self._remote.worth_fetching_whole(np.unique(rows["shard"]), int(rows["length"].sum(dtype=np.int64)))

    def check_room(self, shards_at_once: int, reason: str, remedy: str) -> None:
        """Raise UserError unless the cache of a remote dataset holds so many shards; ``reason`` is what needs them."""
        if self._remote is not None:
            self._remote.check_room(shards_at_once, reason, remedy)

    def _open_shard(self, shard: int, cancelled: threading.Event) -> int | None:
        if self._remote is None:
            return os.open(self.shard_path(shard), os.O_RDONLY)
        return self._remote.open(shard, cancelled)

    def _bytes(self, shard: int, offset: int, length: int, cancelled: threading.Event) -> bytes:
        file = self._files.get(shard, cancelled)  # this reference keeps it open while other threads open more
        if file is not None:
            try:
                return os.pread(file.handle, length, offset)
            except OSError:
                if self._remote is None:
                    raise  # else the cache's disk fails, and the source need not
        assert self._remote is not None
        return self._remote.read_range(shard, offset, length, cancelled)


def _reopen(path: Path | Url, verify_checksums: bool, cache: CacheConfig) -> ShardSet:
    return ShardSet.open(path, verify_checksums=verify_checksums, cache=cache)
