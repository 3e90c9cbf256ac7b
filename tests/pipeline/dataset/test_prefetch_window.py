"""What is needed next is in the window, what is in it fits, and each shard is handed out once for every stay in it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.prefetch_window import Window

SHARDS = 6
TURNS = st.lists(st.lists(st.integers(0, SHARDS - 1), min_size=1, max_size=4, unique=True), min_size=1, max_size=12)
SIZES = st.lists(st.integers(1, 9), min_size=SHARDS, max_size=SHARDS)


def window_over(upcoming: list[list[int]], sizes: list[int], budget: int, max_steps_behind: int) -> Window:
    return Window((np.array(turn) for turn in upcoming), sizes, budget, max_steps_behind)


def taken(window: Window) -> list[int]:
    found = []
    while (shard := window.take()) is not None:
        found.append(shard)
    return found


def first_uses(upcoming: list[list[int]]) -> list[int]:
    return list(dict.fromkeys(shard for turn in upcoming for shard in turn))


@given(TURNS, SIZES, st.integers(1, 60), st.integers(0, 3))
def test_steps_in_use_stay_and_the_rest_fits(
    upcoming: list[list[int]], sizes: list[int], budget: int, max_steps_behind: int
) -> None:
    window = window_over(upcoming, sizes, budget, max_steps_behind)
    handed = taken(window)
    inside: set[int] = set(window)
    assert sorted(handed) == sorted(inside)
    for now in range(len(upcoming)):
        window.advance()
        handed = taken(window)
        in_use = {shard for turn in upcoming[max(0, now - max_steps_behind) : now + 1] for shard in turn}
        assert in_use <= set(window)
        assert all((shard in window) == (shard in set(window)) for shard in range(SHARDS))
        assert set(window) == in_use or sum(sizes[shard] for shard in window) <= budget
        # What came into the window is handed out once. A shard may leave and come back with one step.
        assert len(handed) == len(set(handed))
        assert set(window) - inside <= set(handed) <= set(window)
        inside = set(window)


@given(TURNS, SIZES)
def test_with_room_for_all_each_is_handed_out_once_in_the_order_of_use(
    upcoming: list[list[int]], sizes: list[int]
) -> None:
    window = window_over(upcoming, sizes, sum(sizes), 0)
    handed = taken(window)
    for _ in upcoming:
        window.advance()
        handed += taken(window)
    assert list(dict.fromkeys(handed)) == first_uses(upcoming)


@given(TURNS, SIZES, st.integers(1, 60), st.integers(0, 3), st.data())
def test_what_is_over_is_not_handed_out(
    upcoming: list[list[int]], sizes: list[int], budget: int, max_steps_behind: int, data: st.DataObject
) -> None:
    """However slow the fetching is."""
    window = window_over(upcoming, sizes, budget, max_steps_behind)
    for now in range(len(upcoming)):
        window.advance()
        for _ in range(data.draw(st.integers(0, 3))):
            shard = window.take()
            assert shard is None or any(shard in turn for turn in upcoming[now:])
            if shard is not None and data.draw(st.booleans()):
                window.put_back(shard)


@given(TURNS, SIZES, st.integers(1, 60))
def test_nothing_that_fits_is_left_for_later(upcoming: list[list[int]], sizes: list[int], budget: int) -> None:
    """Before the first step: as many steps as the budget holds."""
    window = window_over(upcoming, sizes, budget, 0)
    taken(window)
    fitting = 0
    while fitting < len(upcoming) and sum(sizes[shard] for shard in first_uses(upcoming[: fitting + 1])) <= budget:
        fitting += 1
    assert set(window) == set(first_uses(upcoming[:fitting]))


def test_what_could_not_be_fetched_comes_again_unless_it_is_over() -> None:
    window = window_over([[3], [4], [5]], [1] * SHARDS, 2, 0)
    assert [window.take(), window.take(), window.take()] == [3, 4, None]
    window.put_back(3)
    assert window.take() == 3
    window.advance()
    window.advance()
    window.put_back(3)  # its step is over
    assert window.take() == 5
    assert window.take() is None


def test_a_long_future_is_not_laid_out_at_once() -> None:
    asked = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal asked
        while True:
            asked += 1
            yield np.array([asked % 2])

    window = Window(endless(), [1] * SHARDS, 1, 0)
    assert [window.take(), window.take()] == [1, None]
    assert asked == 2


@given(TURNS, SIZES, st.integers(1, 60), st.integers(0, 3))
def test_who_only_looks_knows_as_much(
    upcoming: list[list[int]], sizes: list[int], budget: int, max_steps_behind: int
) -> None:
    """And is handed nothing."""
    looks, takes = (
        window_over(upcoming, sizes, budget, max_steps_behind),
        window_over(upcoming, sizes, budget, max_steps_behind),
    )
    for _ in upcoming:
        looks.advance()
        looks.look_ahead()
        takes.advance()
        taken(takes)
        assert set(looks) == set(takes)
