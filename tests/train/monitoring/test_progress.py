"""Who waited and what cost most to read: counted by threads, summed over ranks, said in a line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.dataset.dataset import ShardSet
from pipeline.loader.timing import ReadCosts
from tests.train.test_pretrain import flags, run_here
from train.distributed.process_group import DistContext
from train.monitoring.progress import DataWait, costliest_shard, describe_shard, describe_waits

ALONE = DistContext.alone(torch.device("cpu"))


def test_reads_of_many_threads_add_up() -> None:
    costs = ReadCosts(3)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: costs.add([0, 2, 2], [0.5, 0.25, 0.25]), range(200)))
    np.testing.assert_allclose(costs.seconds, [100, 0, 100])
    assert costs.reads.tolist() == [200, 0, 400]


def test_the_costliest_shard_is_the_one_with_most_seconds(photo_dataset: ShardSet) -> None:
    costs = ReadCosts(len(photo_dataset.shards))
    assert costliest_shard(ALONE, photo_dataset, costs) is None
    costs.add([0, 0, 0, 3], [0.001, 0.001, 0.001, 0.009])
    cost = costliest_shard(ALONE, photo_dataset, costs)
    assert cost is not None
    assert (cost.name, cost.reads) == ("shard-000003.tar", 1)
    assert (cost.ms, cost.mean_ms) == (pytest.approx(9), pytest.approx(3))
    assert describe_shard(cost) == (
        "reading: shard-000003.tar cost most, 9.00 ms a sample over 1 reads; the mean of all shards is 3.00 ms"
    )


def test_waits_name_the_slowest_rank() -> None:
    waits = DataWait((1.0, 3.0), 10.0)
    assert (waits.shares, waits.slowest) == ([0.1, 0.3], 1)
    assert str(waits) == "30% (ranks 10% 30%)"
    assert describe_waits(waits) == "data_wait: 30% (ranks 10% 30%); rank 1 waited longest, 3.0 s of 10.0 s"
    assert str(DataWait((2.0,), 10.0)) == "20%"
    assert describe_waits(DataWait((2.0,), 10.0)) == "data_wait: 20%, 2.0 s of 10.0 s"
    many = DataWait((*[1.0] * 37, 4.0, *[1.0] * 26), 10.0)
    assert str(many) == "40% (rank 37; mean 10%)"


def test_a_run_ends_with_who_waited_and_what_cost_most(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run", "--max-steps", "3", "--knn-every", "0")
    assert run_here(monkeypatch, [*arguments, "--epoch-order", "blocks", "--block-shards", "2"]) == 0
    printed = capsys.readouterr().out
    assert "data_wait: " in printed
    assert "cost most" in printed
    assert "the mean of all shards is" in printed


def test_the_order_is_part_of_a_run(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run", "--max-steps", "1", "--knn-every", "0")
    assert run_here(monkeypatch, arguments) == 0
    assert run_here(monkeypatch, [*arguments, "--resume", "--epoch-order", "blocks"]) == 2
    assert "epoch_order" in capsys.readouterr().err
