"""Runs a fuzzer in a child with little memory, few files, small files and little time: a bomb is a failure, no crash.

    @bounded(seconds=30)
    @given(...)
    def test_any_bytes(...): ...

``count_faults(1)`` inside counts an example for the table at the end of ``make test-faults``.
"""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

MORE_MEMORY = 1 << 30  # bytes of address space beyond what the child begins with
LARGEST_FILE, MOST_FILES = 64 << 20, 512
EXAMPLE_S = 20.0  # one example may take so long on a busy machine; an endless one takes for ever
_tried = [0]


def count_faults(number: int) -> None:
    """Count faults that this process has tried."""
    _tried[0] += number


@contextmanager
def example() -> Iterator[None]:
    """One example: counted, and ended by TimeoutError when it takes too long."""
    count_faults(1)

    def end(*_: Any) -> None:
        raise TimeoutError(f"one example took more than {EXAMPLE_S} s")

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, EXAMPLE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def bounded(seconds: float) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test in a forked child, which is killed after ``seconds``; its traceback is that of the failure.

    The examples that it has tried are counted in the report's property ``tried``.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def wrapper(request: pytest.FixtureRequest, **fixtures: Any) -> None:
            run_in_child(request, seconds, lambda finish: test(**fixtures))

        wrapper.unbounded = test  # type: ignore[attr-defined]
        signature = inspect.signature(test)
        ours = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY)
        wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*(p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values()), ours]
        )
        del wrapper.__wrapped__  # type: ignore[attr-defined]  # pytest would see Hypothesis' own test through it
        return wrapper

    return decorate


def run_in_child(
    request: pytest.FixtureRequest, seconds: float, body: Callable[[Callable[[str | None], NoReturn]], None]
) -> None:
    """Run ``body(finish)`` within the limits; ``finish(failure or None)`` ends the child before ``body`` returns."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _run(writer, body)
    os.close(writer)
    failure, tried = _wait(child, reader, seconds)
    request.node.user_properties.append(("tried", tried))
    if failure is not None:
        pytest.fail(failure, pytrace=False)
    assert tried > 0, "nothing was tried"


def _run(writer: int, body: Callable[[Callable[[str | None], NoReturn]], None]) -> NoReturn:
    """The child: ``body`` within its limits; its outcome goes to ``writer``."""

    def finish(failure: str | None) -> NoReturn:
        os.write(writer, pickle.dumps((failure and failure[-30_000:], _tried[0])))
        sys.stdout.flush()
        os._exit(0)

    try:
        _tried[0] = 0
        torch.set_num_threads(1)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE,) * 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES,) * 2)
        body(finish)
    except BaseException:  # noqa: BLE001  the parent raises it
        finish(traceback.format_exc())
    finish(None)


def _wait(child: int, reader: int, seconds: float) -> tuple[str | None, int]:
    """(what went wrong, how much was tried)."""
    deadline = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            return f"not done after {seconds} s", 0
        time.sleep(0.05)
    with open(reader, "rb") as file:
        told = file.read()
    return pickle.loads(told) if told else ("the child has died: killed for memory, or crashed", 0)
