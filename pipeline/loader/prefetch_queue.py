"""A bounded queue that one thread fills and another empties, with the time waited for each item."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
GIVE_UP_CHECK_S = 1.0  # how often a waiting consumer asks ``give_up``
STOP_CHECK_S = 0.1  # how soon a producer with a full queue notices that the consumer has left


class StarvedError(Exception):
    """No item came, and ``give_up`` returned True."""


@dataclass(frozen=True)
class _Item(Generic[T]):
    value: T


@dataclass(frozen=True)
class _End:
    error: BaseException | None  # None: the producer came to its end


class _PrefetchQueue(Generic[T]):
    """The producing thread with its queue, and the consumer's end of it."""

    def __init__(self, produce: Callable[[], Iterator[T]], depth: int, give_up: Callable[[], bool]) -> None:
        self._produce, self._give_up = produce, give_up
        self._ready: queue.Queue[_Item[T] | _End] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="producer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def items(self) -> Iterator[tuple[T, float]]:
        """What was produced, with the seconds waited for each."""
        while True:
            assert not self._stopped.is_set(), "batches cannot be taken any more once their context is left"
            start = time.perf_counter()
            item = self._next_item()
            wait_s = time.perf_counter() - start
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item.value, wait_s

    def _next_item(self) -> _Item[T] | _End:
        while True:
            try:
                return self._ready.get(timeout=GIVE_UP_CHECK_S)
            except queue.Empty:
                if self._give_up():
                    raise StarvedError from None

    def _fill(self) -> None:
        try:
            for value in self._produce():
                self._put(_Item(value))
                if self._stopped.is_set():
                    return
        except BaseException as error:  # noqa: BLE001  handed on to the consumer, whatever it is
            self._put(_End(error))
        else:
            self._put(_End(None))

    def _put(self, item: _Item[T] | _End) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put(item, timeout=STOP_CHECK_S)
            except queue.Full:
                continue


@contextmanager
def prefetched(
    produce: Callable[[], Iterator[T]], depth: int, give_up: Callable[[], bool] = lambda: False
) -> Iterator[Iterator[tuple[T, float]]]:
    """Run ``produce()`` in a thread, at most ``depth`` items ahead; gives (item, seconds waited for it).

    What the producer raises is raised where its next item was expected. While the consumer waits, ``give_up`` is called
    once a second; if it returns True, StarvedError is raised. Leaving the context stops the thread.
    """
    waiting = _PrefetchQueue(produce, depth, give_up)
    waiting.start()
    try:
        yield waiting.items()
    finally:
        waiting.stop()
