"""On a GPU the model's kernels go before those of the loader, which works ahead of it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.loader import producer
from train.config.run_config import PretrainConfig
from train.distributed.process_group import DistContext
from train.engine import build

GPU = torch.device("cuda", 0)


class Stream:
    """A stream without a device. As on a GPU, a lower number of priority goes first, and 0 is the lowest priority."""

    made: list[Stream] = []  # noqa: RUF012

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        assert device.type == "cuda"
        self.priority = priority
        self.ended = False
        Stream.made.append(self)

    def record_event(self) -> str:
        return f"event of {self.priority}"

    def synchronize(self) -> None:
        self.ended = True


def test_the_models_stream_goes_before_the_loaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Any] = []
    monkeypatch.setattr(Stream, "made", [])
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(current.append(stream)))
    monkeypatch.setattr(build, "on_all_ranks", lambda *_: 1 / 0)  # what follows the choice of the stream
    config = PretrainConfig(data=str(tmp_path), run_dir=tmp_path)
    with pytest.raises(ZeroDivisionError):
        build.prepare(config, DistContext(0, 1, 0, 1, GPU))
    (model,) = current
    batches = producer._on_side_stream(iter([object(), object()]), GPU)  # type: ignore[list-item]
    assert [event for _, event in batches] == [f"event of {current[-1].priority}"] * 2
    loader = current[-1]
    assert loader is not model
    assert loader.ended  # the back end's memory is freed behind its kernels
    assert model.priority < loader.priority == 0
