"""A real file system that fills up: nothing half-written is taken for whole, and all goes on when there is room."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import train.openmp  # noqa: F401
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from tests.helpers.sessions import ROOT, Sessions
from tests.helpers.toy_runs import CPU, TINY
from train.storage.checkpoints import is_intact
from train.storage.run_folder import read_lines

ROOMY = "64m"
RUN = ["--epochs", "2", "--global-batch", "12", "--checkpoint-every", "1steps", "--backend", "torchvision", *TINY, *CPU]
KEEP, STEPS = 2, 8  # checkpoints kept, of 5.5 MB each; 48 photos

Resize = Callable[[str], None]


def mount(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Resize]]:
    """A file system of its own, and what sets its size."""
    if shutil.which("mount") is None or sys.platform != "linux":
        pytest.skip("a small file system is made with Linux's mount, which is not here")
    folder = tmp_path / "disk"
    folder.mkdir()
    made = mount("-t", "tmpfs", "-o", f"size={ROOMY}", "tmpfs", str(folder))
    if made.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not permitted here (it takes root): {made.stderr.strip()}")

    def resize(size: str) -> None:
        done = mount("-o", f"remount,size={size}", str(folder))
        assert done.returncode == 0, done.stderr

    try:
        yield folder, resize
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make_shards(source: Path, out: Path, workers: int) -> subprocess.CompletedProcess[str]:
    """The command, with an option that leaves the images as they are but keeps it from knowing the room they take."""
    options = ["--samples-per-shard", "10", "--workers", str(workers), "--shorter-side", "1000"]
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(source), str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def calm_shards(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("calm") / "out"
    made = make_shards(photo_folder, out, 1)
    assert made.returncode == 0, made.stderr
    return out


def starve_sharding(photo_folder: Path, calm: Path, disk: Path, resize: Resize, share: float, workers: int) -> None:
    """Sharding onto a disk of ``share`` of the room that it takes."""
    needed = sum(-(-len(data) // 4096) * 4 for data in tree(calm).values())  # KiB in whole pages
    resize(f"{max(4, int(share * needed))}k")
    for _ in range(2):  # trying again does not make room
        failed = make_shards(photo_folder, disk / "out", workers)
        assert failed.returncode == 2, failed.stderr
        assert "No space left on device" in failed.stderr
        assert "free some space" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not (disk / "out" / "dataset.json").exists()
        with pytest.raises(UserError, match=r"half-written|no dataset"):
            ShardSet.open(disk / "out")
    resize(ROOMY)
    made = make_shards(photo_folder, disk / "out", workers)
    assert made.returncode == 0, made.stderr
    assert tree(disk / "out") == tree(calm)


def test_a_disk_that_fills_up_while_shards_are_written(
    photo_folder: Path, calm_shards: Path, small_disk: tuple[Path, Resize]
) -> None:
    starve_sharding(photo_folder, calm_shards, *small_disk, share=0.5, workers=2)


@pytest.mark.faults
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.97, 1.0])
def test_a_disk_of_any_size_too_small_for_the_shards(
    share: float, workers: int, photo_folder: Path, calm_shards: Path, small_disk: tuple[Path, Resize]
) -> None:
    """At 1.0 the dataset itself would fit, but not beside what is written on the way."""
    starve_sharding(photo_folder, calm_shards, *small_disk, share=share, workers=workers)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    made = Sessions(tmp_path_factory.mktemp("sessions"))
    yield made
    made.close()


def flags(data: Path, run_dir: Path) -> list[str]:
    record = ["--log-every", "1", "--record-samples", "--keep-checkpoints", str(KEEP)]
    return ["--data", str(data), "--run-dir", str(run_dir), *RUN, *record]


def numbers(run_dir: Path) -> tuple[dict[int, float], list[list[int]]]:
    """Losses by step and the samples of every step, each of which is there once."""
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    samples = read_lines(run_dir / "samples-rank0.jsonl")
    assert [line["step"] for line in samples] == list(range(1, STEPS + 1))
    return {line["step"]: line["loss"] for line in lines}, [line["ids"] for line in samples]


@pytest.fixture(scope="module")
def undisturbed(photo_dataset_path: Path, sessions: Sessions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert sessions.run(flags(photo_dataset_path, run_dir)) == 0, sessions.said()
    return run_dir


def starve_run(data: Path, sessions: Sessions, undisturbed: Path, disk: Path, resize: Resize, size: str) -> None:
    """A run whose folder lies on a disk of ``size``."""
    resize(size)
    arguments = flags(data, disk / "run")
    for resumed in ([], ["--resume"]):
        before = len(sessions.said())
        code = sessions.run([*arguments, *resumed])
        said = sessions.said()[before:]
        assert code == 2, said
        assert "No space left on device" in said
        assert "free some space" in said
        assert said.count("Traceback") == said.count("Exception in thread")  # TensorBoard's own thread prints one
        assert not (disk / "run" / "summary.json").exists()
        assert all(is_intact(path) for path in (disk / "run").glob("checkpoints/*.pt"))
    resize(ROOMY)
    assert sessions.run([*arguments, "--resume"]) == 0, sessions.said()
    assert numbers(disk / "run") == numbers(undisturbed)
    assert len(list((disk / "run" / "checkpoints").iterdir())) == KEEP


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(
    photo_dataset_path: Path, sessions: Sessions, undisturbed: Path, small_disk: tuple[Path, Resize]
) -> None:
    """The first checkpoint fits, the second does not."""
    starve_run(photo_dataset_path, sessions, undisturbed, *small_disk, size="8m")


@pytest.mark.faults
@pytest.mark.parametrize("size", ["4k", "8k", "12k", "16k", "24k", "28k", "40k", "1m", "6m", "11m", "14m", "16m"])
def test_a_disk_of_any_size_too_small_for_the_run(
    size: str,
    photo_dataset_path: Path,
    sessions: Sessions,
    undisturbed: Path,
    small_disk: tuple[Path, Resize],
) -> None:
    """From one on which not even config.json finds room to one that holds the checkpoints, but not one more."""
    starve_run(photo_dataset_path, sessions, undisturbed, *small_disk, size=size)
