"""Memory that others would use again is held exactly as long as queued work reads it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from pipeline.common.buffers import HeldUntilRead


class FakeEvent:
    done = False

    def query(self) -> bool:
        return self.done


class FakeStream:
    def __init__(self) -> None:
        self.events: list[FakeEvent] = []

    def record_event(self) -> FakeEvent:
        self.events.append(FakeEvent())
        return self.events[-1]


def test_memory_goes_when_the_stream_has_read_it_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = FakeStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    held = HeldUntilRead()

    def keep() -> weakref.ref[torch.Tensor]:
        tensor = torch.zeros(3)
        held.keep([tensor, torch.ones(1)])
        return weakref.ref(tensor)

    first, second = keep(), keep()
    gc.collect()
    assert first() is not None
    assert second() is not None
    stream.events[0].done = True
    third = keep()
    gc.collect()
    assert first() is None
    assert second() is not None
    assert third() is not None
    for event in stream.events:
        event.done = True
    keep()  # whose own event is not done
    gc.collect()
    assert len(held) == 1
    assert second() is None
    assert third() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu() -> None:
    held, device = HeldUntilRead(), torch.device("cuda")
    with torch.cuda.stream(torch.cuda.Stream(device)):
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]  # cycles; a tenth of a second and more
        held.keep([torch.zeros(1, device=device)])
        assert len(held) == 1
        torch.cuda.synchronize(device)
        held.keep([torch.zeros(1, device=device)])
        torch.cuda.synchronize(device)
        held.keep([])
        torch.cuda.synchronize(device)
    assert len(held) <= 1
