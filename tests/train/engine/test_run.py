"""What a run checks before its first step, beyond what test_pretrain.py does from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.photos import write_photo_folder
from tests.helpers.sessions import two_ranks
from tests.helpers.toy_runs import TINY
from train.config.run_config import PretrainConfig
from train.distributed.process_group import DistContext
from train.engine import build

# Each rank's own machine has another dataset under the same name.
EACH_ITS_OWN = """
import os, sys
sys.argv = [arg.replace("RANK", os.environ["RANK"]) for arg in sys.argv]
from pipeline.common.errors import exit_on_user_error
from train.pretrain import main
exit_on_user_error(main)
"""


def test_machines_with_different_copies_are_refused(tmp_path: Path) -> None:
    folder = write_photo_folder(tmp_path / "photos")
    for rank, seed in ((0, 0), (1, 1)):
        options = ShardingOptions(samples_per_shard=10, seed=seed)
        make_dataset(str(folder), tmp_path / f"data{rank}", options, quiet=True, in_process=True)
    places = ["--data", tmp_path / "dataRANK", "--run-dir", tmp_path / "run"]
    done = two_ranks(EACH_ITS_OWN, tmp_path, *places, *TINY, "--device", "cpu", "--global-batch", "12")
    assert f"error: --data {tmp_path}/data1 is another dataset here than on rank 0" in done.stderr
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()


def test_another_batch_size_is_compiled_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches may be unequal; code for any size is slower code."""
    inputs: list[list[Any]] = []

    def backend(graph: Any, of_graph: list[Any]) -> Any:
        inputs.append(of_graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled(model, backend=backend, **options))
    config = PretrainConfig(data=str(tmp_path), run_dir=tmp_path, compile=True)
    model: Any = nn.Linear(3, 3)
    parallel = build._parallel(model, config, DistContext(0, 1, 0, 1, torch.device("cpu")))
    for size in (4, 6):
        assert parallel(torch.zeros(size, 3)).shape == (size, 3)
    rows = [[value.shape[0] for value in of_graph if value.dim() == 2 and value.shape != (3, 3)] for of_graph in inputs]
    assert rows == [[4], [6]]
    assert all(type(size) is int for of_graph in rows for size in of_graph)
