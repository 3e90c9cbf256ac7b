"""Owns the feeder thread: a bounded queue kept full by one thread and emptied by another, with the waiting measured."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
GIVE_UP_CHECK_S = 1.0  # how often a consumer that waits is asked whether it still wants to
STOP_CHECK_S = 0.1  # how long a feeder with a full queue may overlook that nobody listens any more


class StarvedError(Exception):
    """Nothing came, and the consumer did not want to wait any longer."""


@dataclass(frozen=True)
class _Item(Generic[T]):
    value: T


@dataclass(frozen=True)
class _End:
    error: BaseException | None  # None: the producer came to its end


@contextmanager
def fed_ahead(
    produce: Callable[[], Iterator[T]], depth: int, give_up: Callable[[], bool] = lambda: False
) -> Iterator[Iterator[tuple[T, float]]]:
    """Run ``produce()`` in a thread, at most ``depth`` items ahead; gives (item, seconds waited for it).

    What the producer raises is raised where its next item was expected. While there is none, ``give_up`` is asked once
    a second; if it says so, StarvedError is raised. Leaving the context stops the thread.
    """
    ready: queue.Queue[_Item[T] | _End] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: _Item[T] | _End) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=STOP_CHECK_S)
            except queue.Full:
                continue

    def feed() -> None:
        try:
            for value in produce():
                put(_Item(value))
                if stopped.is_set():
                    return
        except BaseException as error:  # noqa: BLE001  handed on to the consumer, whatever it is
            put(_End(error))
        else:
            put(_End(None))

    def next_item() -> _Item[T] | _End:
        while True:
            try:
                return ready.get(timeout=GIVE_UP_CHECK_S)
            except queue.Empty:
                if give_up():
                    raise StarvedError from None

    def consume() -> Iterator[tuple[T, float]]:
        while True:
            assert not stopped.is_set(), "batches cannot be taken any more once their context is left"
            start = time.perf_counter()
            item = next_item()
            wait_s = time.perf_counter() - start
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item.value, wait_s

    thread = threading.Thread(target=feed, name="feeder", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        stopped.set()
        thread.join()
