"""The waiting of a GPU's stream is told apart from that of the host."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from pipeline.loader.timing import Stalls

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class FakeEvent:
    """An event of a device whose clock is the stream's."""

    finished: list[FakeEvent] = []  # noqa: RUF012  # those that the host has waited for
    device_ms = float("inf")  # how far the device has come

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.ms = -1.0

    def record(self, stream: Any) -> None:
        self.ms = stream.now_ms

    def synchronize(self) -> None:
        FakeEvent.finished.append(self)

    def query(self) -> bool:
        return 0 <= self.ms <= FakeEvent.device_ms

    def elapsed_time(self, later: FakeEvent) -> float:
        assert later.query(), "the host would wait"
        return later.ms - self.ms


class FakeStream:
    __class__ = torch.cuda.Stream  # type: ignore[assignment]  # for the checks of annotations
    now_ms = 0.0


def test_what_a_stream_waits_adds_up_until_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    stalls, stream = Stalls(), FakeStream()
    assert stalls.read_s() == 0
    for waited_ms, worked_ms in ((250, 1000), (0, 1000), (500, 70)):
        with stalls.on(stream):  # type: ignore[arg-type]
            stream.now_ms += waited_ms
        stream.now_ms += worked_ms
    FakeEvent.finished.clear()
    assert stalls.read_s() == 0.75
    assert [event.ms for event in FakeEvent.finished] == [2750.0]  # the last mark: the others lie before it
    assert stalls.read_s() == 0


def test_what_is_not_over_is_left_to_the_next_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    stalls, stream = Stalls(), FakeStream()
    FakeEvent.finished.clear()
    for waited_ms in (100, 200, 400):  # over after 100, 1300 and 2700 ms
        with stalls.on(stream):  # type: ignore[arg-type]
            stream.now_ms += waited_ms
        stream.now_ms += 1000
    for device_ms, read_s in ((50, 0), (1299, 0.1), (1300, 0.2), (2699, 0), (2700, 0.4), (9999, 0)):
        monkeypatch.setattr(FakeEvent, "device_ms", device_ms)
        assert stalls.read_s(wait=False) == read_s
    assert FakeEvent.finished == []


@pytest.mark.gpu
@needs_gpu
def test_a_stream_that_waits_for_another_stalls_and_the_host_does_not() -> None:
    model, loader, stalls = torch.cuda.current_stream(), torch.cuda.Stream(), Stalls()
    torch.cuda._sleep(1000)  # the first call loads code
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    with torch.cuda.stream(loader):
        torch.cuda._sleep(400_000_000)  # cycles: at least 0.1 s
        done = loader.record_event()
    with stalls.on(model):
        model.wait_event(done)
    handed_over_s = time.perf_counter() - start_s
    stalled_s = stalls.read_s()
    assert stalled_s > 0.1 > handed_over_s
    assert stalls.read_s() == 0
