"""What a run leaves, and what is exported for transformers and onnxruntime, gives the encoder's own features there."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from model.backbone import Stem, build_backbone
from tests.helpers.photos import smooth_pixels
from tests.helpers.toy_runs import call
from tests.train.test_pretrain import flags, run_here
from tools import export_backbone
from tools.export_backbone import detectron2_layers
from train.evaluation.encoder import load_encoder
from train.storage.encoder_files import InputSpec, open_encoder
from train.storage.handover import hand_over

PIXELS = InputSpec(96, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def trained(name: str, stem: Stem = "default") -> nn.Module:
    torch.manual_seed(1)
    backbone, _ = build_backbone(name, stem)
    for key, value in backbone.state_dict().items():
        if key.endswith(("running_var", "weight")) and value.ndim == 1:
            nn.init.uniform_(value, 0.5, 1.5)
    return backbone.eval().requires_grad_(False)


def test_a_run_leaves_its_encoder(
    photo_dataset_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_here(monkeypatch, [*flags(photo_dataset_path, tmp_path / "run"), "--max-steps", "1"]) == 0
    assert f"siamstream.load_encoder('{tmp_path / 'run'}')" in capsys.readouterr().out
    images = torch.rand(2, 3, 32, 32)
    ours = open_encoder(str(tmp_path / "run"))[0](images)
    assert torch.equal(open_encoder(str(tmp_path / "run" / "backbone.safetensors"))[0](images), ours)
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        file.unlink()  # the encoder alone is enough
    assert torch.equal(load_encoder(tmp_path / "run").module(images), ours)


@pytest.mark.parametrize("name", ["resnet18", "timm:resnet14t"])
def test_timm_loads_the_folder_with_the_same_features_and_pixels(name: str, tmp_path: Path) -> None:
    backbone = trained(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    lines = hand_over(tmp_path, copy.deepcopy(backbone), name, build_stem(name), PIXELS)
    assert f"timm.create_model('local-dir:{tmp_path / 'timm'}', pretrained=True)" in lines
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    image = Image.fromarray(smooth_pixels(3, 150, 200))
    transform = create_transform(**resolve_model_data_config(theirs), is_training=False)
    _, preprocess = load_encoder(tmp_path, backbone=name if ":" in name else None)
    assert preprocess(image).shape == (3, 96, 96)
    difference = (transform(image) - preprocess(image)).abs() * torch.tensor(PIXELS.std)[:, None, None] * 255
    assert difference.max() <= 2  # PIL's resize rounds twice
    with torch.no_grad():
        torch.testing.assert_close(theirs(preprocess(image)[None]), backbone(preprocess(image)[None]))


def build_stem(name: str) -> Stem:
    return "default" if ":" in name else "imagenet"


def test_what_timm_does_not_have_is_left_to_our_own_loader(tmp_path: Path) -> None:
    lines = hand_over(tmp_path, trained("resnet18"), "resnet18", "imagenet", PIXELS)
    assert (tmp_path / "timm").is_dir()
    lines = hand_over(tmp_path, trained("resnet18", "cifar"), "resnet18", "cifar", PIXELS)
    assert "timm.create_model" not in lines
    assert not (tmp_path / "timm").exists()
    module, preprocess = load_encoder(tmp_path)
    images = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(module(images), trained("resnet18", "cifar")(images))
    assert preprocess.recipe.mean == PIXELS.mean


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    hand_over(folder, trained("resnet18"), "resnet18", "imagenet", PIXELS)
    return folder / "backbone.safetensors"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    backbone = trained(name)
    hand_over(tmp_path, backbone, name, "imagenet", PIXELS)
    out = tmp_path / "hf"
    command = (tmp_path / "backbone.safetensors", out, "--format", "transformers")
    assert call(monkeypatch, export_backbone, *command) == 0
    theirs = transformers.AutoModel.from_pretrained(out).eval()
    images = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        features = theirs(images).pooler_output.flatten(1)
    torch.testing.assert_close(features, backbone(images), rtol=1e-5, atol=1e-5)
    image = Image.fromarray(smooth_pixels(3, 150, 200))
    pixels = transformers.AutoImageProcessor.from_pretrained(out)(image, return_tensors="pt")["pixel_values"][0]
    difference = (pixels - load_encoder(tmp_path).preprocess(image)).abs() * torch.tensor(PIXELS.std)[:, None, None]
    assert pixels.shape == (3, 96, 96)
    assert difference.max() * 255 <= 2
    back = open_encoder(str(out))[0]  # and it is read again
    assert torch.equal(back(images), backbone(images))


def test_onnx(encoder_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "encoder.onnx"
    assert call(monkeypatch, export_backbone, encoder_file, out, "--format", "onnx") == 0
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    images = torch.rand(3, 3, 96, 96)
    (features,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(features, trained("resnet18")(images).numpy(), rtol=1e-4, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]


@pytest.mark.parametrize(
    ("out", "layout", "message"), [("x.pth", "onnx", "end in .onnx"), ("hf", "transformers", "has no resnet_tiny")]
)
def test_mistakes(
    out: str,
    layout: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hand_over(tmp_path, trained("resnet_tiny"), "resnet_tiny", "small", PIXELS)
    command = (tmp_path / "backbone.safetensors", tmp_path / out, "--format", layout)
    assert call(monkeypatch, export_backbone, *command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / out).exists()


@pytest.mark.parametrize(
    ("name", "depth", "groups", "width", "out"),
    [
        ("resnet18", 18, 1, 64, 64),
        ("resnet34", 34, 1, 64, 64),
        ("resnet50", 50, 1, 64, 256),
        ("resnet152", 152, 1, 64, 256),
        ("resnext50_32x4d", 50, 32, 4, 256),
        ("resnext101_32x8d", 101, 32, 8, 256),
        ("wide_resnet50_2", 50, 1, 128, 256),
    ],
)
def test_settings_of_detectron2_build_the_same_layers(name: str, depth: int, groups: int, width: int, out: int) -> None:
    assert detectron2_layers(name) == [
        f"MODEL.RESNETS.DEPTH {depth}",
        f"MODEL.RESNETS.NUM_GROUPS {groups}",
        f"MODEL.RESNETS.WIDTH_PER_GROUP {width}",
        f"MODEL.RESNETS.RES2_OUT_CHANNELS {out}",
        "MODEL.RESNETS.STRIDE_IN_1X1 False",
    ]
    second = build_backbone(name)[0].layer1[0].conv2.weight  # type: ignore[union-attr, index]
    assert second.shape[0] == groups * width
    assert second.shape[1] == width


def test_detectron2s_hint_is_for_fine_tuning_all_layers(
    encoder_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (encoder_file, tmp_path / "d2.pth", "--format", "detectron2")
    assert call(monkeypatch, export_backbone, *command) == 0
    out = capsys.readouterr().out
    for setting in ("MODEL.RESNETS.RES2_OUT_CHANNELS 64", "MODEL.BACKBONE.FREEZE_AT 0", "MODEL.RESNETS.NORM SyncBN"):
        assert setting in out
