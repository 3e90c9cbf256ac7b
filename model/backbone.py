"""Backbones by name: ``build_backbone`` makes one, ``BACKBONES`` lists those with a name of their own.

ResNets are torchvision's without their classifier, under torchvision's own state_dict keys (He et al. 2016). The last
BN scale of every residual block starts at zero (Chen & He 2020, after Goyal et al. 2017). libraries.py builds any other
backbone of timm's, torchvision's or the user's.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from model.libraries import check_views, foreign_backbone, is_foreign
from pipeline.common.errors import UserError

Stem = Literal["default", "imagenet", "cifar", "small"]
Library = Literal["torchvision", "timm", "own"]
# Channels of resnet_tiny's first stage. Forward and backward of two views of 128 images at 32 px on 2 cores:
# 52 ms at 16 channels, 107 ms at 24, 155 ms at 32. At 24 the loader still has time on the same cores.
TINY_WIDTH = 24


class NarrowResNet(ResNet):
    """torchvision's ResNet with every stage ``width / 64`` times as wide."""

    def __init__(self, width: int, **options: Any) -> None:
        """``width`` is the number of channels of the first stage; ``options`` go to torchvision."""
        self._width = width
        super().__init__(**options)

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if not hasattr(self, "layer1"):
            # torchvision's constructor has just made a 64-channel stem, which build_backbone replaces.
            self.inplanes = self._width
        return super()._make_layer(block, planes * self._width // 64, blocks, stride, dilate)


@dataclass(frozen=True)
class Backbone:
    """One entry of ``BACKBONES``: how to build the backbone, what it yields, and which first layers it may have."""

    build: Callable[[], nn.Module]  # at random; float images [n, 3, h, w] -> pooled features [n, features]
    features: int
    default_stem: Stem = "imagenet"
    stems: tuple[Stem, ...] = ("imagenet", "cifar", "small")  # a backbone other than a ResNet has ("default",)
    library: Library = "torchvision"  # whose state_dict keys it has


def _resnet(build: Callable[..., ResNet]) -> Callable[[], ResNet]:
    def backbone() -> ResNet:
        made = build(zero_init_residual=True)
        made.fc = nn.Identity()
        return made

    return backbone


def _of_timm(name: str, features: int) -> Backbone:
    return Backbone(lambda: foreign_backbone(f"timm:{name}").build(), features, "default", ("default",), "timm")


# To add one, write a line here and run tests/model/test_backbone.py, which checks each of them. A backbone that is no
# ResNet brings its own first layers: Backbone(function, features, "default", ("default",)).
BACKBONES: dict[str, Backbone] = {
    "resnet18": Backbone(_resnet(models.resnet18), 512),
    "resnet34": Backbone(_resnet(models.resnet34), 512),
    "resnet50": Backbone(_resnet(models.resnet50), 2048),  # the paper's
    "resnet101": Backbone(_resnet(models.resnet101), 2048),
    "resnet152": Backbone(_resnet(models.resnet152), 2048),
    "resnext50_32x4d": Backbone(_resnet(models.resnext50_32x4d), 2048),
    "resnext101_32x8d": Backbone(_resnet(models.resnext101_32x8d), 2048),
    "wide_resnet50_2": Backbone(_resnet(models.wide_resnet50_2), 2048),
    "wide_resnet101_2": Backbone(_resnet(models.wide_resnet101_2), 2048),
    # For 32-pixel images on a CPU: four stages of one block, 0.7 M weights.
    "resnet_tiny": Backbone(
        _resnet(partial(NarrowResNet, width=TINY_WIDTH, block=BasicBlock, layers=[1, 1, 1, 1])), 8 * TINY_WIDTH, "small"
    ),
    "convnext_tiny": _of_timm("convnext_tiny", 768),
    "vit_small_patch16_224": _of_timm("vit_small_patch16_224", 384),  # DINO's ViT-S/16
}


def build_backbone(name: str, stem: Stem = "default", channels: int = 3) -> tuple[nn.Module, int]:
    """Build a randomly initialised backbone.

    Args:
        name: a key of ``BACKBONES``, ``timm:NAME``, ``torchvision:NAME`` or ``MODULE:FUNCTION``.
        stem: ``imagenet`` 7x7 stride 2 and a max-pool; ``cifar`` 3x3 stride 1 without it (Chen & He 2020, appendix D);
            ``small`` 3x3 stride 2 without it, a quarter of the CIFAR stem's cost; ``default`` the backbone's own.
        channels: of the images, for which the first convolution is made.

    Returns:
        The module, mapping float images ``[n, channels, h, w]`` to pooled features ``[n, d]``, and ``d``.

    Raises:
        UserError: as ``check_backbone``.
    """
    check_backbone(name, stem)
    entry = find_backbone(name)
    chosen = entry.default_stem if stem == "default" else stem
    backbone = entry.build()
    if isinstance(backbone, ResNet):
        _set_stem(backbone, chosen)
    take_channels(backbone, channels, name)
    return backbone, entry.features


def take_channels(module: nn.Module, channels: int, name: str) -> None:
    """Let backbones among ``module`` and below, which take RGB, take images of ``channels``: new weights in place.

    They are drawn normally with the standard deviation of those that they replace. For 3 channels nothing is done.
    Raises UserError for a backbone, ``name``, whose first convolution is not of 3 channels.
    """
    if channels == 3:
        return
    stems = [one for one in module.modules() if isinstance(one, nn.Conv2d) and one.in_channels == 3 and one.groups == 1]
    if not stems:
        raise UserError(
            f"--backbone {name} has no first convolution of 3 channels, which could be made one of {channels}: take "
            f"one of {', '.join(BACKBONES)}"
        )
    for conv in stems:
        shape = (conv.out_channels, channels, *conv.kernel_size)
        weight = torch.randn(shape, device=conv.weight.device) * conv.weight.detach().std()
        conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        conv.in_channels = channels


def find_backbone(name: str, flag: str = "--backbone ") -> Backbone:
    """The entry of any backbone. Raises UserError for an unknown name; ``flag`` is how it was given."""
    if name in BACKBONES:
        return BACKBONES[name]
    if is_foreign(name):
        library = name.partition(":")[0]
        keys: Library = library if library in ("timm", "torchvision") else "own"  # type: ignore[assignment]
        return Backbone(*foreign_backbone(name), "default", ("default",), keys)
    near = difflib.get_close_matches(name, BACKBONES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    own = "or timm:NAME, torchvision:NAME, MODULE:FUNCTION"
    raise UserError(f"{flag}{name} is unknown; known are {', '.join(BACKBONES)}, {own}{hint}")


def is_users_own(name: str) -> bool:
    """Whether the name is MODULE:FUNCTION, whose code is the user's."""
    return name not in BACKBONES and is_foreign(name) and name.partition(":")[0] not in ("timm", "torchvision")


def check_view_sides(name: str, sides: Iterable[int]) -> None:
    """Raise UserError unless the backbone makes pooled features of views with these sides, in px."""
    entry = find_backbone(name)
    if "default" in entry.stems:  # ResNets take any
        check_views(name, entry.build, entry.features, sides)


def check_backbone(name: str, stem: Stem = "default", flag: str = "--backbone ") -> None:
    """Raise UserError unless there is such a backbone with such first layers; ``flag`` is how it was given."""
    stems = find_backbone(name, flag).stems
    if stem not in ("default", *stems):
        raise UserError(f"--stem {stem}: {name} has {', '.join(stems)}")


def has_batch_norm(name: str) -> bool:
    """Whether a backbone has batch norm, which then depends on how a batch is divided."""
    with torch.device("meta"):
        backbone, _ = build_backbone(name)
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in backbone.modules())


def start_blocks_at_one(backbone: nn.Module) -> None:
    """Undo the zero start of the last BN scale in every residual block of a ResNet: MoCo keeps torchvision's 1."""
    for module in backbone.modules():
        if isinstance(module, Bottleneck):
            nn.init.ones_(module.bn3.weight)
        elif isinstance(module, BasicBlock):
            nn.init.ones_(module.bn2.weight)


def has_imagenet_stem(backbone: nn.Module) -> bool:
    """Whether the first layers reduce images to a quarter of their side at once."""
    return isinstance(backbone, ResNet) and isinstance(backbone.maxpool, nn.MaxPool2d)


def _set_stem(backbone: ResNet, stem: Stem) -> None:
    """Replace the first convolution, its BN and the max-pool in place, initialised as torchvision initialises them."""
    width = backbone.layer1[0].conv1.in_channels
    if stem == "imagenet" and width == backbone.conv1.out_channels:
        return
    if stem == "imagenet":
        conv = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
    else:
        conv = nn.Conv2d(3, width, kernel_size=3, stride=1 if stem == "cifar" else 2, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    backbone.conv1, backbone.bn1 = conv, nn.BatchNorm2d(width)
