"""A copy of a remote dataset for the time of its check: every byte of it has to be read in any case."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.files import disk_errors, read_regular
from pipeline.common.locations import Url
from pipeline.common.system import progress
from pipeline.dataset.format import DATASET_FILE, REENCODED_FILE, REJECTED_FILE, SAMPLES_FILE, parse_dataset_file
from pipeline.dataset.names import NAME_STARTS_FILE, NAMES_FILE
from pipeline.dataset.remote_cache import CacheConfig
from pipeline.dataset.remote_files import RemoteFolder
from pipeline.dataset.remote_shards import LARGEST_DATASET_FILE, lies_below

SIDECARS = (SAMPLES_FILE, NAMES_FILE, NAME_STARTS_FILE, REJECTED_FILE, REENCODED_FILE)


@contextmanager
def local_copy(
    url: Url, cache: CacheConfig, *, shards: bool = True, quiet: bool = False, index: Path | None = None
) -> Iterator[Path]:
    """All files of the dataset below ``url`` in a temporary folder inside the cache's. What is not there is left out.

    ``shards``: False for all but the tars and their indexes. ``index``: the folder of all files but the tars, where
    they do not lie below the URL.

    Raises UserError if there is no dataset, it cannot be fetched, or the disk has no room for it.
    """
    remote = RemoteFolder(url, cache.retry_minutes)
    if index is None:
        record = remote.read_whole(DATASET_FILE, LARGEST_DATASET_FILE)
    else:
        record = read_regular(index / DATASET_FILE)
    info = parse_dataset_file(record, f"{DATASET_FILE} of {index or url}")
    with disk_errors(f"copying {url}", f"--cache-dir {cache.folder} cannot be used", "name another folder"):
        cache.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="check-", dir=cache.folder) as folder:
            (Path(folder) / DATASET_FILE).write_bytes(record)
            names = _names(info) if shards else SIDECARS
            if index is not None:
                here = {name for name in names if (index / name).exists()}
                for name in here:
                    shutil.copyfile(index / name, Path(folder) / name)
                names = [shard["name"] for shard in info["shards"] if shard["name"] not in here]
            sizes = {name: remote.size(name) for name in names if remote.has(name)}
            _check_room(url, sum(sizes.values()), cache.folder)
            with progress(quiet, total=sum(sizes.values()), unit="B", unit_scale=True, desc=f"fetching {url}") as bar:
                for name, size in sizes.items():
                    fetch(remote, name, size, Path(folder), bar.update)
            yield Path(folder)


def fetch(
    remote: RemoteFolder, name: str, size: int, folder: Path, tick: Callable[[int], object] = lambda _: None
) -> None:
    """Copy a file into ``folder``; ``tick`` is called with the bytes of each piece. Raises OSError or UserError."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "wb") as file:
        for piece in remote.pieces(name, size, 0, threading.Event()):
            file.write(piece)
            tick(len(piece))


def _names(info: dict[str, Any]) -> list[str]:
    shards: list[str] = [shard[kind] for shard in info["shards"] for kind in ("name", "index")]
    outside = [name for name in shards if not lies_below(name)]
    if outside:
        raise UserError(
            f"dataset.json names files outside of its folder ({outside[0]}): check the dataset where they lie"
        )
    return [*SIDECARS, *shards]


def _check_room(url: Url, needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{url} has {needed / 1e9:.3g} GB, and {folder} has room for {free / 1e9:.3g} GB: the check copies all of "
            "it for a while, so name another --cache-dir, or check it where it lies"
        )
