"""Where the bytes of a dataset's shards come from: the ``ShardStore`` protocol, and the store of a local folder.

``ShardSet`` (dataset.py) reads through a store and does not know which one it has. The other implementation,
``RemoteShards`` (remote_shards.py), fetches shards from a URL into a cache.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from pipeline.common.files import open_regular
from pipeline.common.locations import Url
from pipeline.dataset.format import SAMPLES_FILE, open_rows, read_dataset_file
from pipeline.dataset.names import Names, open_names
from pipeline.dataset.prefetch_window import Upcoming
from pipeline.dataset.remote_cache import CacheConfig

MAX_OPEN_SHARDS = 512  # and no more than a third of what a process may open, since a run may read two datasets


def most_open_shards() -> int:
    """The shards that may be open at a time, by the process' limit of open files (`ulimit -n`)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_SHARDS if soft == resource.RLIM_INFINITY else max(1, min(MAX_OPEN_SHARDS, soft // 3))


_TOO_MANY = frozenset({errno.EMFILE, errno.ENFILE})


@dataclass(frozen=True)
class PrefetchPlan:
    """The samples that a loader will read, step by step."""

    steps: Iterator[Int64[np.ndarray, "_"]]  # the samples of each step  # noqa: F821
    # Which of its machine's processes this is, where the steps are those of all of them; None: they are its own alone
    local_rank: int | None


@runtime_checkable  # for the tests, which check arguments
class ShardStore(Protocol):
    """Reads the shards of one dataset. Thread-safe. ``shard`` is the number of a shard in dataset.json."""

    @property
    def path(self) -> Path | Url:
        """The folder or URL of the dataset."""

    @property
    def cache(self) -> CacheConfig:
        """The cache as configured; unused by a local store."""

    def open_dataset(self) -> tuple[dict[str, Any], Path, np.ndarray]:
        """dataset.json, the path of samples.npy, and its rows. Raises UserError if either is missing or damaged."""

    def open_names(self, info: dict[str, Any]) -> Names | None:
        """The names of the samples; None if the dataset was made without. Raises UserError as ``open_dataset``."""

    def read(self, shard: int, offset: int, length: int, cancelled: threading.Event) -> bytes:
        """``length`` bytes from byte ``offset`` of a shard, or fewer at its end.

        Raises OSError as the disk does, UserError if the shard cannot be fetched, FetchCancelledError if ``cancelled``
        is set while it waits.
        """

    def read_from_source(self, shard: int, offset: int, length: int, cancelled: threading.Event) -> bytes | None:
        """As ``read``, past a copy that has turned out to be damaged; None if there is no other copy."""

    def follow(
        self,
        upcoming: Upcoming,
        local_rank: int | None,
        cancelled: threading.Event,
        max_steps_behind: int,
        processes: int,
    ) -> AbstractContextManager[Callable[[], None]]:
        """Prepare the shards of ``upcoming`` ahead of use; call the result when a step begins.

        ``local_rank``: as in ``PrefetchPlan``. ``cancelled`` ends it. ``max_steps_behind``: steps that some process may
        still read when a later one begins. ``processes`` of this machine.
        """

    def worth_fetching_whole(self, shards: np.ndarray, wanted_bytes: int) -> bool:
        """Whether to fetch whole ``shards`` for the sake of ``wanted_bytes`` in them."""

    def check_room(self, shards_at_once: int, reason: str, remedy: str) -> None:
        """Raise UserError unless so many shards can be held at once; ``reason`` is what needs them."""


class OpenFile:
    """A file handle that closes with its last reference; a reader's own reference keeps it open during the read."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)


class OpenFiles:
    """The shards that were read last, open. Thread-safe."""

    def __init__(self, opener: Callable[[int, threading.Event], int | None]) -> None:
        """``opener(shard, cancelled)`` returns a handle, or None if there is no file. Other threads need not wait."""
        self._opener = opener
        self._files: OrderedDict[int, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, shard: int, cancelled: threading.Event) -> OpenFile | None:
        """The shard's file, opened if need be; None as from the opener. Raises what the opener raises."""
        with self._lock:
            file = self._files.get(shard)
            if file is not None:
                self._files.move_to_end(shard)
                return file
        try:
            handle = self._opener(shard, cancelled)
        except OSError as error:
            if error.errno not in _TOO_MANY or not self._files:
                raise
            with self._lock:  # other parts of the process, or of the machine, need more: with none open it may do
                self._files.clear()
            handle = self._opener(shard, cancelled)
        if handle is None:
            return None
        file = OpenFile(handle)
        with self._lock:
            self._files[shard] = file
            while len(self._files) > most_open_shards():
                self._files.popitem(last=False)
        return file

    def drop(self, shard: int) -> None:
        with self._lock:
            self._files.pop(shard, None)

    def drop_removed(self) -> None:
        """Close files that were removed from their folder, so that their disk space is freed."""
        with self._lock:
            for shard in [shard for shard, file in self._files.items() if os.fstat(file.handle).st_nlink == 0]:
                del self._files[shard]


class LocalShards:
    """The store of a dataset in a folder."""

    def __init__(self, path: Path, entries: Sequence[dict[str, Any]] = ()) -> None:
        """``entries``: ``shards`` of dataset.json; ``open_dataset`` reads them."""
        self.path, self.cache = path, CacheConfig()
        self._entries = entries
        self.open_files = OpenFiles(lambda shard, _: open_regular(self.path / self._entries[shard]["name"]))

    def open_dataset(self) -> tuple[dict[str, Any], Path, np.ndarray]:
        info, file = read_dataset_file(self.path), self.path / SAMPLES_FILE
        self._entries = info["shards"]
        return info, file, open_rows(file, info, str(file))

    def open_names(self, info: dict[str, Any]) -> Names | None:
        return open_names(self.path, info)

    def read(self, shard: int, offset: int, length: int, cancelled: threading.Event) -> bytes:
        file = self.open_files.get(shard, cancelled)  # keeps the file open while other threads open more
        assert file is not None
        return os.pread(file.handle, length, offset)

    def read_from_source(self, shard: int, offset: int, length: int, cancelled: threading.Event) -> bytes | None:
        """None: the folder is the source."""
        return None

    def follow(
        self,
        upcoming: Upcoming,
        local_rank: int | None,
        cancelled: threading.Event,
        max_steps_behind: int,
        processes: int,
    ) -> AbstractContextManager[Callable[[], None]]:
        """Nothing is prepared: the shards are there."""
        return nullcontext(lambda: None)

    def worth_fetching_whole(self, shards: np.ndarray, wanted_bytes: int) -> bool:
        """False: nothing is fetched."""
        return False

    def check_room(self, shards_at_once: int, reason: str, remedy: str) -> None:
        """No cache, so no limit."""
