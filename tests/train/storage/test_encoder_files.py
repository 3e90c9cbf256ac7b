"""Encoders come in from every kind of file with the same outputs; other files are refused with one message."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision import models

from model.backbone import BACKBONES, build_backbone
from model.methods.simsiam import SimSiam, SimSiamConfig
from pipeline.common.errors import UserError
from train.storage.checkpoints import save_checkpoint
from train.storage.encoder_files import initialise, open_encoder, read_weights
from train.storage.encoder_formats import recognise, to_detectron2, to_official

CONFIG = SimSiamConfig(backbone="resnet18", stem="cifar", dim=16, projector_hidden=24, predictor_hidden=8)
IMAGES = torch.linspace(-2, 2, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16)


def trained(config: SimSiamConfig) -> SimSiam:
    """Random weights, and BN statistics unlike a new model's, so that one that is not loaded shows."""
    torch.manual_seed(1)
    model = SimSiam(config)
    for name, value in model.state_dict().items():
        if name.endswith(("running_var", "bn2.weight")):
            nn.init.uniform_(value, 0.5, 1.5)
        elif name.endswith("running_mean"):
            nn.init.normal_(value)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> SimSiam:
    return trained(CONFIG)


@pytest.fixture(scope="module")
def checkpoint(model: SimSiam, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint, as train/engine/run.py writes it."""
    views = {"image_size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    config = {"model": {"backbone": "resnet18", "stem": "cifar"}, "views": views}
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "checkpoints", {"model": model.state_dict(), "config": config}, step=3, keep=1)
    return folder


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def features_of(path: Path, **options: Any) -> torch.Tensor:
    backbone, width, _ = open_encoder(str(path), **options)
    features = backbone(IMAGES)
    assert features.shape == (2, width)
    assert not features.requires_grad
    return features


def test_ours_by_file_and_by_run_folder(model: SimSiam, checkpoint: Path) -> None:
    (file,) = (checkpoint / "checkpoints").iterdir()
    for path in (checkpoint, checkpoint / "checkpoints", file):
        assert torch.equal(features_of(path), model.backbone(IMAGES))
    weights = read_weights(checkpoint)
    assert (weights.backbone, weights.stem, weights.parts.layout) == ("resnet18", "cifar", "siamstream")
    assert weights.pixels is not None
    assert weights.pixels.image_size == 32
    for part in ("backbone", "projector", "predictor"):
        assert set(getattr(weights.parts, part)) == set(getattr(model, part).state_dict())


def official_state(model: SimSiam) -> dict[str, torch.Tensor]:
    """As the official code writes it, with the bias before the last BN that it keeps but does not train."""
    state = to_official(recognise(model.state_dict()))  # type: ignore[arg-type]
    bias = torch.linspace(-1, 1, CONFIG.dim)
    state["module.encoder.fc.6.bias"] = bias
    state["module.encoder.fc.7.running_mean"] = state["module.encoder.fc.7.running_mean"] + bias
    return state


@pytest.mark.parametrize("legacy", [False, True])
def test_official_checkpoints(model: SimSiam, tmp_path: Path, legacy: bool) -> None:
    content = {"epoch": 100, "arch": "resnet18", "state_dict": official_state(model), "optimizer": {"state": {}}}
    path = tmp_path / "checkpoint_0099.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert torch.equal(features_of(path, stem="cifar"), model.backbone(IMAGES))
    other = SimSiam(CONFIG).eval()
    said = initialise(other, read_weights(path, stem="cifar"))
    assert said == f"backbone and projector and predictor from {path} (official names)"
    for ours, theirs in zip(other(IMAGES, -IMAGES), model(IMAGES, -IMAGES), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_torchvision_and_safetensors_with_their_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = models.resnet18().eval()
    state = {key: value for key, value in theirs.state_dict().items() if not key.endswith("num_batches_tracked")}
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    theirs.fc = nn.Identity()
    for path in (saved(tmp_path / "weights.pth", state), tmp_path / "weights.safetensors"):
        assert torch.equal(features_of(path), theirs(IMAGES))
        assert read_weights(path).stem == "imagenet"


@pytest.mark.parametrize("name", ["resnet34", "resnet50", "resnet_tiny"])
def test_the_architecture_is_found_out(tmp_path: Path, name: str) -> None:
    backbone, _ = build_backbone(name)
    wrapped = {f"module._orig_mod.{key}": value for key, value in backbone.state_dict().items()}
    weights = read_weights(saved(tmp_path / "w.pth", {"state_dict": wrapped}))
    assert (weights.backbone, weights.stem) == (name, BACKBONES[name].default_stem)


def test_heads_of_another_shape_start_at_random(checkpoint: Path) -> None:
    wider = SimSiam(SimSiamConfig(backbone="resnet18", stem="cifar", dim=32, projector_hidden=24, predictor_hidden=8))
    before = wider.projector[0].weight.clone()
    assert initialise(wider, read_weights(checkpoint)).endswith("projector and predictor start at random")
    assert torch.equal(wider.projector[0].weight, before)


def test_an_untrained_encoder_is_a_function_of_its_seed() -> None:
    first, again, other = (open_encoder("untrained:resnet_tiny", seed=seed)[0](IMAGES) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with pytest.raises(UserError, match="--checkpoint untrained:resnet51 is unknown; known are resnet18"):
        open_encoder("untrained:resnet51")


class Harmful:
    """Code that a file would like to run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def harmful() -> bytes:
    out = io.BytesIO()
    torch.save({"model": Harmful()}, out)
    return out.getvalue()


def test_metadata_that_are_no_json_are_told(tmp_path: Path) -> None:
    state = build_backbone("resnet_tiny")[0].state_dict()
    path = tmp_path / "w.safetensors"
    for text in ("v1", "[" * 100_000):
        safetensors.torch.save_file(state, path, {"siamstream": text})
        with pytest.raises(UserError, match=r"w.safetensors has metadata under 'siamstream' that are no JSON"):
            read_weights(path)


@pytest.mark.parametrize(
    "about",
    [
        {"config": {"model": "resnet_tiny"}},
        {"config": {"model": {"backbone": ["resnet_tiny"]}}, "arch": {"name": "resnet_tiny"}},
        {"config": {"model": {"backbone": "resnet_tiny"}, "views": 2}},
        {"config": {"model": {"backbone": "resnet_tiny"}, "views": {"image_size": "32", "mean": 0, "std": 1}}},
        {"config": {"model": {"backbone": "resnet_tiny"}, "views": {"image_size": 32, "mean": [0, 0], "std": "abc"}}},
    ],
)
def test_what_others_call_config_or_arch_is_not_taken_for_ours(tmp_path: Path, about: dict[str, Any]) -> None:
    state = dict(build_backbone("resnet_tiny")[0].state_dict())
    safetensors.torch.save_file(state, tmp_path / "w.safetensors", {"siamstream": json.dumps(about["config"])})
    for path in (saved(tmp_path / "w.pth", {"state_dict": state, **about}), tmp_path / "w.safetensors"):
        weights = read_weights(path)
        assert (weights.backbone, weights.pixels) == ("resnet_tiny", None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", r"^\S+a.pth is no checkpoint, or a truncated one"),
        ("a.pth", b"some text that is no checkpoint at all", r"^\S+a.pth is no checkpoint, or a truncated one"),
        ("a.pth", pickle.dumps({"model": 1}), r"^\S+a.pth is no checkpoint, or a truncated one"),
        ("a.pth", harmful(), r"more than tensors and plain values \([\w.]+\), and code in files is never run"),
        ("a.safetensors", b"\x10\x00\x00", "no safetensors file, or a truncated one"),
    ],
)
def test_files_that_are_no_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_weights(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_truncated_and_altered_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    (file,) = (checkpoint / "checkpoints").iterdir()
    data = file.read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[:-2000])
    with pytest.raises(UserError, match="truncated"):
        read_weights(tmp_path / "cut.pth")
    altered = bytearray(data)
    altered[len(data) // 2] ^= 1
    (tmp_path / file.name).write_bytes(altered)
    with pytest.raises(UserError, match="damaged"):
        read_weights(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*: No such file"):
        read_weights(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"cannot read the checkpoint"):
        read_weights(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="there is no checkpoint in"):
        read_weights(tmp_path)


def test_another_architecture_is_told_with_what_differs(checkpoint: Path, tmp_path: Path) -> None:
    expected = r"no resnet50 with the imagenet stem: missing are layer1.0.conv3.weight, .*; it was trained as resnet18"
    with pytest.raises(UserError, match=expected):
        read_weights(checkpoint, backbone="resnet50")
    with pytest.raises(UserError, match=r"conv1.weight is \[64, 3, 3, 3\] instead of \[64, 3, 7, 7\]"):
        read_weights(checkpoint, stem="imagenet")
    mobile = saved(tmp_path / "m.pth", {"features.0.0.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"holds no encoder: its entries \(features.0.0.weight\)"):
        read_weights(mobile)
    with pytest.raises(UserError, match=r"n.pth holds no tensors by name"):
        read_weights(saved(tmp_path / "n.pth", {"epoch": 3}))
    deeper = saved(tmp_path / "d.pth", {**models.resnet18().state_dict(), "layer2.2.conv1.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"nearest is resnet18, and there unknown are layer2.2.conv1.weight"):
        read_weights(deeper)
    with pytest.raises(UserError, match="--backbone resnet51 is unknown"):
        read_weights(checkpoint, backbone="resnet51")


def test_detectron2_names(model: SimSiam) -> None:
    """Written out by hand from the names of detectron2's ResNet (modeling/backbone/resnet.py)."""
    names = set(to_detectron2(models.resnet50().state_dict()))
    assert {
        "stem.conv1.weight",
        "stem.conv1.norm.running_var",
        "res2.0.shortcut.weight",
        "res2.0.shortcut.norm.bias",
        "res3.3.conv2.weight",
        "res5.2.conv3.norm.weight",
    } <= names
    assert not any("layer" in name or "bn" in name or "downsample" in name for name in names)
    assert to_detectron2({"bn1.num_batches_tracked": torch.zeros(())}) == {}
