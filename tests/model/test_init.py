"""pretrain.py --init starts from weights of any file, and not again when it resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.common.errors import UserError
from tests.helpers.toy_runs import TINY
from train.config.recipes import parse_config
from train.config.run_config import PretrainConfig
from train.distributed.process_group import DistContext
from train.engine.build import prepare, start_weights
from train.engine.run import Run, finish_checkpoint

ALONE = DistContext.alone(torch.device("cpu"))


@pytest.fixture
def config(photo_dataset_path: Path, tmp_path: Path) -> PretrainConfig:
    where = ["--data", str(photo_dataset_path), "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    return parse_config([*where, *TINY, "--global-batch", "12", "--backend", "torchvision"])


def save_first(run: Run) -> None:
    """Write the checkpoint of a run that took no step, into the folder that claiming a run makes."""
    run.config.run_dir.mkdir()
    finish_checkpoint(run)


def test_a_run_starts_from_another_runs_weights(config: PretrainConfig, tmp_path: Path) -> None:
    first = prepare(replace(config, seed=5), ALONE)
    save_first(first)
    second_config = replace(config, run_dir=tmp_path / "second", init=tmp_path / "run")
    second = prepare(second_config, ALONE)
    for name, value in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name
    assert second_config.identity("d") != config.identity("d")
    # What a resumed run takes is its own checkpoint, wherever the first weights are by now.
    save_first(second)
    gone = replace(second_config, init=tmp_path / "gone", resume=True)
    assert start_weights(gone, second.model).described == "of the checkpoint"
    with pytest.raises(UserError, match="cannot read the checkpoint"):
        start_weights(replace(gone, resume=False), second.model)


def test_weights_of_another_architecture_are_refused(config: PretrainConfig, tmp_path: Path) -> None:
    save_first(prepare(config, ALONE))
    other = replace(config, init=tmp_path / "run", model=replace(config.model, backbone="resnet18"))
    with pytest.raises(UserError, match="is no resnet18 with the imagenet stem"):
        prepare(other, ALONE)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("method", "name"), [("simclr", "timm:resnet10t"), ("dino", "timm:test_vit")])
def test_a_run_starts_from_a_file_of_timms(
    photo_dataset_path: Path, tmp_path: Path, method: str, name: str, suffix: str
) -> None:
    """As timm's users save a model, with its classifier; a teacher starts as the student."""
    torch.manual_seed(9)
    theirs = timm.create_model(name.removeprefix("timm:"), num_classes=10)
    file = tmp_path / f"theirs{suffix}"
    save_file(theirs.state_dict(), file) if suffix == ".safetensors" else torch.save(theirs.state_dict(), file)
    side = str(2 * 16 if method == "simclr" else 160)
    words = ["--data", str(photo_dataset_path), "--run-dir", str(tmp_path / "run"), "--device", "cpu"]
    words += ["--method", method, "--backbone", name, "--image-size", side, "--init", str(file)]
    run = prepare(parse_config([*words, "--global-batch", "12", "--backend", "torchvision"]), ALONE)
    taken = run.model.backbone.state_dict()
    assert len(taken) >= len(theirs.state_dict()) - 2  # without the classifier
    for key, value in taken.items():
        assert torch.equal(value, theirs.state_dict()[key]), key
    assert "timm" in run.origins.weights
    if method == "dino":
        for ours, teachers in zip(taken.values(), run.model.teacher.module[0].state_dict().values(), strict=True):
            assert torch.equal(ours, teachers)
