"""One dataset: its images, labels and sizes by sample id, from a folder or from a URL.

dataset = ShardSet.open("DIR")
data = dataset.read(7)  # the encoded image of sample 7, compared with its checksum
"""

from __future__ import annotations

import errno
import hashlib
import json
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import ArrayLike

from pipeline.common.errors import UserError
from pipeline.common.files import read_regular
from pipeline.common.locations import Url, location
from pipeline.common.text import printable
from pipeline.dataset.format import (
    DATASET_FILE,
    FORMAT_VERSION,
    REPLACE,
    Shard,
    Shards,
    read_dataset_file,
    too_large_to_hash,
)
from pipeline.dataset.names import Names
from pipeline.dataset.remote_cache import WRONG_ATTEMPTS, CacheConfig
from pipeline.dataset.remote_shards import RemoteShards
from pipeline.dataset.row_check import RowCheck
from pipeline.dataset.shard_store import LocalShards, PrefetchPlan, ShardStore
from pipeline.dataset.shard_tar import split_key

_SYSTEM_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class BadSampleError(Exception):
    """One sample cannot be used. Training replaces it; the fields identify it in the report."""

    def __init__(self, sample_id: int, shard: str, key: str, reason: str, as_sharded: bool = False) -> None:
        """``shard`` is the tar's name, ``key`` the sample's key in it; ``as_sharded``: its bytes have not changed."""
        super().__init__(sample_id, shard, key, reason, as_sharded)
        self.sample_id, self.shard, self.key, self.reason = sample_id, shard, key, reason
        self.as_sharded = as_sharded

    def __str__(self) -> str:
        return printable(f"sample {self.sample_id} (key {self.key} in {self.shard}): {self.reason}")


class ShardSet:
    """One complete dataset. Thread-safe; picklable (a copy opens the same folder again)."""

    first_samples = (0,)  # as of a Mixture

    def __init__(
        self,
        store: ShardStore,
        info: dict[str, Any],
        samples: np.ndarray,
        verify_checksums: bool,
        row_check: RowCheck | None = None,
    ) -> None:
        self._store = store
        self.path = store.path
        self.info = info  # dataset.json
        self.samples = samples
        self._rows = samples.view(np.ndarray)  # the same memory; indexing a memmap object costs several times more
        self.verify_checksums = verify_checksums
        self._row_check = row_check  # None: samples.npy was compared when it was opened
        self.shards: Sequence[Shard] = Shards(info["shards"])
        self.classes: tuple[str, ...] = tuple(info["classes"])
        self.num_samples: int = info["num_samples"]
        self.has_labels: bool = info["has_labels"]  # True: every sample has a label
        self.name: str = info["source"]
        self.split: str | None = info["split"]
        self.seed: int = info["seed"]  # of the shuffle when the shards were written

    @classmethod
    def open(
        cls,
        path: str | Path | Url,
        *,
        verify_checksums: bool = True,
        cache: CacheConfig = CacheConfig(),  # noqa: B008  # frozen
    ) -> ShardSet:
        """Open the dataset in folder ``path`` in well under a second: nothing is loaded, samples.npy is mapped.

        A large samples.npy is compared with its sha256 in a thread; what relies on the result waits for it. Of a remote
        dataset, samples.npy is fetched first, into ``cache``.

        Raises UserError if it is missing, half-written, of another version, or its files' sizes disagree with
        dataset.json. ``verify_checksums``: compare each image with its crc32 when it is read.
        """
        store = _open_store(path, cache)
        info, file, samples = store.open_dataset()
        row_check = None
        if isinstance(samples, np.memmap) and too_large_to_hash(samples):
            row_check = RowCheck(file, samples, info["samples_sha256"], len(info["classes"]), REPLACE)
        return cls(store, info, samples, verify_checksums, row_check)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path: the copy maps the same files."""
        return _reopen, (self.path, self.verify_checksums, self._store.cache)

    def __len__(self) -> int:
        return self.num_samples

    def __repr__(self) -> str:
        return f"ShardSet({str(self.path)!r}, {self.num_samples} samples in {len(self.shards)} shards)"

    @property
    def channels(self) -> int:
        """Of each image; other than 3 if it was made with --channels."""
        return self.info.get("pixels", {}).get("channels", 3)

    @property
    def parts(self) -> tuple[ShardSet, ...]:
        """As of a Mixture."""
        return (self,)

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch: each of them once."""
        return self.num_samples

    def draw_epochs(self, epoch: int, ids: ArrayLike) -> int:
        """The epoch in which the views of samples ``ids`` are drawn."""
        return epoch

    @property
    def short_name(self) -> str:
        """The last part of the path, for people; empty if it has none."""
        path = self.path.absolute() if isinstance(self.path, Path) else PurePosixPath(urlsplit(str(self.path)).path)
        return path.name

    @property
    def is_remote(self) -> bool:
        """Whether shards are fetched."""
        return isinstance(self._store, RemoteShards)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 that identifies the content (images, order, labels), wherever the files are stored."""
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

    @cached_property
    def names(self) -> Names | None:
        """The path of each sample in the source, ``names[sample_id]``; None if the dataset was made without.

        Of a remote dataset they are fetched into the cache. Raises UserError if the files are missing or damaged.
        """
        return self._store.open_names(self.info)

    def wait_until_verified(self) -> None:
        """Wait until samples.npy is known to be the recorded one. Raises UserError if it is not, or cannot be read."""
        if self._row_check is not None:
            self._row_check.wait()

    def shard_path(self, shard: int) -> Path:
        """The path of a local dataset's tar number ``shard``."""
        assert isinstance(self.path, Path)
        return self.path / self.shards[shard].name

    def index_path(self, shard: int) -> Path:
        """The path of DALI's index of a local dataset's tar number ``shard``."""
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
            data = self._store.read(shard, offset, length, cancelled)
            flaw = self._flaw(row, data)
            for _ in range(WRONG_ATTEMPTS):  # damaged in the cache or on the way; a whole shard gets as many
                fresh = None if flaw is None else self._store.read_from_source(shard, offset, length, cancelled)
                if fresh is None:
                    break
                data, flaw = fresh, self._flaw(row, fresh)
        except OSError as error:
            if error.errno in _SYSTEM_LIMITS:  # the process is at its limit; the sample is not at fault
                raise
            raise self.bad_sample(sample_id, f"cannot be read: {error.strerror}") from error
        except IndexError:
            raise self.bad_sample(sample_id, f"samples.npy names shard {shard} of {len(self.shards)}") from None
        if flaw is not None:
            raise self.bad_sample(sample_id, flaw)
        return data

    def _flaw(self, row: np.void, data: bytes) -> str | None:
        """Why ``data`` is not the image of ``row``; None if it is."""
        if len(data) != int(row["length"]):
            return f"the shard ends early: {len(data)} of {int(row['length'])} bytes"
        if self.verify_checksums and zlib.crc32(data) != int(row["checksum"]):
            return "checksum differs: the bytes have changed since the shard was written"
        return None

    def key(self, sample_id: int) -> str:
        """KEY of the sample, from the tar header before its bytes. Raises OSError or tarfile.TarError."""
        row = self._rows[sample_id]
        header = self._store.read(int(row["shard"]), int(row["offset"]) - 512, 512, threading.Event())
        return split_key(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[0]

    def is_as_sharded(self, sample_id: int) -> bool:
        """Whether the bytes of a sample are those that were written: its checksum tells. Raises as ``read``."""
        try:
            return zlib.crc32(self.read(sample_id)) == int(self._rows[sample_id]["checksum"])
        except BadSampleError:
            return False

    def bad_sample(self, sample_id: int, reason: str, as_sharded: bool = False) -> BadSampleError:
        """The error that identifies a sample in the report."""
        shard = int(self._rows[sample_id]["shard"])
        name = self.shards[shard].name if shard < len(self.shards) else f"shard {shard}"
        try:
            key = self.key(sample_id)
        except (OSError, IndexError, OverflowError, tarfile.TarError):
            key = "(unreadable)"
        return BadSampleError(int(sample_id), name, key, reason, as_sharded)

    @contextmanager
    def follow(
        self, plan: PrefetchPlan | None, cancelled: threading.Event, max_steps_behind: int, processes: int
    ) -> Iterator[Callable[[], None]]:
        """Have the store prepare the shards of ``plan`` ahead of use; call the result when a step begins.

        Arguments as in ``ShardStore.follow``; ``plan`` None: read image by image.
        """
        if plan is None:
            yield lambda: None
            return
        upcoming = (np.unique(self.shards_of(ids)) for ids in plan.steps)
        with self._store.follow(upcoming, plan.local_rank, cancelled, max_steps_behind, processes) as begin_step:
            yield begin_step

    def worth_fetching_whole(self, ids: ArrayLike) -> bool:
        """Whether whole shards should be fetched for the sake of samples ``ids`` (int64[n])."""
        rows = self._rows[np.asarray(ids, np.int64)]
        return self._store.worth_fetching_whole(np.unique(rows["shard"]), int(rows["length"].sum(dtype=np.int64)))

    def check_room(self, shards_at_once: int, reason: str, remedy: str) -> None:
        """Raise UserError unless a remote dataset's cache holds so many shards; ``reason`` is what needs them."""
        self._store.check_room(shards_at_once, reason, remedy)


def _open_store(path: str | Path | Url, cache: CacheConfig) -> ShardStore:
    """The store of a dataset at a URL, in a folder, or of tars at a URL that a folder is the index of."""
    if isinstance(path, Url):
        return RemoteShards(path, cache)
    folder = Path(path)
    tars_at = where_tars_lie(folder)
    return LocalShards(folder) if tars_at is None else RemoteShards(tars_at, cache, folder)


def where_tars_lie(folder: Path) -> Url | None:
    """The URL of the tars that the dataset in ``folder`` is only the index of; None where they lie in it.

    Raises UserError as ``read_dataset_file``.
    """
    try:
        if b'"tars_at"' not in read_regular(folder / DATASET_FILE):  # parsing takes a second for a million shards
            return None
    except OSError:  # whoever opens the folder says what is wrong with it
        return None
    info = read_dataset_file(folder, check_files=False)
    if "tars_at" not in info or all((folder / shard["name"]).exists() for shard in info["shards"][:1]):
        return None
    url = location(info["tars_at"])
    assert isinstance(url, Url), "parse_dataset_file has looked at it"
    return url


def require_rgb(dataset: ShardSet, what: str) -> None:
    """Raise UserError, which begins with ``what``, for a dataset of --channels."""
    if dataset.channels != 3:
        raise UserError(f"{what} takes images of 3 channels, and those of {dataset.path} have {dataset.channels}")


def share_cache(datasets: Sequence[ShardSet]) -> None:
    """Divide the room of the cache among the remote ones of ``datasets``, which are read at the same time."""
    stores = [dataset._store for dataset in datasets if isinstance(dataset._store, RemoteShards)]
    for store in stores:
        store.share_cache(stores)


def _reopen(path: Path | Url, verify_checksums: bool, cache: CacheConfig) -> ShardSet:
    return ShardSet.open(path, verify_checksums=verify_checksums, cache=cache)
