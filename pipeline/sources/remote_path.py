"""Files behind a URL, for sources that are written for files on a disk: s3://, gs://, hf://, https://.

``RemotePath`` has those members of Path that sources use, and ``open_file`` opens both kinds for reading. Every read is
a byte range; a file that changes between two of them is noticed by its entity tag where the server has one.
"""

from __future__ import annotations

import io
import os
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import unquote, urlsplit, urlunsplit

from pipeline.common.errors import UserError
from pipeline.common.files import open_regular
from pipeline.common.locations import Url
from pipeline.dataset.out_folder import RETRY_MINUTES
from pipeline.dataset.remote_files import UNKNOWN_VERSION, RemoteFolder, tag_of, version_of

_FIRST_READ = 1 << 16  # bytes
_MOST_AHEAD = 8 << 20  # bytes read at once where reads follow each other
_NEAR = 1 << 20  # bytes behind the last read within which the next one counts as following it
_NEVER = threading.Event()
HTTP = ("http", "https")


class FileStatus(NamedTuple):
    """Of a file behind a URL; named as os.stat_result names them."""

    st_size: int
    version: int  # as ``version_of`` gives it
    is_folder: bool = False

    @property
    def st_mtime_ns(self) -> int:
        """What changes when the file does."""
        return self.version


@lru_cache(maxsize=64)
def remote_folder(url: Url) -> RemoteFolder:
    """The connections of this process to the folder ``url``."""
    return RemoteFolder(url, RETRY_MINUTES)


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder ``inner`` (relative, with slashes; "" for the root itself) below the URL ``root``."""

    inner: str
    root: Url = field(compare=False)
    known: FileStatus | None = field(default=None, compare=False)  # as it was listed

    @classmethod
    def of(cls, url: Url) -> RemotePath:
        """What ``url`` names: a file has the folder above it as root."""
        parts = urlsplit(url.secret)
        above, _, name = parts.path.rstrip("/").rpartition("/")
        if not name or parts.path.endswith("/"):
            return cls("", url)
        root = Url(urlunsplit((parts.scheme, parts.netloc, above, parts.query, "")))
        return cls(unquote(name) if url.scheme in HTTP else name, root)

    @property
    def url(self) -> Url:
        """The URL of it."""
        return self.root.file(self.inner) if self.inner else self.root

    @property
    def name(self) -> str:
        """The last part."""
        return PurePosixPath(self.inner or unquote(urlsplit(self.root.secret).path)).name

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        """The folder above, at most the root."""
        above = self.inner.rpartition("/")[0]
        return RemotePath(above, self.root)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath("/".join(filter(None, (self.inner, name))), self.root)

    def __str__(self) -> str:
        return str(self.url)

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """The path below the folder ``other``."""
        return PurePosixPath(self.inner).relative_to(other.inner)

    def stat(self) -> FileStatus:
        """Bytes and version. Raises UserError as reading does, and for a server that does not say how large it is."""
        status = self.known or self._ask()
        if status is None:
            raise UserError(f"{self} does not exist")
        return status

    def exists(self) -> bool:
        """Whether there is such a file or folder."""
        return self.known is not None or self._ask() is not None

    def is_file(self) -> bool:
        """Whether it is a file."""
        status = self.known or self._ask()
        return status is not None and not status.is_folder

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        status = self.known or self._ask()
        return status is not None and status.is_folder

    def _ask(self) -> FileStatus | None:
        folder = remote_folder(self.root)
        path = folder.path(self.inner)

        def ask() -> FileStatus | None:
            try:
                info = folder.fs.info(path)
            except FileNotFoundError:
                return None
            return status_of(info, self.root.scheme in HTTP)

        return folder.request(self.name, ask, doing="look at")

    def read(self, start: int, length: int) -> bytes:
        """``length`` bytes from byte ``start`` on. Raises UserError, also if the file has changed."""
        version = UNKNOWN_VERSION if self.known is None else self.known.version
        return remote_folder(self.root).read(self.inner, start, length, _NEVER, version) if length else b""


def status_of(info: dict[str, Any], http: bool) -> FileStatus:
    """What fsspec's ``info`` says. A web page counts as a folder."""
    size = info.get("size")
    is_folder = info.get("mimetype") == "text/html" if http else info.get("type") == "directory"
    if size is None and not is_folder:
        raise UserError("the server does not say how large its files are, which reading them needs")
    return FileStatus(int(size or 0), version_of(tag_of(info)), is_folder)


SourcePath = Path | RemotePath


def known(path: SourcePath) -> SourcePath:
    """``path``; a remote file with its bytes and version as they are now, by which a later change is noticed."""
    return RemotePath(path.inner, path.root, path.stat()) if isinstance(path, RemotePath) else path


class RemoteFile(io.RawIOBase):
    """A remote file, open for reading. Reads that follow each other are answered from a window that grows."""

    def __init__(self, path: RemotePath, *, ahead: bool = True) -> None:
        """``ahead``: False for reads at random, in several threads; ``pread`` then reads just what it is asked for."""
        super().__init__()
        status = path.stat()
        self._path = RemotePath(path.inner, path.root, status)
        self.size = status.st_size
        self._ahead, self._at = ahead, 0
        self._window, self._start, self._reach = b"", 0, _FIRST_READ

    def pread(self, length: int, offset: int) -> bytes:
        """At most ``length`` bytes from ``offset`` on; fewer at the end of the file."""
        length = max(0, min(length, self.size - offset))
        if not self._ahead or length == 0:
            return self._path.read(offset, length)
        end = self._start + len(self._window)
        if not (self._start <= offset and offset + length <= end):
            follows = self._start <= offset <= end + _NEAR and bool(self._window)
            self._reach = min(2 * self._reach, _MOST_AHEAD) if follows else _FIRST_READ
            reach = min(max(length, self._reach), self.size - offset)
            self._window, self._start = self._path.read(offset, reach), offset
        return self._window[offset - self._start :][:length]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of files."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """As of files."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As of files."""
        data = self.pread(len(buffer), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


Handle = int | RemoteFile  # of an open file


def open_file(path: SourcePath) -> BinaryIO:
    """Open a file for reading, on a disk or behind a URL. Raises OSError or UserError."""
    return cast(BinaryIO, RemoteFile(path)) if isinstance(path, RemotePath) else open(open_regular(path), "rb")


def handle_of(file: BinaryIO) -> Handle:
    """What ``pread`` reads from."""
    return file if isinstance(file, RemoteFile) else file.fileno()


def pread(handle: Handle, length: int, offset: int) -> bytes:
    """As os.pread. Raises OSError or UserError."""
    return os.pread(handle, length, offset) if isinstance(handle, int) else handle.pread(length, offset)
