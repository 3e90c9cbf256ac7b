"""What leaves gives the same features in the libraries that take it in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision import models
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from model.backbone import build_backbone
from model.methods.simsiam import SimSiam, SimSiamConfig
from tests.helpers.toy_runs import call
from tools import export_backbone
from train.storage.checkpoints import save_checkpoint
from train.storage.encoder_files import open_encoder

IMAGES = torch.linspace(-2, 2, 2 * 3 * 64 * 64).sin().reshape(2, 3, 64, 64)
DIM, HIDDEN = 64, 2048  # the official code's projector is as wide as its features


@pytest.fixture(scope="module")
def model() -> SimSiam:
    """ResNet-50 with BN statistics as after training."""
    torch.manual_seed(1)
    model = SimSiam(SimSiamConfig(dim=DIM, projector_hidden=HIDDEN, predictor_hidden=16))
    for name, value in model.state_dict().items():
        if name.endswith(("running_var", "bn3.weight")):
            nn.init.uniform_(value, 0.5, 1.0)
        elif name.endswith("running_mean"):
            nn.init.normal_(value, std=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def run_dir(model: SimSiam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    views = {"image_size": 64, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}
    config = {"model": {"backbone": "resnet50", "stem": "default"}, "views": views}
    folder = tmp_path_factory.mktemp("run")
    state = copy.deepcopy(model).to(memory_format=torch.channels_last).state_dict()  # type: ignore[call-overload]
    save_checkpoint(folder / "checkpoints", {"model": state, "config": config}, step=1, keep=1)
    return folder


def export(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return call(monkeypatch, export_backbone, *arguments)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@torch.no_grad()
def assert_same_features(theirs: nn.Module, ours: SimSiam) -> None:
    torch.testing.assert_close(theirs.eval()(IMAGES), ours.backbone(IMAGES), rtol=1e-6, atol=1e-6)


def without_classifier(**options: Any) -> nn.Module:
    backbone = models.resnet50(**options)
    backbone.fc = nn.Identity()
    return backbone


def test_torchvision(model: SimSiam, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert export(monkeypatch, run_dir, tmp_path / "out.pth") == 0
    backbone = without_classifier()
    backbone.load_state_dict(load(tmp_path / "out.pth"), strict=True)
    assert_same_features(backbone, model)


def test_timm(model: SimSiam, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert export(monkeypatch, run_dir, tmp_path / "out.pth", "--format", "timm") == 0
    backbone = timm.create_model("resnet50", num_classes=0)
    backbone.load_state_dict(load(tmp_path / "out.pth"), strict=True)
    assert_same_features(backbone, model)
    # The line that the command prints for timm's users.
    assert_same_features(timm.create_model("resnet50", num_classes=0, checkpoint_path=str(tmp_path / "out.pth")), model)


def test_safetensors_also_come_back(
    model: SimSiam, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.safetensors"
    assert export(monkeypatch, run_dir, out, "--format", "safetensors") == 0
    backbone = without_classifier()
    backbone.load_state_dict(load_file(out), strict=True)
    assert_same_features(backbone, model)
    backbone, _, weights = open_encoder(str(out))
    assert_same_features(backbone, model)
    assert weights.pixels is not None
    assert (weights.pixels.image_size, weights.pixels.mean) == (64, (0.5, 0.4, 0.3))


def test_detection_trains_a_step(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert export(monkeypatch, run_dir, tmp_path / "out.pth") == 0
    torch.manual_seed(0)
    detector = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2, min_size=64, max_size=64)
    detector.backbone.body.load_state_dict(load(tmp_path / "out.pth"), strict=True)
    detector.train()
    first = detector.backbone.body.conv1.weight
    before = first.detach().clone()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    losses = detector([torch.rand(3, 64, 64)], [{"boxes": boxes, "labels": torch.tensor([1])}])
    total = sum(losses.values())
    total.backward()
    optimizer.step()
    assert torch.isfinite(total)
    assert not torch.equal(first, before)


class PaperSimSiam(nn.Module):
    """Written from the paper's section 3, with the official code's names: fc is the projector."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = models.resnet50(num_classes=DIM, zero_init_residual=True)
        width = self.encoder.fc.in_features
        hidden = [
            layer
            for _ in range(2)
            for layer in (nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True))
        ]
        self.encoder.fc = nn.Sequential(*hidden, nn.Linear(width, DIM), nn.BatchNorm1d(DIM, affine=False))
        self.predictor = nn.Sequential(
            nn.Linear(DIM, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, DIM)
        )


def test_official(model: SimSiam, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert export(monkeypatch, run_dir, tmp_path / "out.pth", "--format", "official") == 0
    content = load(tmp_path / "out.pth")
    assert content["arch"] == "resnet50"
    theirs = nn.ModuleDict({"module": PaperSimSiam()})  # named as under DistributedDataParallel
    theirs.load_state_dict(content["state_dict"], strict=True)
    paper = theirs["module"].eval()
    with torch.no_grad():
        z = paper.encoder(IMAGES)
        expected = model(IMAGES, IMAGES)
        torch.testing.assert_close(z, expected.z1, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(paper.predictor(z), expected.p1, rtol=1e-5, atol=1e-5)


def test_detectron2(model: SimSiam, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert export(monkeypatch, run_dir, tmp_path / "out.pth", "--format", "detectron2") == 0
    content = load(tmp_path / "out.pth")
    assert content["matching_heuristics"] is True
    assert content["__author__"]
    backbone = model.backbone.state_dict()
    assert torch.equal(content["model"]["stem.conv1.weight"], backbone["conv1.weight"])
    assert torch.equal(content["model"]["res4.5.conv2.norm.bias"], backbone["layer3.5.bn2.bias"])
    assert torch.equal(
        content["model"]["res2.0.shortcut.norm.running_mean"], backbone["layer1.0.downsample.1.running_mean"]
    )
    assert len(content["model"]) == sum(not key.endswith("num_batches_tracked") for key in backbone)


def test_the_command_says_how_to_load_it(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(monkeypatch, run_dir, tmp_path / "out.pth", "--format", "detectron2") == 0
    out = capsys.readouterr().out
    assert "MODEL.PIXEL_MEAN [127.5, 102.0, 76.5]" in out
    assert "trained at 64 px" in out


@pytest.mark.parametrize(
    ("out", "layout", "message"),
    [
        ("out.bin", "torchvision", "let OUT end in .pth"),
        ("out.pkl", "detectron2", "let OUT end in .pth"),
        ("out.pth", "safetensors", "let OUT end in .safetensors"),
        ("taken.pth", "torchvision", "exists: add --overwrite"),
        ("a-file/out.pth", "torchvision", "cannot write"),
    ],
)
def test_mistakes(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
    layout: str,
    message: str,
) -> None:
    for name in ("taken.pth", "a-file"):
        (tmp_path / name).write_text("mine")
    assert export(monkeypatch, run_dir, tmp_path / out, "--format", layout) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "taken.pth").read_text() == "mine"


def test_what_exists_here_only_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone, _ = build_backbone("resnet_tiny")
    torch.save(backbone.state_dict(), tmp_path / "tiny.pth")
    assert export(monkeypatch, tmp_path / "tiny.pth", tmp_path / "out.pth", "--format", "timm") == 0
    out = capsys.readouterr().out
    assert 'build_backbone("resnet_tiny", "small")' in out
    assert "exists here only" in out
    assert "trained at unknown size" in out
