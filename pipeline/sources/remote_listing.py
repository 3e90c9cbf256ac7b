"""List the files below a URL: pages of a bucket, the links of a web page, or what fsspec finds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.common.system import progress
from pipeline.dataset.out_folder import ahead
from pipeline.dataset.remote_files import RemoteFolder, version_of
from pipeline.sources.listing import SYSTEM_FOLDER, SYSTEM_NAMES, ListingBuilder, is_system_folder
from pipeline.sources.remote_path import HTTP, FileStatus, RemotePath, remote_folder, status_of

Entry = tuple[str, FileStatus]  # (path below the folder, what is known of it)
_HIDDEN = re.compile(r"(?:^|/)\.")
_ODD = re.compile(rf"/\.|(?:^|/)(?:{SYSTEM_NAMES})/", re.IGNORECASE)  # what may be hidden or the system's
_ENOUGH_PARTS = 64  # prefixes that are listed side by side
_FEW_OBJECTS = 1000  # beside folders; a prefix with more is listed as it is
_DEEPEST = 3  # folders that are looked into for prefixes


def list_remote_folder(folder: RemotePath, quiet: bool) -> ListingBuilder:
    """All files below a folder, as ``list_folder`` lists those of a disk. Raises UserError.

    A bucket's prefixes are listed side by side, and come together in the order of their names.
    """
    builder = ListingBuilder(str(folder))
    remote = remote_folder(folder.root)
    with progress(quiet, unit=" files", desc=f"listing {folder}") as bar:
        if folder.root.scheme not in HTTP and "s3" in _protocols(remote.fs):
            for part in ahead(partial(_list_part, remote, folder.inner), s3_parts(remote, folder.inner)):
                bar.update(len(part))
                builder.extend(part)
        else:
            found = _Collector(builder)
            for entry in entries(folder):
                found.add([entry])
                bar.update(1)
            found.end()
    builder.rejected = list(dict.fromkeys(builder.rejected))  # a folder of the system may be in several parts
    return builder


class _Collector:
    """Puts files into a builder, but for hidden ones and what is in folders of the system."""

    def __init__(self, builder: ListingBuilder) -> None:
        self._builder, self._system = builder, set[str]()

    def add(self, found: Sequence[Entry]) -> None:
        """Files of a page, in order."""
        names = "/".join(name for name, _ in found)
        if _ODD.search(names) is not None or names.startswith("."):
            found = [entry for entry in found if self._is_usual(entry[0])]
        self._builder.add_files(
            [name for name, _ in found], [status.st_size for _, status in found], [s.version for _, s in found]
        )

    def _is_usual(self, name: str) -> bool:
        if _HIDDEN.search(name):
            return False
        if (inside := _system_folder(name)) is not None:
            self._system.add(inside)
        return inside is None

    def end(self) -> None:
        """Record the folders of the system, once each."""
        for name in sorted(self._system):
            self._builder.reject(name, SYSTEM_FOLDER)


def _list_part(remote: RemoteFolder, inner: str, part: str | list[Entry]) -> ListingBuilder:
    builder = ListingBuilder("")
    found = _Collector(builder)
    if isinstance(part, str):
        for page in s3_pages(remote, inner, part):
            found.add(page)
    else:
        found.add(part)
    found.end()
    return builder


def _system_folder(name: str) -> str | None:
    """The folder of ``name`` that holds no images by its name."""
    parents = list(PurePosixPath(name).parents)[:-1]
    found = [parent for parent in parents if is_system_folder(parent.name)]
    return str(found[-1]) if found else None


def entries(folder: RemotePath) -> Iterator[Entry]:
    """Every file below a folder, in any order."""
    remote = remote_folder(folder.root)
    if folder.root.scheme in HTTP:
        names = list(dict.fromkeys(_linked(remote, folder.inner, "")))
        yield from zip(names, ahead(lambda name: (folder / name).stat(), names), strict=True)
    elif "s3" in _protocols(remote.fs):
        yield from chain.from_iterable(s3_pages(remote, folder.inner, ""))
    else:
        yield from _found(remote, folder.inner)


def _protocols(fs: Any) -> tuple[str, ...]:
    return fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)


def s3_pages(remote: RemoteFolder, inner: str, below: str) -> Iterator[list[Entry]]:
    """Objects whose names below the folder ``inner`` begin with ``below``, in S3's order: by the bytes of their names.

    Names are relative to ``inner``.
    """
    for _, objects in _pages(remote, inner, below, ""):
        yield objects


def s3_parts(remote: RemoteFolder, inner: str) -> list[str | list[Entry]]:
    """Parts of the listing of ``inner`` in order: prefixes to be listed, and objects that lie beside them."""
    parts: list[tuple[str, str | list[Entry]]] = [("", "")]
    whole: set[str] = set()  # prefixes with too many objects beside their folders
    for _ in range(_DEEPEST):
        prefixes = [part for _, part in parts if isinstance(part, str) and part not in whole]
        if len(prefixes) >= _ENOUGH_PARTS or not prefixes:
            break
        lists = ahead(partial(_split, remote, inner), prefixes)
        split = dict(zip(prefixes, lists, strict=True))
        whole |= {prefix for prefix, found in split.items() if found is None}
        parts = [
            piece
            for part in parts
            for piece in ((split.get(part[1]) or [part]) if isinstance(part[1], str) else [part])
        ]
    joined: list[str | list[Entry]] = []
    for _, part in parts:
        if isinstance(part, list) and joined and isinstance(joined[-1], list):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _split(remote: RemoteFolder, inner: str, prefix: str) -> list[tuple[str, str | list[Entry]]] | None:
    """The prefixes and objects directly in ``prefix``, in order; None if there are many objects."""
    found: list[tuple[str, str | list[Entry]]] = []
    objects = 0
    for below, entries_ in _pages(remote, inner, prefix, "/"):
        objects += len(entries_)
        if objects > _FEW_OBJECTS:
            return None
        found += [(name, name) for name in below] + [(entry[0], [entry]) for entry in entries_]
    return sorted(found, key=lambda part: part[0].encode())


def _pages(remote: RemoteFolder, inner: str, below: str, delimiter: str) -> Iterator[tuple[list[str], list[Entry]]]:
    """(prefixes, objects) of each page, relative to ``inner``; with a delimiter, only those directly in ``below``."""
    from fsspec.asyn import sync

    bucket, key, _ = remote.fs.split_path(remote.path(inner))
    root = f"{key.rstrip('/')}/" if key else ""
    page: dict[str, Any] = {"Bucket": bucket, "Prefix": root + below, "Delimiter": delimiter, **remote.fs.req_kw}
    while True:
        answer = remote.request(
            inner or "files", lambda: sync(remote.fs.loop, remote.fs._call_s3, "list_objects_v2", **page), doing="list"
        )
        found = [
            (name, FileStatus(int(entry["Size"]), version_of(entry.get("ETag"))))
            for entry in answer.get("Contents", ())
            if (name := entry["Key"][len(root) :]) and not name.endswith("/")  # such a name stands for a folder
        ]
        yield [entry["Prefix"][len(root) :] for entry in answer.get("CommonPrefixes", ())], found
        if not answer.get("IsTruncated"):
            return
        page["ContinuationToken"] = answer["NextContinuationToken"]


def _found(remote: RemoteFolder, inner: str) -> Iterator[Entry]:
    root = remote.path(inner).rstrip("/")
    found = remote.request(inner or "files", lambda: remote.fs.find(root, detail=True), doing="list")
    for path, info in found.items():
        yield path.removeprefix(root).lstrip("/"), status_of(info, False)


def _linked(remote: RemoteFolder, inner: str, below: str) -> Iterator[str]:
    """The files that an index page of a web server links to, and those of the folders in it."""
    page = remote.path("/".join(filter(None, (inner, below.rstrip("/"))))).partition("?")
    base = f"{page[0].rstrip('/')}/"
    links = remote.request(
        below or "its index page", lambda: remote.fs.ls(base + page[1] + page[2], detail=False), doing="list"
    )
    for link in sorted(links):
        name = unquote(urlsplit(link).path).removeprefix(unquote(urlsplit(base).path))
        if not name or name.startswith(("/", "..")) or "?" in name or name.count("/") > name.endswith("/"):
            continue  # a link to elsewhere, or to the same page in another order
        if name.endswith("/"):
            if not name.startswith("."):
                yield from _linked(remote, inner, f"{below}{name}")
        else:
            yield f"{below}{name}"
