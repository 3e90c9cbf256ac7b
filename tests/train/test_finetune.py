"""train/finetune.py and tools/predict.py: a classifier that learns, goes on exactly, and predicts by name."""

from __future__ import annotations

import csv
import io
import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import train.openmp  # noqa: F401
from pipeline.common.errors import UserError
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.toy_runs import call
from tests.train.test_pretrain import torchrun
from tools import predict
from train import finetune
from train.evaluation.classifier import Classifier, load_classifier
from train.finetune import RECIPES, TuneConfig, layer_groups, mixed, parse_config
from train.storage.run_folder import read_lines

ENCODER = ("--checkpoint", "untrained:resnet_tiny", "--image-size", "16", "--device", "cpu", "--threads", "1")
SHORT = (*ENCODER, "--backend", "torchvision", "--epochs", "2", "--global-batch", "12", "--lr", "0.2", "--head-lr", "1")


def flags(data: Path, run_dir: Path, *more: str) -> list[str]:
    return ["--data", str(data), "--val-data", str(data), "--run-dir", str(run_dir), *SHORT, *more]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key != "time"} for line in read_lines(run_dir / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def whole(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finetune") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, finetune, *flags(photo_dataset_path, out)) == 0
    return out


def test_it_leaves_its_numbers(whole: Path) -> None:
    seen = lines(whole)
    assert [(line["epoch"], line["step"]) for line in seen] == [(1, 4), (2, 8)]
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["val_top1"] == seen[-1]["val_top1"]
    assert (summary["finished"], summary["train_samples"]) == (True, 48)


def test_it_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset("synthetic:240", tmp_path / "data", quiet=True, in_process=True)
    more = ("--image-size", "32", "--epochs", "6", "--global-batch", "24", "--lr", "1", "--head-lr", "2")
    assert call(monkeypatch, finetune, *flags(tmp_path / "data", tmp_path / "run", *more)) == 0
    assert lines(tmp_path / "run")[-1]["val_top1"] > 2 * 100 / 12  # twice chance; about 30 % was seen


def test_the_first_loss_is_ln_classes(photo_dataset_path: Path) -> None:
    model = Classifier(torch.nn.Flatten(), 12, 7, seed=0)
    loss = F.cross_entropy(model(torch.randn(5, 3, 2, 2)), torch.arange(5))
    assert float(loss) == pytest.approx(math.log(7))


@pytest.mark.parametrize("stop_after", [2, 4, 6])
def test_stopped_and_resumed_is_the_undisturbed_run(
    whole: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    step, done = finetune.train_step, []

    def stopped(run: Any, batch: Any) -> Any:
        loss = step(run, batch)
        done.append(loss)
        if len(done) == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "train_step", stopped)
        assert call(patch, finetune, *flags(photo_dataset_path, tmp_path / "run")) == 75
    assert call(monkeypatch, finetune, *flags(photo_dataset_path, tmp_path / "run", "--resume")) == 0
    assert lines(tmp_path / "run") == lines(whole)
    ours, theirs = (load_classifier(path).model.state_dict() for path in (tmp_path / "run", whole))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_two_ranks_learn_the_same(whole: Path, photo_dataset_path: Path, tmp_path: Path) -> None:
    ended = torchrun(2, flags(photo_dataset_path, tmp_path / "two"), script="train/finetune.py")
    assert ended.returncode == 0, ended.stderr
    for ours, theirs in zip(lines(tmp_path / "two"), lines(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-3)
        assert ours["val_top1"] == pytest.approx(theirs["val_top1"], abs=100 * 2 / 48)


def test_only_labelled_samples_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset("synthetic:60", tmp_path / "data", ShardingOptions(), quiet=True, in_process=True)
    arguments = flags(tmp_path / "data", tmp_path / "run", "--fraction", "0.4")
    assert call(monkeypatch, finetune, *arguments) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["train_samples"] == 24


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_defaults_that_flags_override(name: str) -> None:
    where = ["--data", "d", "--val-data", "v", "--run-dir", "r", "--checkpoint", "c", "--recipe", name]
    assert parse_config(where).tune == RECIPES[name]  # type: ignore[index]
    assert parse_config([*where, "--epochs", "3"]).tune == replace(RECIPES[name], epochs=3)  # type: ignore[index]


def test_rates_fall_by_cosine_or_by_steps() -> None:
    cosine, steps = TuneConfig(), TuneConfig(decay_epochs=(2, 3), decay_factor=0.1)
    assert cosine.rate(0, 40, 10) == 1
    assert cosine.rate(20, 40, 10) == pytest.approx(0.5)
    assert [steps.rate(step, 40, 10) for step in (0, 19, 20, 30)] == pytest.approx([1, 1, 0.1, 0.01])


def test_stages_further_down_have_smaller_rates() -> None:
    from model.backbone import build_backbone

    backbone, width = build_backbone("resnet_tiny")
    model = Classifier(backbone, width, 3, seed=0)
    groups = layer_groups(model, TuneConfig(lr=1.0, head_lr=7.0, layer_decay=0.5))
    assert [group["peak"] for group in groups] == [7, 1, 0.5, 0.25, 0.125, 0.0625, 0.03125]
    assert groups[1]["params"][0] is next(backbone.layer4.parameters())
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_mixup_is_a_pure_function() -> None:
    x = torch.randn(4, 3, 2, 2)
    assert mixed(x, 0.0, 0, 5)[1] == 1.0
    (one, share), (again, _), (other, _) = mixed(x, 0.4, 0, 5), mixed(x, 0.4, 0, 5), mixed(x, 0.4, 0, 6)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    torch.testing.assert_close(one[0], share * x[0] + (1 - share) * x[3])


def test_timm_loads_the_classifier(photo_dataset_path: Path, tmp_path: Path) -> None:
    import timm

    from model.backbone import build_backbone
    from train.evaluation.classifier import save_classifier
    from train.storage.encoder_files import InputSpec

    backbone, width = build_backbone("resnet18")
    model = Classifier(backbone, width, 5, seed=0).eval()
    torch.nn.init.normal_(model.head.weight)
    assert save_classifier(tmp_path / "c", model, "resnet18", "imagenet", InputSpec(64), tuple("abcde"))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'c'}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x))
    assert tuple(theirs.pretrained_cfg["input_size"]) == (3, 64, 64)
    assert theirs.num_classes == 5
    ours = load_classifier(tmp_path / "c")
    assert (ours.classes, ours.pixels) == (tuple("abcde"), InputSpec(64))
    with torch.no_grad():
        torch.testing.assert_close(ours.model(x), model(x))


def test_predictions_are_those_of_the_model(
    whole: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert call(monkeypatch, predict, str(whole), str(photo_folder), "--top", "2", "--device", "cpu") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 48
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows)
    right = np.mean([Path(row["file"]).parent.name == row["class1"] for row in rows])
    assert 100 * right == pytest.approx(json.loads((whole / "summary.json").read_text())["val_top1"], abs=2.1)
    assert all(float(row["probability1"]) >= float(row["probability2"]) for row in rows)


def test_files_that_are_no_images(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no.jpg").write_text("no image")
    Image.new("RGB", (20, 20)).save(tmp_path / "yes.png")
    capsys.readouterr()
    assert call(monkeypatch, predict, str(whole), str(tmp_path / "no.jpg"), str(tmp_path / "yes.png")) == 1
    shown = capsys.readouterr()
    assert "no.jpg: " in shown.err
    assert len(shown.out.splitlines()) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--global-batch", "49"), "48 labelled samples"),
        (("--label-smoothing", "1"), "--label-smoothing 1"),
        (("--mixup", "-1"), "--mixup -1"),
        (("--fraction", "2"), "--fraction 2"),
        (("--checkpoint", "untrained:nothing"), "unknown"),
        (("--checkpoint-every", "never"), "--checkpoint-every"),
    ],
)
def test_mistakes(
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    assert call(monkeypatch, finetune, *flags(photo_dataset_path, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_folder_with_a_run_is_left_alone(
    whole: Path, photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, finetune, *flags(photo_dataset_path, whole)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert call(monkeypatch, finetune, *flags(photo_dataset_path, whole, "--resume", "--mixup", "0.2")) == 2
    assert "mixup: checkpoint 0.0, now 0.2" in capsys.readouterr().err


def test_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no classifier"):
        load_classifier(tmp_path)
