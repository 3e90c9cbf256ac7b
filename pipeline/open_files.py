"""Owns the open tars of a dataset: the handles of the shards read last, closed when nobody reads from them."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable

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
