"""The backbones are torchvision's ResNets, with the stems and the initialisation that the paper asks for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from model.backbone import BACKBONES, build_backbone
from pipeline.common.errors import UserError


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_pools_to_its_stated_width(name: str) -> None:
    backbone, features = build_backbone(name)
    with torch.no_grad():
        assert backbone.eval()(torch.randn(2, 3, 32, 32)).shape == (2, features)


@pytest.mark.parametrize("name", [name for name in BACKBONES if hasattr(models, name)])
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
