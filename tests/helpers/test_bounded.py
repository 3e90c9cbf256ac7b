"""The children of fuzzers: bombs and hangs are failures; what was tried is counted and shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tests.helpers import bounded, fault_summary


def fails(seconds: float, body: Callable[[], None]) -> str:
    """What a bounded test with this body says."""
    request = SimpleNamespace(node=SimpleNamespace(user_properties=[]))
    with pytest.raises(pytest.fail.Exception) as failure:
        bounded.bounded(seconds)(body)(request=request)
    return str(failure.value)


def test_memory_is_bounded() -> None:
    assert "MemoryError" in fails(60, lambda: bytearray(8 << 30) and None)


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not done after 1" in fails(1, lambda: time.sleep(60))
    monkeypatch.setattr(bounded, "EXAMPLE_S", 0.2)

    def hangs() -> None:
        with bounded.example():
            while True:
                pass

    assert "one example took more than 0.2 s" in fails(60, hangs)


def test_a_wrong_answer_fails_and_an_empty_test_too() -> None:
    def wrong() -> None:
        raise AssertionError("wrong bytes")

    assert "wrong bytes" in fails(60, wrong)
    with pytest.raises(AssertionError, match="nothing was tried"):
        bounded.bounded(60)(lambda: None)(request=SimpleNamespace(node=SimpleNamespace(user_properties=[])))


def test_the_table_counts_what_was_tried() -> None:
    def report(name: str, tried: int | None, *keywords: str) -> SimpleNamespace:
        properties = [] if tried is None else [("tried", tried)]
        return SimpleNamespace(when="call", nodeid=name, keywords=keywords, user_properties=properties, duration=1.0)

    passed = [report("tests/a.py::b[1]", None, "faults"), report("tests/a.py::b[2]", 30, "faults"), report("x", 9)]
    found = fault_summary.tallies({"passed": passed, "failed": [report("tests/a.py::c", 5, "faults")]})
    assert {name: (tally.tried, tally.survived) for name, tally in found.items()} == {
        "tests/a.py::b": (31, 31),
        "tests/a.py::c": (5, 4),
    }
    assert fault_summary.table(found)[-1].split() == ["36", "35", "3.0", "all", "together"]
