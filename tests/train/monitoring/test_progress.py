"""Who waited for data, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.test_pretrain import flags, run_here
from train.monitoring.progress import DataWait, describe_waits


def test_waits_name_the_slowest_rank() -> None:
    waits = DataWait((1.0, 3.0), 10.0)
    assert (waits.shares, waits.slowest) == ([0.1, 0.3], 1)
    assert str(waits) == "30% (ranks 10% 30%)"
    assert describe_waits(waits) == "data_wait: 30% (ranks 10% 30%); rank 1 waited longest, 3.0 s of 10.0 s"
    assert str(DataWait((2.0,), 10.0)) == "20%"
    assert describe_waits(DataWait((2.0,), 10.0)) == "data_wait: 20%, 2.0 s of 10.0 s"
    many = DataWait((*[1.0] * 37, 4.0, *[1.0] * 26), 10.0)
    assert str(many) == "40% (rank 37; mean 10%)"


def test_a_run_ends_with_who_waited(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run", "--max-steps", "3", "--knn-every", "0")
    assert run_here(monkeypatch, [*arguments, "--epoch-order", "blocks", "--block-shards", "2"]) == 0
    assert "data_wait: " in capsys.readouterr().out


def test_the_order_is_part_of_a_run(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run", "--max-steps", "1", "--knn-every", "0")
    assert run_here(monkeypatch, arguments) == 0
    assert run_here(monkeypatch, [*arguments, "--resume", "--epoch-order", "blocks"]) == 2
    assert "the run has random, given is blocks" in capsys.readouterr().err
