"""ResNets in checkpoints of other projects: found by any prefix and any of the known ways to name layers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from model.backbone import Stem, build_backbone
from pipeline.common.errors import UserError
from tests.helpers.toy_runs import call
from tools import export_backbone
from train import knn, linear
from train.storage.encoder_files import open_encoder, read_weights
from train.storage.encoder_layouts import to_transformers, torchvision_names

IMAGES = torch.linspace(-2, 2, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)
State = dict[str, Any]


def resnet(name: str = "resnet18", stem: Stem = "default", seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    backbone, _ = build_backbone(name, stem)
    for key, value in backbone.state_dict().items():
        if key.endswith(("running_var", "weight")) and value.ndim == 1:
            nn.init.uniform_(value, 0.5, 1.5)
    return backbone.eval()


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def ddp(state: State) -> State:
    return {"arch": "resnet18", "state_dict": under("module.", state)}


def children(model: nn.Module) -> State:
    """As nn.Sequential(*resnet.children()) names them."""
    numbers = {name: str(number) for number, (name, _) in enumerate(model.named_children())}
    return {".".join([numbers[key.split(".")[0]], *key.split(".")[1:]]): v for key, v in model.state_dict().items()}


def other(state: State) -> State:
    """Another encoder's weights under the same names: those of a momentum copy, say."""
    return {key: value + 1 for key, value in state.items()}


QUEUE = {"queue": torch.ones(4, 9)}
FC = {"fc.weight": torch.ones(4, 512), "fc.bias": torch.ones(4)}
HEAD = {"0.weight": torch.randn(8, 512), "0.bias": torch.randn(8), "2.weight": torch.randn(4, 8)}

# Project -> its checkpoint of a ResNet, as its code saves it
CHECKPOINTS: dict[str, Callable[[nn.Module, State], Any]] = {
    "moco v2": lambda _, s: ddp(
        {**under("encoder_q.", {**s, **under("fc.", HEAD)}), **under("encoder_k.", other(s)), **QUEUE}
    ),
    "moco v1": lambda _, s: ddp(under("encoder_q.", {**s, **FC})),
    "moco v3": lambda _, s: ddp(
        {**under("base_encoder.", s), **under("momentum_encoder.", other(s)), **under("predictor.", HEAD)}
    ),
    "byol": lambda _, s: {**under("online_encoder.net.", s), **under("target_encoder.net.", other(s))},
    "byol, numbered": lambda m, s: {
        "online_network_state_dict": under("encoder.", children(m)),
        "target_network_state_dict": under("encoder.", other(children(m))),
        "optimizer_state_dict": {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
    },
    "dino": lambda _, s: {
        "student": under("module.backbone.", other(s)),
        "teacher": {**under("backbone.", s), "head.mlp.0.weight": torch.randn(4, 512)},
        "args": argparse.Namespace(arch="resnet18"),
        "epoch": 100,
    },
    "dino, flat": lambda _, s: {**under("teacher.backbone.", s), **under("student.backbone.", other(s))},
    "lightly": lambda m, s: {
        "state_dict": {**under("backbone.", children(m)), **under("projection_head.layers.", HEAD)},
        "pytorch-lightning_version": "2.0",
    },
    "solo-learn": lambda _, s: {
        "state_dict": {
            **under("backbone.", s),
            **under("momentum_backbone.", other(s)),
            **under("projector.", HEAD),
            "classifier.weight": torch.randn(10, 512),
        }
    },
    "transformers, model": lambda _, s: to_transformers(s),
    "transformers, classifier": lambda _, s: {
        **under("resnet.", to_transformers(s)),
        "classifier.1.weight": torch.randn(10, 512),
    },
    "vicreg": lambda _, s: {"epoch": 3, "model": under("module.backbone.", s)},
    "swav": lambda _, s: under(
        "module.", {**s, **under("projection_head.", HEAD), "prototypes.weight": torch.randn(30, 4)}
    ),
    "swav, several prototypes": lambda _, s: {
        **s,
        **under("projection_head.", HEAD),
        **under("prototypes.prototypes0.", {"weight": torch.randn(30, 4)}),
    },
    "vissl": lambda _, s: {
        "classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", s), "heads": {}}}}
    },
    "an unknown project": lambda _, s: {"net": {"trunk": under("visual.", s)}},
}


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("project", CHECKPOINTS)
def test_the_checkpoint_of_a_project_gives_its_encoder(project: str, stem: Stem, tmp_path: Path) -> None:
    model = resnet("resnet18", stem)
    torch.save(CHECKPOINTS[project](model, model.state_dict()), tmp_path / "other.pth")
    backbone, width, weights = open_encoder(str(tmp_path / "other.pth"), stem=stem)
    assert (weights.backbone, weights.stem, width) == ("resnet18", stem, 512)
    with torch.no_grad():
        torch.testing.assert_close(backbone(IMAGES), model(IMAGES))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_names_of_transformers_come_back(name: str) -> None:
    state = resnet(name).state_dict()
    there = to_transformers(state)
    assert torchvision_names(there).keys() == state.keys()  # type: ignore[union-attr]


def test_the_projector_of_moco_is_one_and_a_classifier_is_none(tmp_path: Path) -> None:
    model = resnet()
    for project, head in (("moco v2", set(HEAD)), ("moco v1", set())):
        torch.save(CHECKPOINTS[project](model, model.state_dict()), tmp_path / "moco.pth")
        assert set(read_weights(tmp_path / "moco.pth").parts.projector) == head


def test_two_encoders_of_equal_standing_are_refused(tmp_path: Path) -> None:
    state = resnet().state_dict()
    torch.save({**under("left.", state), **under("right.", state)}, tmp_path / "two.pth")
    with pytest.raises(UserError, match=r"holds 2 encoders, below left\., right\."):
        read_weights(tmp_path / "two.pth")


def test_a_refusal_lists_what_was_found(tmp_path: Path) -> None:
    nets = {f"{net}.block.{i}.weight": torch.zeros(1) for net in ("generator", "critic") for i in range(3)}
    torch.save(nets, tmp_path / "gan.pth")
    with pytest.raises(UserError, match=r"generator\.block\. \(3 tensors\), critic\.block\. \(3 tensors\)"):
        read_weights(tmp_path / "gan.pth")


@pytest.mark.parametrize("layout", ["torchvision", "timm", "official", "safetensors"])
@pytest.mark.parametrize("stem", ["small", "cifar"])
def test_our_exports_come_back_with_their_first_layers(
    layout: str, stem: Stem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = resnet("resnet18", stem)
    views = {"image_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    config = {"model": {"backbone": "resnet18", "stem": stem}, "views": views}
    torch.save({"model": under("backbone.", model.state_dict()), "config": config}, tmp_path / "ours.pt")
    out = tmp_path / ("out.safetensors" if layout == "safetensors" else "out.pth")
    assert call(monkeypatch, export_backbone, tmp_path / "ours.pt", out, "--format", layout) == 0
    backbone, _, weights = open_encoder(str(out))
    assert (weights.stem, weights.stem_is_guess) == (stem, False)
    assert weights.pixels is not None
    assert weights.pixels.image_size == 32
    with torch.no_grad():
        torch.testing.assert_close(backbone(IMAGES), model(IMAGES))


def test_a_stem_that_no_file_names_is_said_to_be_a_guess(tmp_path: Path) -> None:
    state = resnet("resnet18", "small").state_dict()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"arch": "resnet18", "state_dict": under("module.encoder.", state)}, tmp_path / "arch.pth")
    for name in ("plain.pth", "arch.pth"):
        weights = read_weights(tmp_path / name)
        assert (weights.stem, weights.stem_is_guess) == ("cifar", True)
        assert "the stem is a guess" in weights.describe()
        assert "the stem is a guess" not in read_weights(tmp_path / name, stem="small").describe()
    torch.save(resnet().state_dict(), tmp_path / "imagenet.pth")
    assert not read_weights(tmp_path / "imagenet.pth").stem_is_guess


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["layer4.1.conv2.weight", "bn1.running_var"])
def test_a_broken_encoder_is_refused_everywhere(
    key: str,
    value: float,
    tmp_path: Path,
    photo_dataset_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = resnet().state_dict()
    state[key].view(-1)[0] = value
    torch.save(state, tmp_path / "broken.pth")
    data = ("--data", photo_dataset_path, "--val-data", photo_dataset_path, "--device", "cpu")
    assert call(monkeypatch, knn, *data, "--checkpoint", tmp_path / "broken.pth") == 2
    assert f"nan or inf in {key}" in capsys.readouterr().err
    assert call(monkeypatch, linear, *data, "--checkpoint", tmp_path / "broken.pth") == 2
    assert call(monkeypatch, export_backbone, tmp_path / "broken.pth", tmp_path / "out.pth") == 2
    assert not (tmp_path / "out.pth").exists()


def test_features_that_are_not_finite_are_refused(
    tmp_path: Path, photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = resnet().state_dict()
    for key in state:
        if key.endswith(("bn1.weight", "bn2.weight")):
            state[key].fill_(1e30)  # finite weights, features beyond float32
    torch.save(state, tmp_path / "huge.pth")
    data = ("--data", photo_dataset_path, "--val-data", photo_dataset_path, "--device", "cpu", "--image-size", "32")
    for command in (knn, linear):
        more = ("--global-batch", "16", "--epochs", "1") if command is linear else ()
        assert call(monkeypatch, command, *data, "--checkpoint", tmp_path / "huge.pth", *more) == 2
        assert "features of 48 of 48 images are nan or inf" in capsys.readouterr().err
