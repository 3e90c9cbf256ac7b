"""CPU cores, versions, progress bars, durations, and the stderr of C libraries."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm


def share_of_cores(local_world_size: int) -> int:
    """The threads of one rank when a machine's ranks share its cores evenly."""
    return max(1, cores() // local_world_size)


def progress(quiet: bool, **settings: Any) -> tqdm:
    """A progress bar on stderr: ten lines a second for a person, one in ten seconds for a log file."""
    return tqdm(disable=quiet, mininterval=0.1 if sys.stderr.isatty() else 10.0, **settings)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def dali_installed() -> bool:
    """Whether NVIDIA DALI can be imported; found out without importing it."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def duration(seconds: float) -> str:
    """Seconds for people: ``41 s``, ``3 min 20 s``, ``5 h 02 min``, ``3 d 04 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


_stderr_lock = threading.Lock()


@contextmanager
def captured_stderr(*, echo: bool) -> Iterator[list[str]]:
    """Collect what the process prints to stderr in the block; the list holds one text when the block ends.

    For the messages of C libraries, which print them instead of returning them. ``echo``: print it afterwards, so that
    nothing which other threads print meanwhile is lost.
    """
    text: list[str] = []
    with _stderr_lock, tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield text
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            printed = file.read()
            text.append(printed.decode(errors="replace"))
            if echo and printed:
                os.write(2, printed)
