"""A backbone that is no ResNet: one entry in BACKBONES, and it trains, resumes, is read again and leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from model.backbone import BACKBONES, Backbone
from pipeline.common.errors import UserError
from tests.helpers.toy_runs import call
from tools import export_backbone
from train import pretrain
from train.storage.encoder_files import open_encoder, read_weights
from train.storage.run_folder import read_lines

IMAGES = torch.linspace(-2, 2, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)


def plain_network() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.fixture(autouse=True)
def entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "plain", Backbone(plain_network, 12, "default", ("default",)))


def train(monkeypatch: pytest.MonkeyPatch, data: Path, run_dir: Path, *more: str) -> int:
    fixed = ["--epochs", "2", "--global-batch", "12", "--image-size", "16", "--backbone", "plain", "--dim", "8"]
    backend = ["--device", "cpu", "--backend", "torchvision", "--threads", "1", "--log-every", "1"]
    return call(monkeypatch, pretrain, "--data", data, "--run-dir", run_dir, *fixed, *backend, *more)


def features(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return open_encoder(str(path))[0](IMAGES)


def test_it_trains_resumes_and_leaves(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, photo_dataset_path, tmp_path / "run", "--max-steps", "3") == 0
    assert train(monkeypatch, photo_dataset_path, tmp_path / "run", "--resume") == 0
    steps = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    expected = features(tmp_path / "run")

    assert train(monkeypatch, photo_dataset_path, tmp_path / "next", "--init", str(tmp_path / "run")) == 0
    capsys.readouterr()
    for name, layout in (("out.pth", "torchvision"), ("out.safetensors", "safetensors")):
        assert call(monkeypatch, export_backbone, tmp_path / "run", tmp_path / name, "--format", layout) == 0
        assert 'build_backbone("plain", "default")' in capsys.readouterr().out
    assert torch.equal(features(tmp_path / "out.safetensors"), expected)
    alone = plain_network().eval()
    alone.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True))
    with torch.no_grad():
        assert torch.equal(alone(IMAGES), expected)
    alone.load_state_dict(load_file(tmp_path / "out.safetensors"))
    for layout in ("detectron2", "official"):
        assert call(monkeypatch, export_backbone, tmp_path / "run", tmp_path / "x.pth", "--format", layout) == 2
        assert f"--format {layout} has names for ResNets only, and this is plain" in capsys.readouterr().err
        assert not (tmp_path / "x.pth").exists()


def test_first_layers_that_it_does_not_have(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(monkeypatch, photo_dataset_path, tmp_path / "run", "--stem", "cifar") == 2
    assert "error: --stem cifar: plain has default" in capsys.readouterr().err
    with pytest.raises(UserError, match="--stem small: plain has default"):
        open_encoder("untrained:plain", stem="small")
    assert train(monkeypatch, photo_dataset_path, tmp_path / "run", "--max-steps", "1") == 0
    with pytest.raises(UserError, match="--stem small: plain has default"):
        read_weights(tmp_path / "run", stem="small")


def test_weights_of_another_backbone_are_told_from_it(tmp_path: Path) -> None:
    torch.save({"backbone.0.weight": torch.zeros(12, 3, 5, 5)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"another architecture than resnet18, .*, plain"):
        read_weights(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_small_patch16_224", "timm:efficientnet_lite0"])
def test_timms_backbones_train_and_leave_as_timm_knows_them(
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    more = ["--backbone", name, "--image-size", "32", "--knn-every", "0"]
    assert train(monkeypatch, photo_dataset_path, tmp_path / "run", *more, "--max-steps", "1") == 0
    assert train(monkeypatch, photo_dataset_path, tmp_path / "run", *more, "--max-steps", "2", "--resume") == 0
    assert call(monkeypatch, export_backbone, tmp_path / "run", tmp_path / "x.pth") == 2
    assert f"--format torchvision: {name} has timm's layers: take --format timm" in capsys.readouterr().err
    out = tmp_path / "out.pth"
    assert call(monkeypatch, export_backbone, tmp_path / "run", out, "--format", "timm") == 0
    assert f'timm.create_model("{name.removeprefix("timm:")}", num_classes=0' in capsys.readouterr().out
    settings = {"dynamic_img_size": True} if "vit" in name else {}
    theirs = timm.create_model(name.removeprefix("timm:"), num_classes=0, checkpoint_path=str(out), **settings).eval()
    images = torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
    with torch.no_grad():
        expected = open_encoder(str(tmp_path / "run"))[0](images)
        torch.testing.assert_close(theirs(images), expected, atol=1e-5, rtol=1e-5)
    # And back again, with a classifier that timm's own files have.
    classifier = {"head.fc.weight": torch.zeros(10, 3)} if "convnext" in name else {"head.weight": torch.zeros(10, 3)}
    torch.save({**theirs.state_dict(), **classifier}, tmp_path / "timms.pth")
    read = read_weights(tmp_path / "timms.pth", name)
    assert (read.backbone, read.parts.layout) == (name, "timm")
    assert all(torch.equal(value, read.parts.backbone[key]) for key, value in theirs.state_dict().items())
    if ":" not in name:
        assert read_weights(tmp_path / "timms.pth").backbone == name  # found out


def test_code_of_the_users_own_is_run_only_where_the_user_names_it(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from tests.train.storage.test_other_backbones import plain_network as network"
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    more = ["--backbone", "mine:network", "--max-steps", "1"]
    assert train(monkeypatch, photo_dataset_path, tmp_path / "run", *more) == 0
    with pytest.raises(UserError, match="trained with a backbone of your own: add --backbone mine:network"):
        read_weights(tmp_path / "run")
    assert open_encoder(str(tmp_path / "run"), "mine:network")[1] == 12
