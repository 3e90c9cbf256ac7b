"""The prefetch queue: bounded, in order; errors reach the consumer; its thread ends with the context."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from pipeline.loader import prefetch_queue
from pipeline.loader.prefetch_queue import StarvedError, prefetched


def producers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "producer"]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_items_come_in_order_with_their_waiting_time(depth: int) -> None:
    with prefetched(lambda: iter(range(50)), depth) as items:
        delivered = list(items)
        assert list(items) == []  # and it stays at its end
    assert [value for value, _ in delivered] == list(range(50))
    assert all(wait_s >= 0 for _, wait_s in delivered)
    assert not producers()


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_never_more_than_depth_and_one_ahead(depth: int) -> None:
    """``depth`` in the queue and one in the thread's hand; and it does work that far ahead."""
    asked, ahead, full = [0], [], threading.Semaphore(0)

    def produce() -> Iterator[int]:
        for value in range(100):
            ahead.append(value + 1 - asked[0])
            if ahead[-1] == depth + 1:
                full.release()
            yield value

    with prefetched(produce, depth) as items:
        for value in range(100 - depth - 1):
            assert full.acquire(timeout=60)  # the thread has run as far ahead as it may
            asked[0] += 1
            assert next(items)[0] == value
    assert max(ahead) == depth + 1


def test_an_error_arrives_where_the_next_item_was_expected() -> None:
    def produce() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("the disk is gone")

    with prefetched(produce, 4) as items:
        assert [next(items)[0], next(items)[0]] == [1, 2]
        with pytest.raises(OSError, match="the disk is gone"):
            next(items)
        assert list(items) == []
    assert not producers()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_even_errors_that_end_a_program_arrive(error: type[BaseException]) -> None:
    def produce() -> Iterator[int]:
        raise error
        yield 0

    with prefetched(produce, 1) as items, pytest.raises(error):
        next(items)


def test_an_error_before_the_first_item_arrives_too() -> None:
    def produce() -> Iterator[int]:
        raise ValueError("cannot begin")

    with prefetched(produce, 1) as items, pytest.raises(ValueError, match="cannot begin"):
        next(items)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_leaving_early_stops_the_thread_and_closes_its_source(taken: int) -> None:
    closed = threading.Event()

    def produce() -> Iterator[int]:
        try:
            value = 0
            while True:
                yield (value := value + 1)
        finally:
            closed.set()

    with prefetched(produce, 2) as items:
        for _ in range(taken):
            next(items)
        assert len(producers()) == 1
    assert not producers()
    assert closed.is_set()


def test_an_error_of_the_consumer_stops_the_thread_too() -> None:
    with pytest.raises(ZeroDivisionError), prefetched(lambda: iter(range(1000)), 2) as items:
        raise ZeroDivisionError(next(items))
    assert not producers()


def test_the_source_runs_in_one_thread_that_is_not_the_consumers() -> None:
    threads: set[int] = set()

    def produce() -> Iterator[None]:
        for _ in range(5):
            threads.add(threading.get_ident())
            yield

    with prefetched(produce, 2) as items:
        assert len(list(items)) == 5
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_an_error_nobody_waits_for_does_not_hold_up_the_end() -> None:
    """The error comes while the queue is full and the consumer has left."""

    def produce() -> Iterator[int]:
        yield 1
        raise OSError("late")

    with prefetched(produce, 1):
        pass
    assert not producers()


def test_nothing_can_be_taken_after_the_context() -> None:
    with prefetched(lambda: iter(range(10)), depth=1) as items:
        next(items)
    with pytest.raises(AssertionError, match="context is left"):
        next(items)


def test_a_consumer_may_give_up_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_queue, "GIVE_UP_CHECK_S", 0.01)
    patience, asked, closed = 3, [], threading.Event()

    def produce() -> Iterator[int]:
        yield 1
        closed.wait()

    def give_up() -> bool:
        asked.append(len(asked))
        return len(asked) > patience

    with prefetched(produce, 1, give_up) as items:
        assert next(items)[0] == 1
        with pytest.raises(StarvedError):
            next(items)
        closed.set()
    assert len(asked) == patience + 1
    assert not producers()
