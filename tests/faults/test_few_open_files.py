"""A dataset of more shards than a process may open files (ulimit -n) is trained on and checked."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.train.test_pretrain import CPU, ROOT, global_batches, losses

OPEN_FILES, SHARDS = 256, 320


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image in each."""
    folder = tmp_path_factory.mktemp("many") / "shards"
    made = make_dataset(f"synthetic:{SHARDS}", folder, ShardingOptions(samples_per_shard=1), quiet=True)
    assert made.shards == SHARDS
    return folder


def run_limited(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A script that may open OPEN_FILES files, at a limit that it cannot raise."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES,) * 2),
    )


@pytest.mark.faults
@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_training(many_shards: Path, tmp_path: Path, backend: str) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    flags = ["--data", many_shards, "--run-dir", tmp_path / "run", "--epochs", "1", "--global-batch", "64", *CPU]
    ended = run_limited("train/pretrain.py", *flags, "--backend", backend)
    assert ended.returncode == 0, ended.stderr
    assert len(losses(tmp_path / "run")) == SHARDS // 64
    assert sorted(np.ravel(global_batches(tmp_path / "run", 1)).tolist()) == list(range(SHARDS))
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()


@pytest.mark.faults
def test_checking(many_shards: Path) -> None:
    ended = run_limited("tools/check_shards.py", many_shards, "--decode", "full", "--quiet")
    assert ended.returncode == 0, ended.stderr
    assert f"{SHARDS:,} samples in {SHARDS:,} shards" in ended.stdout
    assert "nothing is damaged" in ended.stdout
