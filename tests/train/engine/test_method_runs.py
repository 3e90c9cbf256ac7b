"""Every method through the training script: resumed bit for bit, skipped steps change nothing, flags of its own."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from model.methods.registry import METHODS
from pipeline.backends.base import ViewBatch
from pipeline.common.errors import UserError
from tests.helpers.method_ranks import SIZES
from tests.train.test_pretrain import CPU, alone, losses, run_apart, run_here
from train.config.recipes import parse_config
from train.config.run_plan import make_plan
from train.engine.build import prepare
from train.engine.loop import train_step
from train.storage.checkpoints import CHECKPOINTS, load_checkpoint, newest_checkpoint
from train.storage.run_folder import read_lines

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = CPU[CPU.index("--device") :]


def flags(method: str, data: Path, run_dir: Path, *more: str) -> list[str]:
    """8 steps of 12 images, two in a pass of 6; MoCo's queue of 96 is full after 4 steps, SwAV's of 48 too."""
    sizes = [word for name, value in SIZES[method].items() for word in (f"--{name.replace('_', '-')}", str(value))]
    places = ["--data", str(data), "--run-dir", str(run_dir), "--epochs", "2", "--global-batch", "12"]
    small = ["--backbone", "resnet_tiny", "--image-size", "16", "--knn-every", "0", "--record-samples"]
    short = ["--queue-from-epoch", "0"] if method == "swav" else ["--bn-images", "3"] if method == "moco-v2" else []
    return ["--method", method, *places, *small, *OWN, *sizes, *short, "--accumulate", "2", *more]


KILLED = """
import train.openmp
import os, signal, sys, time
from train import pretrain
from train.monitoring.reporter import Reporter

write = Reporter.step

def write_then_die(self, step, result):
    write(self, step, result)
    if step == 7:  # in the middle of the second epoch, and after the checkpoint of step 6 is on disk
        while not list(self._config.run_dir.glob("checkpoints/step-000000006-*.pt")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

Reporter.step = write_then_die
for words in eval(sys.argv[1]):  # a process each, which has everything imported
    child = os.fork()
    if not child:
        sys.argv[1:] = words
        pretrain.main()
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
"""


@pytest.fixture(scope="module")
def killed(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each method that was killed at step 7."""
    folder = tmp_path_factory.mktemp("killed")
    every = ("--checkpoint-every", "3steps")
    runs = [flags(method, photo_dataset_path, folder / method, *every) for method in METHODS]
    done = run_apart([sys.executable, "-c", KILLED, repr(runs)])
    assert done.returncode == 0, done.stderr
    return folder


def whole_state(run_dir: Path) -> dict[str, Any]:
    """All of the newest checkpoint that decides how a run goes on."""
    path = newest_checkpoint(run_dir / CHECKPOINTS)
    assert path is not None
    state = load_checkpoint(path)
    return {name: state[name] for name in ("epoch", "step", "model", "optimizer")}


def same(ours: Any, theirs: Any) -> bool:
    """Nested dictionaries with equal keys, and tensors equal bit for bit."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in ours.items())
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("method", METHODS)
def test_stopped_or_killed_in_mid_epoch_and_resumed_it_is_the_undisturbed_run(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, killed: Path
) -> None:
    """Stopped after step 3, with MoCo's queue three quarters full and prototypes frozen; killed after step 7, from the
    checkpoint of step 6, with SwAV's queue in use."""
    assert run_here(monkeypatch, flags(method, photo_dataset_path, tmp_path / "whole")) == 0
    whole = losses(tmp_path / "whole")
    assert len(set(whole.values())) == len(whole) == 8
    assert run_here(monkeypatch, flags(method, photo_dataset_path, tmp_path / "run", "--max-steps", "3")) == 0
    for run_dir, known in ((tmp_path / "run", 3), (killed / method, 7)):
        assert max(losses(run_dir)) == known
        assert run_here(monkeypatch, flags(method, photo_dataset_path, run_dir, "--resume")) == 0
        assert losses(run_dir) == whole
        assert same(whole_state(run_dir), whole_state(tmp_path / "whole"))


MONITORED = {
    "simsiam": set(),
    "simclr": {"stuck_loss"},
    "moco-v2": {"queue_age", "stuck_loss"},
    "byol": {"teacher_momentum"},
    "swav": {"queue_age", "prototype_entropy", "stuck_loss"},
    "dino": {"teacher_momentum", "teacher_temperature", "prototype_entropy", "stuck_loss"},
}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_is_watched_by_is_in_metrics_and_tensorboard(killed: Path, method: str) -> None:
    lines = [line for line in read_lines(killed / method / "metrics.jsonl") if "loss" in line]
    every = set().union(*MONITORED.values())
    for line in lines:
        assert every & set(line) == MONITORED[method]
        assert line["z_std"] > 0
    board = EventAccumulator(str(killed / method / "tensorboard"))
    board.Reload()
    assert {*MONITORED[method], "loss", "z_std"} <= set(board.Tags()["scalars"])
    for name in MONITORED[method]:
        written = {event.step: event.value for event in board.Scalars(name)}
        for line in lines:
            if line["step"] in written:  # a killed session leaves some unwritten
                assert written[line["step"]] == pytest.approx(line[name], rel=1e-6)
    first = lines[0]
    if method == "simclr":
        assert first["stuck_loss"] == pytest.approx(math.log(2 * 6 - 1))
    if method == "moco-v2":
        assert first["stuck_loss"] == pytest.approx(2 * math.log(97))
        assert [line["queue_age"] for line in lines][:6] == [0, 1, 2, 3, 4, 4]
    if method in ("swav", "dino"):
        assert first["stuck_loss"] == pytest.approx(math.log(10))
        assert 0 < first["prototype_entropy"] <= math.log(10) + 1e-6
    if "teacher_momentum" in MONITORED[method]:
        momenta = [line["teacher_momentum"] for line in lines]
        assert momenta == sorted(momenta)
        assert momenta[0] == pytest.approx(0.9)


@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_step_changes_nothing_at_all(photo_dataset_path: Path, tmp_path: Path, method: str) -> None:
    """Neither teacher, queue and centre nor the counters of batch norm."""
    run = prepare(parse_config(flags(method, photo_dataset_path, tmp_path / "run")), alone())
    run.model.train()

    def batch(value: float) -> ViewBatch:
        views = list(torch.randn(2, 6, 3, 16, 16))
        views[0][0, 0, 0, 0] = value
        return ViewBatch(views, np.arange(6), np.arange(6), epoch=0, step=0, wait_s=0.0)

    torch.manual_seed(0)
    train_step(run, iter([batch(0.0), batch(0.0)]))
    run.step += 1
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    train_step(run, iter([batch(0.0), batch(torch.nan)]))
    changed = [name for name, value in run.model.state_dict().items() if not torch.equal(before[name], value)]
    assert changed == []
    run.step += 1
    train_step(run, iter([batch(0.0), batch(0.0)]))
    assert any(not torch.equal(before[name], value) for name, value in run.model.state_dict().items())


WHERE = ["--data", "x", "--run-dir", "y"]


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_flags_of_the_method_alone(method: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        parse_config(["--method", method, "--help"])
    shown = capsys.readouterr().out
    owners = {
        "--pairs": "simsiam",
        "--bn-images": "moco-v2",
        "--centre-momentum": "dino",
        "--sinkhorn-iterations": "swav",
    }
    for flag, owner in owners.items():
        assert (flag in shown) == (method == owner)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "simsam"], "--method simsam is unknown; known are simsiam.*did you mean simsiam"),
        (["--queue", "96"], "--queue is a flag of --method moco-v2 and swav, not of simsiam"),
        (["--method=byol", "--no-symmetric"], "--symmetric is a flag of --method .*, not of byol"),
        (
            ["--recipe", "imagenet-multicrop-200ep", "--method", "byol"],
            "multicrop-200ep: --method byol has imagenet-100ep",
        ),
        (["--method", "moco-v2", "--sync-bn"], "--sync-bn with --method moco-v2"),
        (["--method", "moco-v2", "--queue", "100"], "--queue 100 is no multiple"),
        (["--method", "moco-v2", "--bn-images", "7"], "--bn-images 7 does not divide"),
        (["--method", "swav", "--prototypes", "2000000000"], "--prototypes 2000000000 takes at least"),
    ],
)
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(parse_config([*WHERE, *words]), 10_000, world_size=2, memory_bytes=1 << 30)


SCRIPTS_MISTAKES: list[tuple[str, list[str], str]] = [
    ("moco", [], "--method moco is unknown; known are simsiam"),
    (
        "simclr",
        ["--teacher-momentum", "0.9"],
        "--teacher-momentum is a flag of --method byol, dino and moco-v2, not of simclr",
    ),
    ("moco-v2", ["--queue", "100"], "--queue 100 is no multiple of the 24 keys of a step"),
    ("swav", ["--queue", "100"], "--queue 100 is no multiple of --global-batch 12"),
    ("moco-v2", ["--bn-images", "4"], "--bn-images 4 does not divide the 6 images of a pass"),
    ("moco-v2", ["--bn-images", "6"], "--bn-images 6 makes one group of all 6 images of a pass"),
    ("moco-v2", ["--sync-bn"], "--sync-bn with --method moco-v2"),
    ("swav", ["--prototypes", "99999999999"], "--prototypes 99999999999 takes at least"),
    ("dino", ["--prototypes", "99999999999"], "--prototypes 99999999999 takes at least"),
    ("byol", ["--backbone", "tests.train.engine.test_method_runs:unpooled"], "not pooled features (2, d)"),
    ("dino", ["--backbone", "vit_small_patch16_224", "--image-size", "100"], "cannot take views of 100 px"),
    ("simclr", ["--views", "3"], "--method simclr takes exactly 2 views"),
]


def unpooled() -> nn.Module:
    return nn.Conv2d(3, 7, 3)


@pytest.mark.parametrize(("method", "words", "message"), SCRIPTS_MISTAKES)
def test_mistakes_end_the_script_with_code_2_and_one_message(
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    method: str,
    words: list[str],
    message: str,
) -> None:
    own = method if method in METHODS else "simsiam"
    arguments = flags(own, photo_dataset_path, tmp_path / "run", *words, "--method", method)
    assert run_here(monkeypatch, arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("error: ") == 1
    assert message in " ".join(said.split())
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_is_part_of_a_run_whose_loss_couples_the_pass(method: str) -> None:
    plain, two = (
        parse_config(["--method", method, *WHERE, *more]).identity("d") for more in ([], ["--accumulate", "2"])
    )
    assert (plain != two) == (method in ("simclr", "swav"))
