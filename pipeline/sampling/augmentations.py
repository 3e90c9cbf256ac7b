"""Augmentations beyond the paper's recipe, alike on every back end: of bytes after the crop, or of finished views.

All are off by default. To add one, write a class like those below, add a field of the same name to the end of
``Augmentations`` (its position decides which random numbers it gets), and compare it with a known implementation in
tests/pipeline/sampling/test_augmentations.py. The command line, resuming and all back ends need no change.
docs/views.md shows both kinds: a class with ``on_bytes`` gets uint8 squares before the colours, as Posterize does; the
others get normalised views after all else.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from pipeline.common.buffers import on_device
from pipeline.common.errors import require
from pipeline.common.flags import own_flags

DRAWS = 8  # uniform numbers that each augmentation gets for a view; the first decides whether it is applied
Finished = Float[Tensor, "n c s s"]  # normalised, so that 0 is the mean colour
Squares = UInt8[Tensor, "n 3 s s"]  # 0 .. 255 RGB, after crop and resize
Uniforms = Float64[np.ndarray, "n 7"]


@dataclass(frozen=True)
class Augmentation:
    """What is done to some views, each chosen with probability ``prob``."""

    on_bytes: ClassVar[bool] = False  # whether ``apply`` takes and gives ``Squares``, not ``Finished``

    # Probability for each view; 0 is off.
    prob: float = 0.0

    def __post_init__(self) -> None:
        require(self.flag("prob"), self.prob, 0 <= self.prob <= 1, "a probability lies in 0 .. 1")

    def flag(self, name: str) -> str:
        """The command line's name of a field: ``--vertical-flip.prob``."""
        return "--" + re.sub(r"(?<!^)(?=[A-Z])", "-", type(self).__name__).lower() + f".{name}"

    def apply(self, views: Any, uniforms: Uniforms) -> Any:
        """The chosen views, changed: a function of them and of ``uniforms``, numbers strictly between 0 and 1."""
        raise NotImplementedError


@dataclass(frozen=True)
class VerticalFlip(Augmentation):
    """Top to bottom; for images without an upright side (microscopes, satellites). torchvision: vertical_flip."""

    def apply(self, views: Finished, uniforms: Uniforms) -> Finished:
        return views.flip(2)


@dataclass(frozen=True)
class QuarterTurns(Augmentation):
    """A turn by 90, 180 or 270 degrees, equally likely; ``prob`` 0.75 makes all four orientations so."""

    def apply(self, views: Finished, uniforms: Uniforms) -> Finished:
        """Counter-clockwise, as torch.rot90."""
        turned = torch.empty_like(views)
        for turns in (1, 2, 3):
            rows = on_device(np.flatnonzero(np.ceil(3 * uniforms[:, 0]) == turns), views.device)
            turned[rows] = views[rows].rot90(turns, (2, 3))
        return turned


@dataclass(frozen=True)
class Erasing(Augmentation):
    """A rectangle in the mean colour (Zhong et al. 2017, "Random Erasing"; the defaults are torchvision's)."""

    # Share of the view that the rectangle covers, lowest and highest.
    area: tuple[float, float] = (0.02, 0.33)
    # Height / width of the rectangle, lowest and highest, drawn log-uniformly.
    ratio: tuple[float, float] = (0.3, 3.3)

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = "it takes two numbers, 0 < low <= high <= 1"
        require(self.flag("area"), self.area, 0 < self.area[0] <= self.area[1] <= 1, rule)
        rule = "it takes two numbers, 0 < low <= high"
        require(self.flag("ratio"), self.ratio, 0 < self.ratio[0] <= self.ratio[1] < math.inf, rule)

    def apply(self, views: Finished, uniforms: Uniforms) -> Finished:
        """The rectangle is cut to the view where it is longer; torchvision draws again instead."""
        side = views.shape[-1]
        (smallest, largest), (lowest, highest) = self.area, map(math.log, self.ratio)
        area = side * side * (smallest + (largest - smallest) * uniforms[:, 0])
        ratio = np.exp(lowest + (highest - lowest) * uniforms[:, 1])
        lengths = np.clip(np.rint(np.sqrt(area[:, None] * np.stack((ratio, 1 / ratio), axis=1))), 1, side)
        starts = np.floor(uniforms[:, 2:4] * (side - lengths + 1))
        first, end = (on_device(edges.astype(np.int64), views.device) for edges in (starts, starts + lengths))
        at = torch.arange(side, device=views.device)
        inside = (at >= first[..., None]) & (at < end[..., None])  # [n, 2, s]: rows, columns
        return views.masked_fill((inside[:, 0, :, None] & inside[:, 1, None, :])[:, None], 0.0)


@dataclass(frozen=True)
class Posterize(Augmentation):
    """Fewer levels of each colour: the lowest bits are cleared. torchvision: posterize."""

    on_bytes: ClassVar[bool] = True
    # Bits that each colour keeps.
    bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.flag("bits"), self.bits, 1 <= self.bits <= 8, "a byte has 1 .. 8 bits to keep")

    def apply(self, views: Squares, uniforms: Uniforms) -> Squares:
        """Bits of the bytes."""
        return views & (256 - (1 << (8 - self.bits)))


@own_flags
@dataclass(frozen=True)
class Augmentations:
    """All of them, in the order in which they are applied. SimSiam uses none."""

    vertical_flip: VerticalFlip = field(default_factory=VerticalFlip)
    quarter_turns: QuarterTurns = field(default_factory=QuarterTurns)
    erasing: Erasing = field(default_factory=Erasing)
    posterize: Posterize = field(default_factory=Posterize)

    def active(self) -> dict[str, tuple[int, Augmentation]]:
        """Name -> (index, augmentation) of those that are ever applied."""
        each = (
            (option.name, (index, getattr(self, option.name))) for index, option in enumerate(dataclasses.fields(self))
        )
        return {name: (index, one) for name, (index, one) in each if one.prob > 0}


def augment(
    views: Finished,
    uniforms: Float64[np.ndarray, "n augmentations draws"],
    augmentations: Augmentations,
) -> Finished:
    """Apply all active ones of finished views, in place; ``uniforms`` is a view's part of ViewParams.extra."""
    return _applied(views, uniforms, augmentations, on_bytes=False)


def augment_bytes(
    squares: Squares,
    uniforms: Float64[np.ndarray, "n augmentations draws"],
    augmentations: Augmentations,
) -> Squares:
    """Apply all active ones of bytes, in place, in any memory layout; ``uniforms`` as of ``augment``."""
    return _applied(squares, uniforms, augmentations, on_bytes=True)


def _applied(
    views: Tensor, uniforms: Float64[np.ndarray, "n augmentations draws"], augmentations: Augmentations, on_bytes: bool
) -> Tensor:
    for index, augmentation in augmentations.active().values():
        if augmentation.on_bytes != on_bytes:
            continue
        chosen = np.flatnonzero(uniforms[:, index, 0] < augmentation.prob)
        rows = on_device(chosen, views.device)
        views[rows] = augmentation.apply(views[rows], uniforms[chosen, index, 1:])
    return views
