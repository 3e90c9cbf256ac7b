"""The training script on a small dataset: killed and resumed, on 1, 2 and 3 processes, and with mistakes."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as td
from torch.nn.parallel import DistributedDataParallel

import train.openmp  # noqa: F401
from model.methods.simsiam import simsiam_loss
from pipeline.common import errors as errors_module
from pipeline.loader.loader import ViewBatch
from pipeline.sampling.sampler import batch_ids
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from train import pretrain
from train.config.recipes import parse_config
from train.distributed.process_group import DistContext
from train.distributed.stop_signals import EXIT_PREEMPTED
from train.engine import step as step_module
from train.engine.build import prepare
from train.monitoring.reporter import Reporter, StepResult
from train.storage.run_folder import LOCK_FILE, read_lines

ROOT = Path(__file__).resolve().parents[2]
EPOCHS, STEPS_PER_EPOCH, GLOBAL_BATCH = 2, 4, 12  # 48 samples
STEPS = EPOCHS * STEPS_PER_EPOCH
HEADS = ["--dim", "16", "--projector-hidden", "16", "--predictor-hidden", "4"]
TINY = ["--backbone", "resnet_tiny", "--image-size", "16", *HEADS]
CPU = [*TINY, "--device", "cpu", "--backend", "torchvision", "--threads", "1", "--log-every", "1", "--record-samples"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As in the subprocesses: sums in the same order, and no crowding of the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def flags(data: Path, run_dir: Path, *more: str) -> list[str]:
    run = ["--data", str(data), "--run-dir", str(run_dir), "--epochs", str(EPOCHS), "--global-batch", str(GLOBAL_BATCH)]
    return [*run, *CPU, *more]


def run_here(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    """The script in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
    try:
        errors_module.exit_on_user_error(pretrain.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def run_apart(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def torchrun(
    processes: int, arguments: list[str], script: str = "train/pretrain.py"
) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return run_apart([*launcher, script, *arguments])


def losses(run_dir: Path) -> dict[int, float]:
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if "loss" in line]
    assert len(lines) == len({line["step"] for line in lines})  # one line per step
    return {line["step"]: line["loss"] for line in lines}


def knn_lines(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["knn_top1"] for line in read_lines(run_dir / "metrics.jsonl") if "knn_top1" in line}


def global_batches(run_dir: Path, ranks: int) -> list[list[int]]:
    """The sample ids of each step, the ranks' parts put together."""
    parts = [read_lines(run_dir / f"samples-rank{rank}.jsonl") for rank in range(ranks)]
    return [[i for part in step for i in part["ids"]] for step in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run in one process."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, flags(photo_dataset_path, run_dir)) == 0
    return run_dir


def test_a_run_leaves_what_it_promises(undisturbed: Path, photo_dataset_path: Path) -> None:
    lines = read_lines(undisturbed / "metrics.jsonl")
    first = next(line for line in lines if "loss" in line)
    assert set(first) >= {"epoch", "step", "loss", "lr", "z_std", "img_per_s", "data_wait"}
    assert [line["epoch"] for line in lines if "loss" in line] == [0] * 4 + [1] * 4
    assert list(losses(undisturbed)) == list(range(1, STEPS + 1))
    assert list(knn_lines(undisturbed)) == [0, 4, 8]
    assert json.loads((undisturbed / "config.json").read_text())["data"] == str(photo_dataset_path)
    assert json.loads((undisturbed / "plan.json").read_text())["total_steps"] == STEPS
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["finished"]
    assert summary["step"] == STEPS
    assert (undisturbed / summary["checkpoint"]).exists()
    assert list((undisturbed / "tensorboard").iterdir())


def test_the_samples_are_those_of_the_order(undisturbed: Path) -> None:
    expected = [batch_ids(48, 0, step // 4, step % 4, GLOBAL_BATCH).tolist() for step in range(STEPS)]
    assert global_batches(undisturbed, 1) == expected


KILLED = """
import train.openmp
import os, signal, sys, time
from train import pretrain
from train.monitoring.reporter import Reporter

write = Reporter.step

def write_then_die(self, step, result):
    write(self, step, result)
    if step == 6:  # in the middle of the second epoch, before its checkpoint, and after that of step 3 is on disk
        while not list(self._config.run_dir.glob("checkpoints/step-000000003-*.pt")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

Reporter.step = write_then_die
pretrain.main()
"""


def test_killed_and_resumed_is_bit_for_bit_the_undisturbed_run(
    undisturbed: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run", "--checkpoint-every", "3steps")
    killed = run_apart([sys.executable, "-c", KILLED, *arguments])
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert max(losses(tmp_path / "run")) == 6
    assert not (tmp_path / "run" / "summary.json").exists()
    # The newest checkpoint is that after step 3, in the middle of the first epoch.
    names = [path.name[:14] for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["step-000000003"]
    assert run_here(monkeypatch, [*arguments, "--resume"]) == 0
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert knn_lines(tmp_path / "run") == knn_lines(undisturbed)
    assert global_batches(tmp_path / "run", 1) == global_batches(undisturbed, 1)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_saves_the_step_and_exits_with_its_own_code(
    undisturbed: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = signal.getsignal(getattr(signal, name))
    write = Reporter.step

    def write_then_signal(self: Reporter, step: int, result: StepResult) -> None:
        write(self, step, result)
        if step == 5:
            os.kill(os.getpid(), getattr(signal, name))

    arguments = flags(photo_dataset_path, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "step", write_then_signal)
        assert run_here(patch, arguments) == EXIT_PREEMPTED
    assert max(losses(tmp_path / "run")) == 5
    assert signal.getsignal(getattr(signal, name)) == before
    assert run_here(monkeypatch, [*arguments, "--resume"]) == 0
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_max_steps_stops_early_and_can_be_raised(
    undisturbed: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run")
    assert run_here(monkeypatch, [*arguments, "--max-steps", "3"]) == 0
    assert not json.loads((tmp_path / "run" / "summary.json").read_text())["finished"]
    assert run_here(monkeypatch, [*arguments, "--resume"]) == 0
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    undisturbed: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run", "--checkpoint-every", "2steps")
    assert run_here(monkeypatch, [*arguments, "--max-steps", "6"]) == 0
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    assert run_here(monkeypatch, [*arguments, "--resume"]) == 0
    out = capsys.readouterr().out
    assert f"{newest.name}.damaged is damaged" in out
    assert "going on after step 4 of 8" in out
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_other_batch_statistics_after_a_resume_are_told(
    undisturbed: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As on fewer GPUs: the batches stay, the losses cannot."""
    arguments = flags(photo_dataset_path, tmp_path / "run")
    assert run_here(monkeypatch, [*arguments, "--max-steps", "3"]) == 0
    assert run_here(monkeypatch, [*arguments, "--max-steps", "5", "--resume", "--accumulate", "3"]) == 0
    out = capsys.readouterr().out
    assert "batch norm takes its statistics over 4 images at a time from here on, 12 before" in out
    assert run_here(monkeypatch, [*arguments, "--max-steps", "6", "--resume", "--accumulate", "3"]) == 0
    assert "batch norm takes its statistics" not in capsys.readouterr().out
    assert global_batches(tmp_path / "run", 1) == global_batches(undisturbed, 1)[:6]
    assert losses(tmp_path / "run")[3] == losses(undisturbed)[3]
    assert losses(tmp_path / "run")[4] != losses(undisturbed)[4]


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_sees_the_same_batches(
    undisturbed: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """With two processes the run is also handed to one process in the middle of an epoch."""
    arguments = flags(photo_dataset_path, tmp_path / "run")
    handed_over_at = 5 if processes == 2 else STEPS
    ended = torchrun(processes, [*arguments, "--max-steps", str(handed_over_at)])
    assert ended.returncode == 0, ended.stderr
    expected = global_batches(undisturbed, 1)
    assert global_batches(tmp_path / "run", processes) == expected[:handed_over_at]
    assert knn_lines(tmp_path / "run")[0] == knn_lines(undisturbed)[0]  # the untrained encoder, features of all ranks
    assert ended.stdout.count("plan for") == 1
    assert "batch norm over all ranks (SyncBN)" in ended.stdout
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(losses(undisturbed)[step], abs=1e-4)
    if processes == 2:
        assert run_here(monkeypatch, [*arguments, "--resume"]) == 0
        assert [line["ids"] for line in read_lines(tmp_path / "run" / "samples-rank0.jsonl")][5:] == expected[5:]
        assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 1))


def test_a_mistake_on_several_processes_is_told_once(photo_dataset_path: Path, tmp_path: Path) -> None:
    ended = torchrun(2, flags(photo_dataset_path, tmp_path / "run", "--global-batch", "13"))
    assert ended.returncode != 0
    assert ended.stderr.count("error: --global-batch 13 cannot be divided by 2 processes") == 1
    assert "exitcode  : 2" in ended.stderr
    assert 'train/pretrain.py", line' not in ended.stderr  # no traceback but torchrun's own
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "/nowhere"], "no dataset at /nowhere"),
        (["--backbone", "resnet_51"], "--backbone resnet_51 is unknown; known are resnet18"),
        (["--backbone", "resnet_tinny"], "did you mean resnet_tiny?"),
        (["--global-batch", "64"], "48 samples, fewer than one --global-batch of 64"),
        (["--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--checkpoint-every", "soon"], "--checkpoint-every 'soon'"),
        (["--dim", "0"], "--dim 0"),
        (["--knn-data", "/nowhere"], "no dataset at /nowhere"),
    ],
)
def test_mistakes(
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    more: list[str],
    message: str,
) -> None:
    assert run_here(monkeypatch, flags(photo_dataset_path, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "run").exists()  # the mistake corrected, the same folder serves


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_ends_with_code_2_and_the_run_goes_on_when_there_is_room(
    undisturbed: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    arguments = flags(photo_dataset_path, tmp_path / "run", "--checkpoint-every", "3steps")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # bytes; a checkpoint has 5.5 MB
    try:
        assert run_here(monkeypatch, arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "writing the checkpoint" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert run_here(monkeypatch, [*arguments, "--resume"]) == 0
    assert losses(tmp_path / "run") == losses(undisturbed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_no_gpu(photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run_here(monkeypatch, flags(photo_dataset_path, tmp_path / "run", "--device", "cuda")) == 2
    assert "no GPU here" in capsys.readouterr().err


def test_unknown_flags_end_with_code_2(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert run_here(monkeypatch, ["--data", "x", "--run-dir", "y", "--epoch", "3"]) == 2
    assert "--epoch" in capsys.readouterr().err


def test_a_run_folder_is_not_overwritten_and_not_mixed_up(
    undisturbed: Path, photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file() and path.name != LOCK_FILE
    }
    assert run_here(monkeypatch, flags(photo_dataset_path, undisturbed)) == 2
    assert "already holds a run: add --resume" in capsys.readouterr().err
    other = flags(photo_dataset_path, undisturbed, "--resume", "--seed", "1", "--base-lr", "0.1")
    assert run_here(monkeypatch, other) == 2
    error = capsys.readouterr().err
    assert "--seed: the run has 0, given is 1" in error
    assert "--base-lr: the run has 0.05, given is 0.1" in error
    assert {
        path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file() and path.name != LOCK_FILE
    } == before


def test_results_are_not_put_among_images_or_into_a_bucket(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before = sorted(photo_dataset_path.iterdir())
    assert run_here(monkeypatch, flags(photo_dataset_path, photo_dataset_path)) == 2
    assert f"--run-dir {photo_dataset_path} is a dataset: name another folder" in capsys.readouterr().err
    assert sorted(photo_dataset_path.iterdir()) == before
    assert run_here(monkeypatch, flags(photo_dataset_path, Path("x"), "--run-dir", "s3://bucket/run")) == 2
    assert "s3://bucket/run: results are written to a folder" in " ".join(capsys.readouterr().err.split())


def test_resume_without_a_checkpoint_starts_and_says_so(
    undisturbed: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert run_here(monkeypatch, flags(photo_dataset_path, tmp_path / "run", "--resume", "--max-steps", "1")) == 0
    assert "starting at step 0" in capsys.readouterr().out
    assert losses(tmp_path / "run")[1] == losses(undisturbed)[1]


def test_accumulation_is_the_mean_over_its_passes(photo_dataset_path: Path, tmp_path: Path) -> None:
    run = prepare(parse_config(flags(photo_dataset_path, tmp_path / "run", "--accumulate", "2")), alone())
    run.model.train()
    twin = copy.deepcopy(run.model)
    torch.manual_seed(3)
    passes = [(torch.randn(6, 3, 16, 16), torch.randn(6, 3, 16, 16)) for _ in range(2)]
    result = step_module.train_step(run, iter([views(*pair) for pair in passes]))
    loss = sum(simsiam_loss(*twin(*pair)) for pair in passes) / 2
    loss.backward()
    assert result.loss.item() == pytest.approx(loss.item(), abs=1e-6)
    assert result.ids.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert result.wait_s == pytest.approx(0.5)
    lr = 0.05 * GLOBAL_BATCH / 256
    for ours, theirs in zip(run.model.parameters(), twin.parameters(), strict=True):
        expected = theirs - lr * (theirs.grad + 1e-4 * theirs)  # the first step of SGD with momentum
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_gradients_travel_once_a_step_also_when_compiled(tmp_path: Path) -> None:
    td.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(torch.nn.Linear(2, 2))
        for parallel in (ddp, torch.compile(ddp, backend="eager")):
            with step_module.no_sync(parallel, last=False):
                assert not ddp.require_backward_grad_sync
            with step_module.no_sync(parallel, last=True):
                assert ddp.require_backward_grad_sync
    finally:
        td.destroy_process_group()


def alone() -> DistContext:
    return DistContext.alone(torch.device("cpu"))


def views(x1: torch.Tensor, x2: torch.Tensor) -> ViewBatch:
    ids = np.arange(len(x1))
    return ViewBatch([x1, x2], ids, ids, epoch=0, step=0, wait_s=0.25)


def test_unlabelled_data_trains_without_knn(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    one_class = min(path for path in photo_folder.iterdir())
    make_dataset(str(one_class), tmp_path / "flat", ShardingOptions(workers=1), quiet=True)
    assert run_here(monkeypatch, flags(tmp_path / "flat", tmp_path / "run", "--epochs", "1")) == 0
    assert capsys.readouterr().out.count("the dataset has no labels") == 1
    assert knn_lines(tmp_path / "run") == {}
