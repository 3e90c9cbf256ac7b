"""Reads the files of a remote folder through fsspec, in byte ranges, with retries.

Files are requested in ranges, so that a broken connection costs one piece of a file and not all of it. The length of
each answer is checked here, its content by the caller.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotYetError
from contextvars import ContextVar
from functools import cache
from typing import Any, TypeVar

from pipeline.common.errors import UserError
from pipeline.common.locations import Url

PIECE = 8 << 20  # bytes per request
PIECE_TIMEOUT_S = 120.0  # for one piece; slower than 70 KB/s counts as a dead connection
FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 30.0  # between attempts: doubled each time, shortened at random by up to a half
HOPELESS_ATTEMPTS = 4  # of errors that waiting seldom cures: no such file, no permission, too short an object
_READS = 6  # of a file without a checksum, at most, until two in a row are equal
_REPORTED_ATTEMPT = 3  # failures are printed from this attempt on
UNKNOWN_VERSION = 0
FULL = "its quota or its disk is full"
_CHECK = "check the URL, the permissions and the network"
_FULL_CODE = re.compile(r"quota|insufficientstorage|storagefull|nospace", re.IGNORECASE)
_FULL_STATUS, _FULL_ERRNO = 507, frozenset({errno.ENOSPC, errno.EDQUOT})
_POLL_S = 0.2  # how soon a waiting thread notices ``cancelled``
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}


_TRANSIENT_4XX = frozenset({408, 425, 429})
_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError", "TokenRetrievalError"})
_CERTIFICATES = frozenset({"SSLCertVerificationError", "ClientConnectorCertificateError"})
_OURS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError, LookupError)


_most_bytes: ContextVar[int] = ContextVar("_most_bytes", default=64 << 20)  # of an answer; of others than files
_wanted_version: ContextVar[int] = ContextVar("_wanted_version", default=0)  # of the file of an answer
_Answer = TypeVar("_Answer")


class ChangedError(Exception):
    """A file has another version than when it was listed."""


class FetchCancelledError(Exception):
    """The fetch was cancelled."""


class _ShortError(Exception):
    """The object ends before the requested range does."""


class _LongError(Exception):
    """The answer is longer than the requested range."""


class _LargeError(Exception):
    """A file is larger than what it is read for can be."""


class _EncodedError(Exception):
    """The body is compressed, though that was not asked for: its size is unknown before it is unpacked."""


class RemoteFolder:
    """The files below one URL. Thread-safe."""

    def __init__(self, url: Url, retry_minutes: float) -> None:
        """Raises UserError if the file system behind the URL's scheme is unknown or not installed."""
        import fsspec  # with aiohttp 0.2 s and more, which what stays on this machine does not need
        from fsspec.asyn import AsyncFileSystem

        self.url = url
        self._arrived, self._lock = 0, threading.Lock()  # requests that were answered well
        self._retry_s = 60.0 * retry_minutes
        http = url.scheme in ("http", "https")
        options: dict[str, Any] = {"encoded": True, "client_kwargs": {"trust_env": True}} if http else {}
        if url.scheme in ("gs", "gcs"):  # gcsfs reads whole bodies: at most so much of them
            options = {
                "session_kwargs": {"response_class": _bounded_response(), "headers": {"Accept-Encoding": "identity"}}
            }
        try:
            self._fs = fsspec.filesystem(url.scheme, skip_instance_cache=True, use_listings_cache=False, **options)
            self._is_async = isinstance(self._fs, AsyncFileSystem)
        except ImportError as error:
            extra = _EXTRAS.get(url.scheme)
            remedy = (
                f"pip install -e .[{extra}]"
                if extra
                else f"pip install the package that provides {error.name or url.scheme}"
            )
            raise UserError(f"{url} needs a package that is not installed: {remedy}") from None
        except TypeError:
            raise UserError(
                f"{url}: {url.scheme}:// wants more than a URL says; s3, gs, https and hf can be read"
            ) from None
        except ValueError:
            raise UserError(
                f"{url}: nothing is known of {url.scheme}://; s3, gs, https, http and hf are, and the schemes of fsspec"
            ) from None

    @property
    def fs(self) -> Any:
        """The file system of fsspec behind the URL's scheme. What is asked of it belongs into ``request``."""
        return self._fs

    def path(self, name: str) -> str:
        """File ``name``, or the folder itself for "", as ``fs`` calls it; it may hold secrets."""
        return self._fs._strip_protocol(self.url.file(name).secret if name else self.url.secret)

    def request(
        self, name: str, ask: Callable[[], _Answer], cancelled: threading.Event | None = None, doing: str = "fetch"
    ) -> _Answer:
        """The answer of ``ask``, again and again until it gives one. Raises as ``read``, naming ``name``."""
        return self._with_retries(name, ask, cancelled or threading.Event(), doing)

    def read(
        self, name: str, start: int, length: int, cancelled: threading.Event, version: int = UNKNOWN_VERSION
    ) -> bytes:
        """``length`` bytes of file ``name`` from byte ``start`` on, in one request.

        ``version``: what ``version_of`` gave for it earlier. Raises UserError after --retry-minutes of failures, or if
        the file has another version now; FetchCancelledError if ``cancelled`` is set meanwhile.
        """
        return self._read_with_retries(name, (start, start + length), length, cancelled, version)

    def size(self, name: str) -> int:
        """The bytes of file ``name``. Raises UserError as ``read``, and if the server does not say."""
        return self.status(name)[0]

    def status(self, name: str) -> tuple[int, int]:
        """(bytes, version as of ``version_of``) of file ``name``. Raises UserError as ``size``."""

        def ask() -> tuple[int, int]:
            info = self._fs.info(self.path(name))
            if not isinstance(size := info.get("size"), int):
                raise UserError(f"the server of {self.url} does not say how large {name} is, which fetching it needs")
            return size, version_of(tag_of(info))

        return self._with_retries(name, ask, threading.Event())

    def has(self, name: str) -> bool:
        """Whether there is a file ``name``. Some file systems call a failed request so too, hence several."""
        path = self.path(name)
        return any(self._with_retries(name, lambda: self._fs.exists(path), threading.Event()) for _ in range(_READS))

    def read_whole(self, name: str, limit: int) -> bytes:
        """Read a whole file that has no checksum; retry until two consecutive reads are equal.

        Raises UserError as ``read``, and if the file has more than ``limit`` bytes.
        """
        former: bytes | None = None
        for _ in range(_READS):
            data = self._read_with_retries(name, None, limit, threading.Event())
            if data == former:
                return data
            former = data
        raise UserError(
            f"{name} of {self.url} differs at each read: wait until its upload is complete, then start again"
        )

    def pieces(self, name: str, size: int, start: int, cancelled: threading.Event) -> Iterator[bytes]:
        """Bytes ``start`` to ``size`` of a file, PIECE at a time. Raises as ``read`` does."""
        for offset in range(start, size, PIECE):
            yield self.read(name, offset, min(PIECE, size - offset), cancelled)

    def _read_with_retries(
        self,
        name: str,
        span: tuple[int, int] | None,
        limit: int,
        cancelled: threading.Event,
        version: int = UNKNOWN_VERSION,
    ) -> bytes:
        try:
            return self._with_retries(
                name, lambda: self._attempt(self.path(name), span, limit, cancelled, version), cancelled
            )
        except ChangedError:
            raise UserError(
                f"{name} of {self.url} has changed since it was listed: wait until nothing writes there, then run the "
                "same command again (make_shards.py with --overwrite)"
            ) from None

    def _with_retries(
        self, name: str, request: Callable[[], _Answer], cancelled: threading.Event, doing: str = "fetch"
    ) -> _Answer:
        started, attempt, hopeless, arrived = time.monotonic(), 0, 0, self._arrived
        while True:
            try:
                return request()
            except (FetchCancelledError, UserError, ChangedError, *_OURS):
                raise
            except ImportError as error:  # some file systems import their client with the first request
                raise UserError(f"{self.url} needs a package that is not installed: {error.name}") from None
            except Exception as error:  # noqa: BLE001  each file system's client has errors of its own
                attempt += 1
                if isinstance(error, _ShortError) and self._arrived > arrived:
                    hopeless, arrived = 0, self._arrived  # others arrive whole, so this answer was cut by chance
                else:
                    hopeless += is_hopeless(error)
                reason = describe(error)
            waited = time.monotonic() - started
            if hopeless >= HOPELESS_ATTEMPTS or waited >= self._retry_s:
                check = "free space there, or raise the quota" if reason == FULL else _CHECK
                raise UserError(
                    f"cannot {doing} {name} of {self.url}: {reason}, {attempt} times in {waited:.0f} s; {check}, then "
                    "run the same command again (pretrain.py with --resume)"
                )
            self._wait(name, reason, attempt, cancelled, doing)

    def _wait(self, name: str, reason: str, attempt: int, cancelled: threading.Event, doing: str) -> None:
        longest = min(FIRST_DELAY_S * 2 ** min(attempt - 1, 32), LONGEST_DELAY_S)
        delay = longest * random.uniform(0.5, 1.0)  # so that processes do not all retry at the same moment
        if attempt >= _REPORTED_ATTEMPT:
            text = f"note: cannot {doing} {name} of {self.url}, attempt {attempt}: {reason}; again in {delay:.1f} s"
            print(text, file=sys.stderr, flush=True)
        if cancelled.wait(delay):
            raise FetchCancelledError(name)

    def _attempt(
        self, path: str, span: tuple[int, int] | None, limit: int, cancelled: threading.Event, version: int
    ) -> bytes:
        """One request. At most ``limit`` bytes of its answer are held, whatever the server sends."""
        if self._is_async and self._fs.loop is not None:
            coroutine = asyncio.wait_for(_bounded(self._fs, path, span, limit, version), PIECE_TIMEOUT_S)
            data = _result(asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop), cancelled)
        else:
            start, end = span or (0, limit + 1)
            data = self._fs.cat_file(path, start=start, end=end)
        if len(data) > limit:
            raise _LongError if span is not None else _LargeError(limit)
        if span is not None and len(data) < span[1] - span[0]:
            raise _ShortError(f"{len(data)} of {span[1] - span[0]} bytes")
        with self._lock:
            self._arrived += 1
        return data


async def _bounded(
    fs: Any, path: str, span: tuple[int, int] | None, limit: int, version: int = UNKNOWN_VERSION
) -> bytes:
    """The bytes of a file, or of a range of it, of which at most ``limit`` + 1 are read."""
    kinds = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
    headers = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}
    if "http" in kinds:
        session = await fs.set_session()
        headers["Accept-Encoding"] = "identity"
        async with session.get(fs.encode_url(path), headers=headers, **fs.kwargs) as answer:
            fs._raise_not_found_for_status(answer, path)
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise _EncodedError(answer.headers["Content-Encoding"])
            _check_version(answer.headers.get("ETag"), version)
            _check_length(answer.content_length, answer.status == 206, span, limit)
            return await _collect(answer.content, limit)
    if "s3" in kinds:
        bucket, key, number = fs.split_path(path)
        more = {"VersionId": number} if number else {}
        got = await fs._call_s3("get_object", Bucket=bucket, Key=key, **headers, **more, **fs.req_kw)
        body = got["Body"]
        try:
            _check_version(got.get("ETag"), version)
            _check_length(got.get("ContentLength"), "ContentRange" in got, span, limit)
            return await _collect(body, limit)
        finally:
            body.close()
    _most_bytes.set(limit)
    _wanted_version.set(version)
    start, end = span or (0, limit + 1)
    return await fs._cat_file(path, start=start, end=end)


@cache
def _bounded_response() -> type[Any]:
    """A class of answers whose ``read`` gives at most ``_most_bytes`` + 1, uncompressed, of ``_wanted_version``."""
    import aiohttp

    class _BoundedResponse(aiohttp.ClientResponse):
        async def read(self) -> bytes:
            """The body, or the beginning of one that is too long."""
            if self._body is None:
                if self.headers.get("Content-Encoding", "identity") != "identity":
                    raise _EncodedError(self.headers["Content-Encoding"])
                _check_version(self.headers.get("X-Goog-Generation"), _wanted_version.get())
                limit = _most_bytes.get()
                self._body = await _collect(self.content, limit)
                if len(self._body) > limit:
                    self.close()
            return self._body

    return _BoundedResponse


def _check_length(length: int | None, ranged: bool, span: tuple[int, int] | None, limit: int) -> None:
    """Raise before the body is read if the headers say that it is another one than was asked for."""
    if length is not None and length > limit:
        raise _LongError if span is not None else _LargeError(limit)
    if span is not None and not ranged and (span[0] > 0 or length is None):
        raise _LongError


def tag_of(info: dict[str, Any]) -> Any:
    """What changes with a file, of what fsspec says of it: a Google bucket's number of the object, or an entity tag."""
    return next((info[key] for key in ("generation", "ETag", "etag", "md5Hash", "blob_id") if info.get(key)), None)


def version_of(tag: Any) -> int:
    """64 bits of an entity tag, as a listing keeps them; UNKNOWN_VERSION for none."""
    if not isinstance(tag, str) or not tag:
        return UNKNOWN_VERSION
    digest = hashlib.blake2b(tag.removeprefix("W/").strip('"').encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _check_version(tag: Any, version: int) -> None:
    if version != UNKNOWN_VERSION and (found := version_of(tag)) not in (UNKNOWN_VERSION, version):
        raise ChangedError(found)


async def _collect(stream: Any, limit: int) -> bytes:
    data = bytearray()
    while len(data) <= limit:
        chunk = await stream.read(min(1 << 16, limit + 1 - len(data)))
        if not chunk:
            break
        data += chunk
    return bytes(data)


def _result(future: Future[bytes], cancelled: threading.Event) -> bytes:
    """The result of the file system's own thread; ends early if ``cancelled``."""
    while not cancelled.is_set():
        try:
            return future.result(_POLL_S)
        except NotYetError:
            if future.done():  # the request's own time-out has the same name
                raise
        except CancelledError:
            raise ConnectionError("the connection was closed") from None
    future.cancel()
    raise FetchCancelledError


def write_error(url: Url, name: str, error: Exception) -> UserError:
    """The message for a failure to write ``name`` that is not tried again."""
    reason = describe(error)
    check = "free space there, or raise the quota" if reason == FULL else _CHECK
    return UserError(f"cannot write {name} of {url}: {reason}; {check}, then run the same command again")


def is_hopeless(error: Exception) -> bool:
    """Whether waiting seldom cures this failure of a request."""
    status = _status(error)
    if status is not None:
        return _is_full(error) or (400 <= status < 500 and status not in _TRANSIENT_4XX)
    kinds = (FileNotFoundError, PermissionError, _ShortError, _LongError, _LargeError, _EncodedError)
    return isinstance(error, kinds) or _is_full(error) or _is_one_of(error, _CREDENTIALS | _CERTIFICATES)


def _is_full(error: Exception) -> bool:
    """Whether the other side has no room for what is written."""
    code = _code(error)
    full = (code is not None and _FULL_CODE.search(code)) or _status(error) == _FULL_STATUS
    return bool(full) or getattr(error, "errno", None) in _FULL_ERRNO


def _code(error: BaseException | None) -> str | None:
    """The name that S3 gave to an error, which botocore keeps in the error or in a cause of it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict) and isinstance(code := response.get("Error", {}).get("Code"), str):
            return code if re.fullmatch(r"\w{1,60}", code) else None
        error = error.__cause__
    return None


def _is_one_of(error: BaseException, names: frozenset[str]) -> bool:
    """Whether the error or a cause of it is of a class with one of these names, from packages that may be missing."""
    while True:
        if names & {base.__name__ for base in type(error).__mro__}:
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__


def describe(error: Exception) -> str:
    """A failure of a request without its text, which may hold the URL with its secrets."""
    if _is_full(error):
        return FULL
    match error:
        case FileNotFoundError():
            return "no such file"
        case PermissionError():
            return "permission denied"
        case _ShortError():
            return f"the object ends early ({error})"
        case _LongError():
            return "the server ignores range requests, which fetching needs"
        case _LargeError(args=(limit,)):
            return f"the file is larger than {limit:,} bytes, which no such file of a dataset is"
        case _EncodedError(args=(encoding,)):
            return f"the server sends it as Content-Encoding {encoding!r:.40}, though it was asked for the plain bytes"
        case TimeoutError() | asyncio.TimeoutError() | NotYetError():
            return "time-out"
    if _is_one_of(error, _CERTIFICATES):
        return "its certificate is not trusted here (SSL_CERT_FILE, or AWS_CA_BUNDLE for s3, names the trusted ones)"
    status = _status(error)
    return f"HTTP status {status}" if status is not None else _code(error) or type(error).__name__


def _status(error: Exception) -> int | None:
    """The HTTP status in an error of aiohttp, botocore or requests."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
