"""List the files below a URL: pages of a bucket, the links of a web page, or what fsspec finds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from fsspec.asyn import sync

from pipeline.common.system import progress
from pipeline.dataset.out_folder import ahead
from pipeline.dataset.remote_files import RemoteFolder
from pipeline.sources.listing import SYSTEM_FOLDER, ListingBuilder, is_system_folder
from pipeline.sources.remote_path import HTTP, FileStatus, RemotePath, remote_folder, status_of

Entry = tuple[str, FileStatus]  # (path below the folder, what is known of it)
_HIDDEN = re.compile(r"(?:^|/)\.")


def list_remote_folder(folder: RemotePath, quiet: bool) -> ListingBuilder:
    """All files below a folder, as ``list_folder`` lists those of a disk. Raises UserError."""
    builder = ListingBuilder(str(folder))
    system: set[str] = set()
    with progress(quiet, unit=" files", desc=f"listing {folder}") as bar:
        for name, status in entries(folder):
            bar.update(1)
            if _HIDDEN.search(name):
                continue
            if (inside := _system_folder(name)) is not None:
                system.add(inside)
                continue
            builder.add(name, 0, status.st_size, version=status.version)
    for name in system:
        builder.reject(name, SYSTEM_FOLDER)
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
        yield from s3_entries(remote, folder.inner)
    else:
        yield from _found(remote, folder.inner)


def _protocols(fs: Any) -> tuple[str, ...]:
    return fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)


def s3_entries(remote: RemoteFolder, inner: str) -> Iterator[Entry]:
    """Objects below the prefix ``inner``/, page by page: sorted by the bytes of their names, as S3 sorts them."""
    bucket, key, _ = remote.fs.split_path(remote.path(inner))
    prefix = f"{key.rstrip('/')}/" if key else ""
    page: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, **remote.fs.req_kw}
    while True:
        answer = remote.request(
            inner or "files", lambda: sync(remote.fs.loop, remote.fs._call_s3, "list_objects_v2", **page), doing="list"
        )
        for found in answer.get("Contents", ()):
            name = found["Key"][len(prefix) :]
            if name and not name.endswith("/"):  # a name with a slash at its end stands for a folder
                yield name, status_of({"size": found["Size"], "ETag": found.get("ETag")}, False)
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
