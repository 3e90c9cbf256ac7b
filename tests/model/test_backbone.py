"""Backbones: torchvision's ResNets with the paper's stems and initialisation, and any other library's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from model.backbone import BACKBONES, build_backbone, check_view_sides, find_backbone
from model.libraries import foreign_backbone
from pipeline.common.errors import UserError


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_pools_to_its_stated_width(name: str) -> None:
    backbone, features = build_backbone(name)
    with torch.no_grad():
        assert backbone.eval()(torch.randn(2, 3, 32, 32)).shape == (2, features)


@pytest.mark.parametrize(
    "name", [name for name in BACKBONES if hasattr(models, name) and BACKBONES[name].library == "torchvision"]
)
def test_state_dict_loads_into_torchvision_without_the_classifier(name: str) -> None:
    backbone, _ = build_backbone(name)
    twin = getattr(models, name)()
    missing = twin.load_state_dict(backbone.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    x = torch.randn(2, 3, 64, 64)
    twin.fc = nn.Identity()
    torch.testing.assert_close(backbone.eval()(x), twin.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "resnet_tiny"])
def test_last_bn_of_every_residual_block_starts_at_zero(name: str) -> None:
    backbone, _ = build_backbone(name)
    last = [
        m.bn3 if isinstance(m, Bottleneck) else m.bn2
        for m in backbone.modules()
        if isinstance(m, BasicBlock | Bottleneck)
    ]
    assert last
    assert all(not bn.weight.any() for bn in last)
    others = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d) and all(m is not bn for bn in last)]
    assert all((bn.weight == 1).all() for bn in others)


@pytest.mark.parametrize(
    ("stem", "kernel", "stride", "map_size"), [("imagenet", 7, 2, 8), ("cifar", 3, 1, 32), ("small", 3, 2, 16)]
)
@pytest.mark.parametrize("name", ["resnet18", "resnet_tiny"])
def test_stems(name: str, stem: str, kernel: int, stride: int, map_size: int) -> None:
    backbone, _ = build_backbone(name, stem)
    assert backbone.conv1.kernel_size == (kernel, kernel)
    assert backbone.conv1.stride == (stride, stride)
    x = backbone.maxpool(backbone.relu(backbone.bn1(backbone.conv1(torch.randn(1, 3, 32, 32)))))
    assert backbone.layer1(x).shape[-2:] == (map_size, map_size)


def test_tiny_is_small_and_has_its_own_stem() -> None:
    backbone, _ = build_backbone("resnet_tiny")
    assert backbone.conv1.kernel_size == (3, 3)
    assert sum(p.numel() for p in backbone.parameters()) < 1_000_000


def test_unknown_names_are_refused_with_the_list() -> None:
    with pytest.raises(
        UserError, match=r"--backbone resnet_50 is unknown.*resnet18.*resnet_tiny.*did you mean resnet50"
    ):
        build_backbone("resnet_50")
    with pytest.raises(UserError, match=r"--stem vit: .*imagenet, cifar, small"):
        build_backbone("resnet18", "vit")
    assert set(BACKBONES) >= {"resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "wide_resnet101_2"}


SMALL_MODELS = ["timm:convnext_atto", "timm:efficientnet_lite0", "timm:resnet10t", "torchvision:mobilenet_v3_small"]


@pytest.mark.parametrize("name", [*SMALL_MODELS, "torchvision:squeezenet1_0", "torchvision:shufflenet_v2_x0_5"])
def test_any_model_of_timm_and_torchvision_gives_pooled_features(name: str) -> None:
    if name == "torchvision:squeezenet1_0":
        with pytest.raises(UserError, match="no linear classifier to take off"):
            build_backbone(name)
        return
    backbone, features = build_backbone(name)
    with torch.no_grad():
        assert backbone.eval()(torch.randn(2, 3, 64, 64)).shape == (2, features)


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224"])
def test_transformers_take_small_views_too(name: str) -> None:
    check_view_sides(name, [224, 96, 32])
    backbone, features = build_backbone(name)
    with torch.no_grad():
        assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, features)


def test_keys_are_the_librarys() -> None:
    backbone, _ = build_backbone("timm:convnext_atto")
    theirs = timm.create_model("convnext_atto", pretrained=False)
    assert set(theirs.state_dict()) - set(backbone.state_dict()) == {"head.fc.weight", "head.fc.bias"}
    backbone, _ = build_backbone("torchvision:mobilenet_v3_small")
    theirs = models.mobilenet_v3_small()
    assert set(theirs.state_dict()) - set(backbone.state_dict()) == {"classifier.3.weight", "classifier.3.bias"}
    assert [BACKBONES[name].library for name in ("resnet18", "convnext_tiny")] == ["torchvision", "timm"]


MY_BACKBONES = """
from torch import nn
def good(): return nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
def only_small(): return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
def unpooled(): return nn.Conv2d(3, 7, 3)
def no_module(): return 3
value = 4
"""


@pytest.fixture
def my_backbones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_backbones.py").write_text(MY_BACKBONES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_backbones", None)
    foreign_backbone.cache_clear()


def test_a_function_of_ones_own(my_backbones: None) -> None:
    backbone, features = build_backbone("my_backbones:good")
    assert features == 7
    assert backbone(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    assert find_backbone("my_backbones:good").library == "own"
    assert build_backbone("my_backbones:only_small")[1] == 5
    check_view_sides("my_backbones:only_small", [32])
    with pytest.raises(UserError, match=r"my_backbones:only_small cannot take views of 64 px .*--image-size"):
        check_view_sides("my_backbones:only_small", [32, 64])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_backbones:unpooled", r"makes \(2, 7, 222, 222\) of 2 images, not pooled features \(2, d\): average"),
        ("my_backbones:no_module", "returns a int, not an nn.Module"),
        ("my_backbones:absent", "the module my_backbones has no absent"),
        ("my_backbone:good", "No module named 'my_backbone'; it takes timm:NAME, torchvision:NAME, or MODULE:FUNCTION"),
        ("timm:resnet_fifty", r"timm [\d.]+ has no such model"),
        ("timm:convnext_tinny", "near are convnext_tiny"),
        ("torchvision:resnet55", "torchvision has no such classifier; near are resnet50"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no such classifier"),
    ],
)
def test_backbones_that_are_none(my_backbones: None, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_backbone(name)


@pytest.mark.parametrize(
    ("name", "side", "message"),
    [
        (
            "vit_small_patch16_224",
            100,
            "vit_small_patch16_224 cannot take views of 100 px .*multiples of its patch",
        ),
        ("timm:vit_small_patch14_dinov2", 96, "cannot take views of 96 px .*patch size"),
        ("torchvision:vit_b_16", 96, "cannot take views of 96 px"),
        ("timm:mixer_s16_224", 32, "cannot take views of 32 px"),
    ],
)
def test_views_that_a_backbone_cannot_take(name: str, side: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_view_sides(name, [side])


def test_checking_draws_no_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_view_sides("vit_small_patch16_224", [32, 224])
    assert torch.equal(torch.rand(3), expected)


def test_a_stem_belongs_to_resnets_of_ones_own() -> None:
    with pytest.raises(UserError, match="--stem cifar: timm:resnet10t has default"):
        build_backbone("timm:resnet10t", "cifar")
