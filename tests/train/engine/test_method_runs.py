"""Every method through the training script: resumed bit for bit, skipped steps change nothing, flags of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.methods.registry import METHODS
from pipeline.backends.base import ViewBatch
from pipeline.common.errors import UserError
from tests.helpers.method_ranks import SIZES
from tests.train.test_pretrain import CPU, alone, losses, run_here
from train.config.recipes import parse_config
from train.config.run_plan import make_plan
from train.engine.build import prepare
from train.engine.loop import train_step
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


@pytest.mark.parametrize("method", METHODS)
def test_resumed_in_mid_epoch_it_is_the_undisturbed_run(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    assert run_here(monkeypatch, flags(method, photo_dataset_path, tmp_path / "whole")) == 0
    whole = losses(tmp_path / "whole")
    assert len(set(whole.values())) == len(whole) == 8
    assert run_here(monkeypatch, flags(method, photo_dataset_path, tmp_path / "run", "--max-steps", "3")) == 0
    assert run_here(monkeypatch, flags(method, photo_dataset_path, tmp_path / "run", "--resume")) == 0
    assert losses(tmp_path / "run") == whole
    assert all("z_std" in line for line in read_lines(tmp_path / "run" / "metrics.jsonl"))


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


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_is_part_of_a_run_whose_loss_couples_the_pass(method: str) -> None:
    plain, two = (
        parse_config(["--method", method, *WHERE, *more]).identity("d") for more in ([], ["--accumulate", "2"])
    )
    assert (plain != two) == (method in ("simclr", "swav"))
