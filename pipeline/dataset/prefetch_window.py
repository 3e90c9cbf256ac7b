"""The shards that a loader reads next: which to fetch, which to keep in the cache, which may be removed.

Batches are pure functions of integers, so the shards of every later step are known in advance. The window holds those
of the next steps, as many as fit into the cache. Pure: no files, no threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from jaxtyping import Int64
from numpy import ndarray

Upcoming = Iterator[Int64[ndarray, "_"]]  # the shards that each step reads, step by step  # noqa: F821
_MAX_USES = 1 << 20  # entries kept, about 100 MB; steps beyond are not looked at in advance
_LOOK = 16  # steps looked at in one call, so that each call is short


class Window:
    """Shards of the steps from ``max_steps_behind`` ago on, as far ahead as ``budget`` bytes go. Not thread-safe."""

    def __init__(self, upcoming: Upcoming, sizes: Sequence[int], budget: int, max_steps_behind: int) -> None:
        """``sizes``: bytes of each shard; ``max_steps_behind``: steps still read after a later one has begun."""
        self._upcoming, self._sizes, self._budget, self._max_steps_behind = upcoming, sizes, budget, max_steps_behind
        self._laid: deque[list[int]] = deque()  # the shards of steps now - max_steps_behind .. the last one looked at
        self._uses: dict[int, int] = {}  # shard -> steps in _laid that read it
        self._last: dict[int, int] = {}  # shard -> the last of these steps
        self._bytes, self._entries, self._now, self._ahead = 0, 0, -1, -1  # _ahead: the last step looked at
        self._next: list[int] | None = None  # the shards of the step that did not fit
        self._wanted: deque[int] = deque()  # shards not yet handed out by ``take``, in the order of first use

    def __contains__(self, shard: int) -> bool:
        return shard in self._uses

    def __iter__(self) -> Iterator[int]:
        return iter(list(self._uses))

    def advance(self) -> None:
        """The next step begins: steps from more than ``max_steps_behind`` ago leave the window."""
        self._now += 1
        while self._ahead < self._now and self._extend(force=True):
            pass
        while len(self._laid) > self._ahead - self._now + 1 + self._max_steps_behind:
            for shard in self._laid.popleft():
                self._entries -= 1
                self._uses[shard] -= 1
                if self._uses[shard] == 0:
                    del self._uses[shard], self._last[shard]
                    self._bytes -= self._sizes[shard]

    def take(self) -> int | None:
        """The next shard to fetch, in the order of first use; None if there is none at present."""
        for _ in range(_LOOK):
            while self._wanted:
                shard = self._wanted.popleft()
                if self._last.get(shard, -1) >= self._now:  # else its last step is over
                    return shard
            if not self._look_further():
                break
        return None

    def look_ahead(self) -> None:
        """Take in more steps without fetching, for a process that only needs to know which shards must stay."""
        self._wanted.clear()
        for _ in range(_LOOK):
            if not self._look_further():
                break

    def put_back(self, shard: int) -> None:
        """Have ``take`` return the shard again; it could not be fetched now."""
        self._wanted.appendleft(shard)

    def _look_further(self) -> bool:
        return len(self._uses) < len(self._sizes) and self._extend(force=False)

    def _extend(self, *, force: bool) -> bool:
        """Take one more step into the window if it fits, or anyway if ``force``."""
        if self._next is None:
            coming = next(self._upcoming, None)
            if coming is None:
                return False
            self._next = coming.tolist()
        new = [shard for shard in self._next if shard not in self._uses]
        coming_bytes = sum(self._sizes[shard] for shard in new)
        if not (force or (self._bytes + coming_bytes <= self._budget and self._entries < _MAX_USES)):
            return False
        for shard in self._next:
            self._uses[shard] = self._uses.get(shard, 0) + 1
            self._last[shard] = self._ahead + 1
        self._laid.append(self._next)
        self._bytes += coming_bytes
        self._entries += len(self._next)
        self._wanted.extend(new)
        self._next, self._ahead = None, self._ahead + 1
        return True
