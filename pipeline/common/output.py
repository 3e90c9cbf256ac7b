"""Printing that never ends a run: neither when the reader of a pipe is gone, nor for a letter that cannot be shown."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Lasting:
    """A text stream whose writes go to the null device once its reader is gone."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO, errno.ECONNRESET):
            raise error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """stdout and stderr outlive their readers (`| head`, a closed ssh), and escape what their encoding lacks."""
    former = sys.stdout, sys.stderr
    for stream in former:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (stream and _Lasting(stream) for stream in former)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Lasting):
                stream.flush()
        sys.stdout, sys.stderr = former


def is_terminal(stream: Any) -> bool:
    """Whether ``stream`` is a terminal that understands escape sequences."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"
