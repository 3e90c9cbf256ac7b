"""Run folders as users and disks leave them: a message or a run that goes on, never a traceback or a hang."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train.storage.checkpoints
from pipeline.common import locks
from pipeline.common.errors import UserError
from tests.helpers.toy_runs import call
from tests.train.test_pretrain import ROOT, flags, losses, run_here
from train import pretrain
from train.distributed.stop_signals import EXIT_PREEMPTED
from train.engine import loop as loop_module
from train.storage.checkpoints import HASH_DIGITS, find_checkpoint, newest_checkpoint
from train.storage.run_folder import METRICS_FILE

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.faults]
SHORT = ["--knn-every", "0", "--checkpoint-every", "1steps", "--keep-checkpoints", "2", "--max-steps"]


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """An endless read ends the test."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(240)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def two_steps(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint of each."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, flags(photo_dataset_path, run_dir, *SHORT, "2")) == 0
    return run_dir


@pytest.fixture
def run_dir(two_steps: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def go_on(monkeypatch: pytest.MonkeyPatch, data: Path, run_dir: Path) -> int:
    return run_here(monkeypatch, flags(data, run_dir, *SHORT, "3", "--resume"))


KINDS: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "nothing in it": Path.touch,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_newest_checkpoint_that_is_none_is_set_aside(
    kind: str, run_dir: Path, photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    newest.unlink()
    KINDS[kind](newest)
    (run_dir / "checkpoints" / f"{newest.name}.damaged").touch()  # of an earlier time; it is kept
    assert go_on(monkeypatch, photo_dataset_path, run_dir) == 0
    assert f"warning: the checkpoint {newest}.damaged.1 is damaged; going back" in capfd.readouterr().out
    assert list(losses(run_dir)) == [1, 2, 3]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_newest_checkpoint_that_cannot_be_read_stays(
    code: int, run_dir: Path, photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def unreadable(path: Path) -> str:
        raise OSError(code, os.strerror(code), str(path))

    before = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(train.storage.checkpoints, "file_sha256", unreadable)
        assert go_on(monkeypatch, photo_dataset_path, run_dir) == 2
    assert "cannot read the checkpoint" in capfd.readouterr().err
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == before
    assert go_on(monkeypatch, photo_dataset_path, run_dir) == 0


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "empty": lambda state: {"format": 1},
    "a list": lambda state: [1],
    "another format": lambda state: {**state, "format": 2},
    "no identity": lambda state: {**state, "identity": None},
    "another's identity": lambda state: {**state, "identity": {**state["identity"], "seed": "9\x1b[31m"}},
    "deep identity": lambda state: {**state, "identity": {**state["identity"], "seed": deep(20)}},
    "no weights": lambda state: {**state, "model": {}},
    "weights of another shape": lambda state: {
        **state, "model": {name: torch.zeros(3) for name in state["model"]}
    },
    "weights that are no tensors": lambda state: {**state, "model": dict.fromkeys(state["model"], "x")},
    "weights in a list": lambda state: {**state, "model": list(state["model"].values())},
    "no optimizer": lambda state: {name: value for name, value in state.items() if name != "optimizer"},
    "an optimizer of another kind": lambda state: {**state, "optimizer": {0: {"momentum_buffer": "x"}}},
    "momentum of another shape": lambda state: {
        **state, "optimizer": {0: {"momentum_buffer": torch.zeros(2, 2, 2)}}
    },
    "a step before the first": lambda state: {**state, "step": -1},
    "a step that is no number": lambda state: {**state, "step": "1"},
    "a step that is nan": lambda state: {**state, "step": float("nan")},
    "an epoch that is a tensor": lambda state: {**state, "epoch": torch.zeros(3)},
    "an epoch after the last": lambda state: {**state, "epoch": 10**20},
    "targets in a list": lambda state: {**state, "targets": []},
    "batch size in words": lambda state: {**state, "bn_batch": "many"},
}  # fmt: skip


def deep(levels: int) -> Any:
    """A list that would be printed as 2 ** levels numbers."""
    value: Any = 0
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_that_fits_its_name_with_other_contents(
    wrong: str, run_dir: Path, photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    newest = newest_checkpoint(run_dir / "checkpoints")
    assert newest is not None
    buffer = io.BytesIO()
    torch.save(WRONG[wrong](torch.load(newest, weights_only=True)), buffer)
    newest.unlink()
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:HASH_DIGITS]
    forged = newest.with_name(f"step-000000002-{digest}.pt")
    forged.write_bytes(buffer.getvalue())
    assert go_on(monkeypatch, photo_dataset_path, run_dir) == 2
    told = capfd.readouterr().err.strip()
    assert told.startswith("error: ")
    assert forged.name in told
    assert len(told) < 5000
    assert "\x1b" not in told
    forged.unlink()
    assert go_on(monkeypatch, photo_dataset_path, run_dir) == 0
    assert list(losses(run_dir)) == [1, 2, 3]


PLACES = (
    "checkpoints",
    "tensorboard",
    METRICS_FILE,
    "config.json",
    "plan.json",
    "samples-rank0.jsonl",
    "summary.json",
    "run.lock",
    "backbone.safetensors",
)


@pytest.mark.parametrize("kind", [*KINDS, "a file"])
@pytest.mark.parametrize("place", PLACES)
def test_anything_in_the_place_of_a_runs_files(
    place: str, kind: str, run_dir: Path, photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    there = run_dir / place
    shutil.rmtree(there) if there.is_dir() else there.unlink(missing_ok=True)
    if kind == "a file":
        there.write_bytes(b"\xff\0of somebody else\n{")
    else:
        KINDS[kind](there)
    code = go_on(monkeypatch, photo_dataset_path, run_dir)
    told = capfd.readouterr().err
    assert code in (0, 2), told
    assert "Traceback" not in told
    if code == 2:
        assert str(run_dir) in told
        assert len(told.strip().splitlines()) <= 2, told  # a note may come first
    else:
        assert list(losses(run_dir))[-1] == 3


@pytest.mark.parametrize(
    "name", ["a file", "a pipe", "a link to nothing", "n" * 300, "sur\udcffrogate", "new\nline \x1b[31m"]
)
def test_odd_run_folders(
    name: str, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    if name == "a file":
        (tmp_path / name).touch()
    elif name in KINDS:
        KINDS[name](tmp_path / name)
    code = run_here(monkeypatch, flags(photo_dataset_path, tmp_path / name, *SHORT, "1"))
    told = capfd.readouterr()
    assert code == (0 if "line" in name else 2)
    assert "\x1b" not in told.out + told.err
    assert "Traceback" not in told.err


def test_a_nul_in_a_path_is_a_users_error(
    photo_dataset_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for data, run in (("a\0b", "run"), (photo_dataset_path, "a\0b")):
        assert call(monkeypatch, pretrain, "--data", data, "--run-dir", run) == 2
        assert "NUL" in capfd.readouterr().err


@pytest.mark.parametrize("what", ["deleted", "moved"])
def test_a_run_folder_that_goes_away_under_the_run(
    what: str, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    step = loop_module.train_step

    def strike(run: Any, batches: Any) -> Any:
        if run.step == 2:
            if what == "moved":
                (tmp_path / "run").rename(tmp_path / "elsewhere")
            else:
                shutil.rmtree(tmp_path / "run")
            time.sleep(0.5)
        return step(run, batches)

    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    monkeypatch.setattr(loop_module, "train_step", strike)
    assert run_here(monkeypatch, flags(photo_dataset_path, tmp_path / "run", "--knn-every", "0")) == 2
    told = capfd.readouterr().err
    assert "was deleted" in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_a_deleted_log_is_mentioned(
    run_dir: Path, photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    (run_dir / METRICS_FILE).unlink()
    assert go_on(monkeypatch, photo_dataset_path, run_dir) == 0
    assert f"warning: {run_dir / METRICS_FILE} is missing: losses and kNN accuracies up to step 2 are lost" in (
        capfd.readouterr().out
    )
    assert list(losses(run_dir)) == [3]


def test_find_checkpoint_among_odd_things(tmp_path: Path) -> None:
    for number, kind in enumerate(KINDS):
        KINDS[kind](tmp_path / f"step-{number:09d}-{'0' * HASH_DIGITS}.pt")
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        find_checkpoint(tmp_path)
    assert len(list(tmp_path.glob("*.damaged"))) == len(KINDS)


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_closed_streams(closed: str, photo_dataset_path: Path, tmp_path: Path) -> None:
    words = " ".join([sys.executable, "train/pretrain.py", *flags(photo_dataset_path, tmp_path / "run", *SHORT, "2")])
    done = subprocess.run(
        ["bash", "-c", f"{words} {closed}"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(losses(tmp_path / "run")) == [1, 2]
    assert find_checkpoint(tmp_path / "run" / "checkpoints").damaged == ()


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal: whether Python has come to the first lines of the script."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("after_s", [0.0, 0.7])
@pytest.mark.parametrize("command", [["train/pretrain.py"], ["-m", "siamstream", "pretrain"]])
def test_a_signal_during_the_imports(
    command: list[str], after_s: float, number: int, photo_dataset_path: Path, tmp_path: Path
) -> None:
    run = subprocess.Popen(
        [sys.executable, *command, *flags(photo_dataset_path, tmp_path / "run")],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    while not catches(run.pid, signal.SIGUSR1):  # the last handler; of SIGINT Python has one from the start
        time.sleep(0.01)
    time.sleep(after_s)
    run.send_signal(number)
    _, told = run.communicate(timeout=60)
    assert run.returncode == EXIT_PREEMPTED, told
    assert told.count("start again with --resume") == 1
    assert "Traceback" not in told
