"""Printing that never ends a run, with or without a reader, and never controls the terminal, whatever is printed."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from pipeline.common.text import printable

# The reader of a pipe or a terminal is gone; the stream was closed; the disk of a log file is full
_GONE = frozenset(
    {errno.EPIPE, errno.EIO, errno.ECONNRESET, errno.EBADF, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ESTALE}
)


# Libraries that write control sequences of their own
_MOVE_THE_CURSOR = ("tqdm.", "tyro.", "rich.")


class _Lasting:
    """A text stream whose writes go to the null device once its reader is gone, and cannot control the terminal."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text`` with control characters escaped: it may hold names from files."""
        if text.isprintable() or sys._getframe(1).f_globals.get("__name__", "").startswith(_MOVE_THE_CURSOR):
            return self.write_raw(text)
        return self.write_raw(printable(text))

    def write_raw(self, text: str) -> int:
        """Write ``text`` as it is."""
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
        if error.errno not in _GONE:
            raise error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """stdout and stderr outlive their readers (`| head`, a closed ssh), and escape what their encoding lacks.

    Streams that were closed from the start (`2>&-`) are opened on the null device: libraries write to their numbers,
    which would else become those of the next files.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, _open_closed(number, mode))
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


def _open_closed(number: int, mode: str) -> IO[str]:
    """A stream on the null device in place of a closed one, under its number if that is still free."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(number)
    except OSError:
        os.dup2(null, number, inheritable=True)
        os.close(null)
        null = number
    return open(null, mode, encoding="utf-8", closefd=False)


def write_raw(stream: Any, text: str) -> None:
    """Write text with control sequences of our own, which the streams of ``lasting_output`` would escape."""
    getattr(stream, "write_raw", stream.write)(text)
    stream.flush()


def is_terminal(stream: Any) -> bool:
    """Whether ``stream`` is a terminal that understands escape sequences."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"
