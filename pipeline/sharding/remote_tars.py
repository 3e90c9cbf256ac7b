"""Index WebDataset tars behind a URL: wds:https://HOST/{00..09}.tar, s3:// and the like.

Each tar is fetched to OUT/.partial, indexed and deleted. The sidecar files then belong beside the tars: copied there,
dataset.json last, they make a remote dataset.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from pipeline.common.errors import UserError
from pipeline.common.locations import Url, location
from pipeline.common.secrets import conceal, reveal
from pipeline.dataset.format import PARTIAL_DIR, Shard
from pipeline.dataset.remote_cache import CacheConfig
from pipeline.dataset.remote_files import RemoteFolder
from pipeline.sharding.index_tars import IndexJob

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_remote(pattern: str) -> bool:
    """Whether the PATTERN of wds:PATTERN names tars behind a URL."""
    return _URL.match(pattern) is not None


def refuse_globs(pattern: str) -> None:
    """Raise UserError for a PATTERN behind a URL that would have to be looked up."""
    if re.search(r"[*\[]", urlsplit(reveal(pattern)).path):
        raise UserError(
            f"wds:{conceal(pattern)}: * and [ are not looked up behind a URL; write numbers as {{000..146}}"
        )


def split_urls(texts: list[str]) -> tuple[Url, list[str]]:
    """(the folder that all URLs share, the names of the files in it). Raises UserError if they share none."""
    urls = []
    for text in texts:
        url = location(text)
        assert isinstance(url, Url)
        urls.append(urlsplit(url.secret))
    first = urls[0]
    if any((url.scheme, url.netloc, url.query) != (first.scheme, first.netloc, first.query) for url in urls):
        raise UserError("wds: the tars must lie on one host or in one bucket, with one signature behind their names")
    folder = os.path.commonpath([os.path.dirname(url.path) for url in urls])
    names = [os.path.relpath(url.path, folder or "/") for url in urls]
    if first.scheme in ("http", "https"):
        names = [unquote(name) for name in names]
    return Url(urlunsplit((first.scheme, first.netloc, folder, first.query, ""))), names


@dataclass
class RemoteIndexJob(IndexJob):
    """Index tars behind a URL; shard i is tar i. ``tars`` are their names in ``folder``."""

    folder: Url
    sizes: list[int]  # bytes

    @cached_property
    def _remote(self) -> RemoteFolder:
        return RemoteFolder(self.folder, CacheConfig().retry_minutes)

    def room(self, numbers: list[int]) -> int:
        """One tar for each worker lies on the disk at a time."""
        return max((self.sizes[number] for number in numbers), default=0)

    def is_whole(self, number: int, shard: Shard, sizes: dict[str, int]) -> bool:
        """Whether the tar has the length that it had; whether it is still there and the same is not asked again."""
        return shard.bytes == self.sizes[number]

    @contextmanager
    def tar(self, number: int) -> Iterator[Path]:
        """The tar, fetched; deleted at the end. Raises UserError if it cannot be had."""
        folder = self.out / PARTIAL_DIR / f"fetched-{number:06d}"
        folder.mkdir(exist_ok=True)
        path = folder / self.tars[number].name
        try:
            with open(path, "wb") as file:
                for piece in self._remote.pieces(str(self.tars[number]), self.sizes[number], 0, threading.Event()):
                    file.write(piece)
            yield path
        finally:
            path.unlink(missing_ok=True)
            folder.rmdir()

    def place(self, number: int) -> str:
        """Path of the tar below the folder in which the dataset will lie."""
        return self.tars[number].as_posix()


def open_remote_tars(urls: list[str], out: Path, options: Any) -> RemoteIndexJob:
    """The job for tars behind URLs, which are looked at for their sizes. Raises UserError for one that is missing."""
    folder, names = split_urls(urls)
    remote = RemoteFolder(folder, CacheConfig().retry_minutes)
    return RemoteIndexJob(out, [Path(name) for name in names], options, folder, [remote.size(name) for name in names])
