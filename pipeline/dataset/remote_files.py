"""Owns reading the files of a remote folder through fsspec: byte ranges, tried again until they come.

Only ranges are asked for, so that a connection that is cut costs one piece of a file and not the whole. What comes is
checked for its length here, and for its contents by those who asked.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotYetError
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem

from pipeline.common.errors import UserError
from pipeline.common.locations import Url

PIECE = 8 << 20  # bytes asked for at a time
PIECE_TIMEOUT_S = 120.0  # for one piece; slower than 70 KB/s counts as a dead connection
FIRST_DELAY_S, LONGEST_DELAY_S = 0.25, 30.0  # between attempts: doubled each time, shortened at random by up to a half
HOPELESS_ATTEMPTS = 4  # where waiting seldom helps: no such file, no permission, too short an object
_READS = 6  # of a file without a checksum, until two in a row are alike
_SPOKEN_ATTEMPT = 3  # from this attempt on a person is told
_POLL_S = 0.2  # how soon a waiting thread hears that nobody needs its piece any more
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}


_TRANSIENT_4XX = frozenset({408, 425, 429})
_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError", "TokenRetrievalError"})
_CERTIFICATES = frozenset({"SSLCertVerificationError", "ClientConnectorCertificateError"})
_OURS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError, LookupError)


class FetchCancelledError(Exception):
    """Nobody needs what was to be fetched any more."""


class _ShortError(Exception):
    """The object ends before the range that was asked for."""


class _LongError(Exception):
    """More came than the range that was asked for."""


class RemoteFolder:
    """The files below one URL. Thread-safe."""

    def __init__(self, url: Url, retry_minutes: float) -> None:
        """Raises UserError if the file system behind the URL's scheme is unknown or not installed."""
        self.url = url
        self._retry_s = 60.0 * retry_minutes
        http = url.scheme in ("http", "https")
        options: dict[str, Any] = {"encoded": True, "client_kwargs": {"trust_env": True}} if http else {}
        try:
            self._fs = fsspec.filesystem(url.scheme, skip_instance_cache=True, use_listings_cache=False, **options)
        except ImportError as error:
            extra = _EXTRAS.get(url.scheme)
            remedy = f"pip install -e .[{extra}]" if extra else f"pip install what provides {error.name or url.scheme}"
            raise UserError(f"{url} needs a package that is not installed: {remedy}") from None
        except TypeError:
            raise UserError(
                f"{url}: {url.scheme}:// wants more than a URL says; s3, gs, https and hf can be read"
            ) from None
        except ValueError:
            raise UserError(
                f"{url}: nothing is known of {url.scheme}://; s3, gs, https, http and hf are, and what fsspec knows"
            ) from None

    def read(self, name: str, start: int, length: int, cancelled: threading.Event) -> bytes:
        """``length`` bytes of file ``name`` from byte ``start`` on, in one request.

        Raises UserError after --retry-minutes of failures, FetchCancelledError if ``cancelled`` is set meanwhile.
        """
        return self._persist(name, (start, start + length), cancelled)

    def read_whole(self, name: str) -> bytes:
        """All of a file that no checksum vouches for, once two reads agree on it. Raises UserError as ``read``."""
        former: bytes | None = None
        for _ in range(_READS):
            data = self._persist(name, None, threading.Event())
            if data == former:
                return data
            former = data
        raise UserError(f"{name} of {self.url} comes differently each time: wait until it is final, then start again")

    def pieces(self, name: str, size: int, start: int, cancelled: threading.Event) -> Iterator[bytes]:
        """Bytes ``start`` to ``size`` of a file, PIECE at a time. Raises as ``read`` does."""
        for offset in range(start, size, PIECE):
            yield self.read(name, offset, min(PIECE, size - offset), cancelled)

    def _persist(self, name: str, span: tuple[int, int] | None, cancelled: threading.Event) -> bytes:
        begun, attempt, hopeless = time.monotonic(), 0, 0
        while True:
            try:
                return self._attempt(self.url.file(name), span, cancelled)
            except (FetchCancelledError, UserError, *_OURS):
                raise
            except ImportError as error:  # some file systems import their client with the first request
                raise UserError(f"{self.url} needs a package that is not installed: {error.name}") from None
            except Exception as error:  # noqa: BLE001  each file system's client has errors of its own
                attempt, hopeless = attempt + 1, hopeless + is_hopeless(error)
                reason = describe(error)
            waited = time.monotonic() - begun
            if hopeless >= HOPELESS_ATTEMPTS or waited >= self._retry_s:
                raise UserError(
                    f"cannot fetch {name} of {self.url}: {reason}, {attempt} times in {waited:.0f} s; see to the URL, "
                    "the permissions and the network, then run the same command again (pretrain.py with --resume)"
                )
            self._wait(name, reason, attempt, cancelled)

    def _wait(self, name: str, reason: str, attempt: int, cancelled: threading.Event) -> None:
        longest = min(FIRST_DELAY_S * 2 ** min(attempt - 1, 32), LONGEST_DELAY_S)
        delay = longest * random.uniform(0.5, 1.0)  # so that many processes do not come back all at once
        if attempt >= _SPOKEN_ATTEMPT:
            text = f"fetching {name} of {self.url} failed, attempt {attempt}: {reason}; again in {delay:.1f} s"
            print(text, file=sys.stderr, flush=True)
        if cancelled.wait(delay):
            raise FetchCancelledError(name)

    def _attempt(self, url: Url, span: tuple[int, int] | None, cancelled: threading.Event) -> bytes:
        start, end = span or (None, None)
        path = self._fs._strip_protocol(url.secret)
        if isinstance(self._fs, AsyncFileSystem) and self._fs.loop is not None:
            coroutine = asyncio.wait_for(self._fs._cat_file(path, start=start, end=end), PIECE_TIMEOUT_S)
            data = _result(asyncio.run_coroutine_threadsafe(coroutine, self._fs.loop), cancelled)
        else:
            data = self._fs.cat_file(path, start=start, end=end)
        if span is not None and len(data) > span[1] - span[0]:
            raise _LongError
        if span is not None and len(data) < span[1] - span[0]:
            raise _ShortError(f"{len(data)} of {span[1] - span[0]} bytes")
        return data


def _result(future: Future[bytes], cancelled: threading.Event) -> bytes:
    """What the file system's own thread gives, unless nobody waits for it any more."""
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


def is_hopeless(error: Exception) -> bool:
    """Whether waiting seldom helps against this failure of a request."""
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in _TRANSIENT_4XX
    kinds = (FileNotFoundError, PermissionError, _ShortError, _LongError)
    return isinstance(error, kinds) or _is_one_of(error, _CREDENTIALS | _CERTIFICATES)


def _is_one_of(error: BaseException, names: frozenset[str]) -> bool:
    """Whether it, or what it came from, is of a class with one of these names: of packages that need not be there."""
    while True:
        if names & {base.__name__ for base in type(error).__mro__}:
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__


def describe(error: Exception) -> str:
    """A failure of a request without its text, which may hold the URL with its secrets."""
    match error:
        case FileNotFoundError():
            return "no such file"
        case PermissionError():
            return "permission denied"
        case _ShortError():
            return f"the object ends early ({error})"
        case _LongError():
            return "the server ignores range requests, which fetching is made of"
        case TimeoutError() | asyncio.TimeoutError() | NotYetError():
            return "time-out"
    if _is_one_of(error, _CERTIFICATES):
        return "its certificate is not trusted here (SSL_CERT_FILE, or AWS_CA_BUNDLE for s3, names those that are)"
    status = _status(error)
    return f"HTTP status {status}" if status is not None else type(error).__name__


def _status(error: Exception) -> int | None:
    """The HTTP status in an error of aiohttp, botocore or requests."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
