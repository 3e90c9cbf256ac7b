"""The linear probe beside the method: it changes nothing of the run, is resumed with it, and alike on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.methods.registry import METHODS
from pipeline.backends.base import ViewBatch
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.method_ranks import SIZES
from tests.train.test_pretrain import alone, flags, losses, run_here, torchrun
from train.config.recipes import parse_config
from train.engine.build import prepare
from train.engine.loop import train_step
from train.evaluation.online_probe import OnlineProbe
from train.storage.checkpoints import load_checkpoint, newest_checkpoint
from train.storage.run_folder import read_lines

pytestmark = pytest.mark.usefixtures("one_thread")


def probe_on(backbone: nn.Module, labels: np.ndarray, width: int = 4, classes: int = 2) -> OnlineProbe:
    return OnlineProbe(backbone, width, classes, lambda ids: labels[ids], alone())


def probe_values(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["probe_top1"] for line in read_lines(run_dir / "metrics.jsonl") if "probe_top1" in line}


def state_of(run_dir: Path) -> dict[str, Any]:
    path = newest_checkpoint(run_dir / "checkpoints")
    assert path is not None
    return load_checkpoint(path)


def assert_same(ours: Any, theirs: Any) -> None:
    """Nested dictionaries of equal keys and tensors equal bit for bit."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert_same(value, theirs[key])
    elif isinstance(ours, Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.mark.parametrize("method", METHODS)
def test_it_changes_neither_losses_nor_weights_nor_random_numbers(
    photo_dataset_path: Path, tmp_path: Path, method: str
) -> None:
    sizes = [word for name, value in SIZES[method].items() for word in (f"--{name.replace('_', '-')}", str(value))]
    bn = ["--bn-images", "3"] if method == "moco-v2" else []
    words = ["--method", method, "--data", str(photo_dataset_path), "--run-dir", str(tmp_path / "run"), *sizes, *bn]
    small = ["--backbone", "resnet_tiny", "--image-size", "16", "--global-batch", "12", "--accumulate", "2"]
    results = []
    for more in ([], ["--probe"]):
        run = prepare(parse_config([*words, *small, "--device", "cpu", "--backend", "torchvision", *more]), alone())
        run.model.train()
        torch.manual_seed(1)
        for _ in range(3):
            views = [list(torch.randn(2, 6, 3, 16, 16)) for _ in range(2)]
            ids = [np.arange(6), np.arange(6, 12)]
            batches = [ViewBatch(v, i, i, epoch=0, step=0) for v, i in zip(views, ids, strict=True)]
            result = train_step(run, iter(batches))
            run.step += 1
        assert ("probe_top1" in result.metrics) == bool(more)
        results.append({"loss": result.loss, "model": run.model.state_dict(), "drawn": torch.rand(4)})
    assert_same(*results)


def test_it_is_resumed_bit_for_bit_and_taken_up_by_a_run_without(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    quick = ("--knn-every", "0")
    assert run_here(monkeypatch, flags(photo_dataset_path, tmp_path / "whole", *quick, "--probe")) == 0
    assert " probe " in capsys.readouterr().err  # the progress line
    whole = probe_values(tmp_path / "whole")
    assert len(whole) == 8
    assert all(0 <= value <= 100 for value in whole.values())
    for begun_with in (["--probe"], []):
        run_dir = tmp_path / ("with" if begun_with else "without")
        begun = flags(photo_dataset_path, run_dir, *quick, *begun_with, "--max-steps", "3")
        assert run_here(monkeypatch, begun) == 0
        assert run_here(monkeypatch, flags(photo_dataset_path, run_dir, *quick, "--resume", "--probe")) == 0
        assert losses(run_dir) == losses(tmp_path / "whole")
    assert probe_values(tmp_path / "with") == whole
    assert_same(state_of(tmp_path / "with")["probe"], state_of(tmp_path / "whole")["probe"])
    assert list(probe_values(tmp_path / "without")) == [4, 5, 6, 7, 8]


def test_two_ranks_train_the_probe_of_one(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--knn-every", "0", "--probe", "--max-steps", "4")
    assert run_here(monkeypatch, flags(photo_dataset_path, tmp_path / "one", *more)) == 0
    ended = torchrun(2, flags(photo_dataset_path, tmp_path / "two", *more))
    assert ended.returncode == 0, ended.stderr
    assert probe_values(tmp_path / "two") == pytest.approx(probe_values(tmp_path / "one"))
    one, two = (state_of(tmp_path / name)["probe"]["linear"] for name in ("one", "two"))
    for name, weight in one.items():
        assert weight.any()
        torch.testing.assert_close(two[name], weight, atol=2e-4, rtol=0)  # Adam's steps are of 1e-3


def test_without_labels_it_is_refused(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    one_class = min(path for path in photo_folder.iterdir())
    make_dataset(str(one_class), tmp_path / "flat", ShardingOptions(workers=1), quiet=True)
    assert run_here(monkeypatch, flags(tmp_path / "flat", tmp_path / "run", "--probe")) == 2
    assert "--probe" in (said := capsys.readouterr().err)
    assert "has no labels" in said
    assert "Traceback" not in said


def test_it_learns_what_a_line_can_tell_apart_and_leaves_out_what_has_no_label() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 4, generator=generator)
    truth = (features[:, 0] > features[:, 1]).numpy().astype(np.int32)
    labels = np.concatenate([truth, np.full(64, -1, np.int32)])
    backbone = nn.Identity().train()
    probe = probe_on(backbone, labels)
    unlabelled_too = probe_on(other := nn.Identity().train(), labels)
    for _ in range(400):
        backbone(features)
        probe.add(np.arange(64))
        top1 = probe.step(torch.ones(()))
        other(torch.cat([features, features.flip(0) * 9]))
        unlabelled_too.add(np.arange(128))
        same = unlabelled_too.step(torch.ones(()))
    assert top1 > 95
    assert same == top1
    assert_same(probe.state(), unlabelled_too.state())


def test_its_accuracy_counts_each_image_before_it_is_learnt() -> None:
    backbone = nn.Identity().train()
    probe = probe_on(backbone, np.array([0, 1, 1, -1]))
    backbone(torch.randn(3, 4))
    probe.add(np.array([3, 3, 3]))
    assert probe.step(torch.ones(())).isnan()  # no label yet
    backbone(torch.eye(4))
    probe.add(np.arange(4))
    assert probe.step(torch.ones(())).item() == pytest.approx(100 / 3)  # a classifier of zeros says class 0


@pytest.mark.parametrize("poison", [None, torch.nan, torch.inf])
def test_a_skipped_step_does_not_change_it(poison: float | None) -> None:
    backbone = nn.Identity().train()
    probe = probe_on(backbone, np.array([0, 1, 1]))

    def step(features: Tensor, applied: float) -> None:
        backbone(features)
        probe.add(np.arange(3))
        probe.step(torch.tensor(applied))

    features = torch.randn(3, 4)
    step(features, 1.0)
    before = {key: value.clone() for key, value in probe.state()["linear"].items()}
    counted = probe.state()["accuracy"].clone()
    step(features if poison is None else torch.full((3, 4), poison), 0.0)
    assert_same(probe.state()["linear"], before)
    assert torch.equal(probe.state()["accuracy"], counted)
    step(features, 1.0)
    assert not torch.equal(probe.state()["linear"]["weight"], before["weight"])


def test_the_features_are_of_the_first_view_and_of_training_passes_alone() -> None:
    backbone = nn.Identity()
    probe = probe_on(backbone, np.array([0, 1]))
    backbone.eval()(torch.full((2, 4), torch.nan))  # an evaluation
    backbone.train()
    first = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    backbone(torch.cat([first, torch.full((2, 4), torch.nan)]))  # two views in one pass
    backbone(torch.full((2, 4), torch.nan))
    probe.add(np.arange(2))
    probe.step(torch.ones(()))
    assert probe.state()["linear"]["weight"].isfinite().all()
    assert probe.state()["linear"]["weight"].any()
