"""Owns augmentations beyond the paper's recipe: applied after it, to finished views, alike on every back end.

All are off by default. To add one, write a class like those below, give it a field in ``Augmentations`` (at the end:
the place decides which random numbers it gets), and compare it with something known in tests/test_augmentations.py. The
command line, resuming, the CPU, the GPU and the reference follow by themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from pipeline.common.buffers import on_device
from pipeline.common.errors import UserError

DRAWS = 8  # uniform numbers that each augmentation gets for a view; the first decides whether it is applied
Finished = Float[Tensor, "n 3 s s"]  # normalised, so that 0 is the mean colour
Uniforms = Float64[np.ndarray, "n 7"]


@dataclass(frozen=True)
class Augmentation:
    """What is done to some views, each chosen with probability ``prob``."""

    prob: float = 0.0  # of each view

    def apply(self, views: Finished, uniforms: Uniforms) -> Finished:
        """The chosen views, changed: a function of them and of ``uniforms``, numbers strictly between 0 and 1."""
        raise NotImplementedError

    def mistake(self) -> str | None:
        """Which option has a value that cannot be, and the rule; None if all are well."""
        return None if 0 <= self.prob <= 1 else f"prob {self.prob}: a probability lies in 0 .. 1"


@dataclass(frozen=True)
class VerticalFlip(Augmentation):
    """Top to bottom; for images without an up, as of microscopes, satellites and skin. torchvision: vertical_flip."""

    def apply(self, views: Finished, uniforms: Uniforms) -> Finished:
        """Rows in reverse."""
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

    area: tuple[float, float] = (0.02, 0.33)  # share of the view
    ratio: tuple[float, float] = (0.3, 3.3)  # height / width, log-uniform

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

    def mistake(self) -> str | None:
        """As of Augmentation."""
        if not 0 < self.area[0] <= self.area[1] <= 1:
            return f"area {self.area}: it takes two numbers, 0 < low <= high <= 1"
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            return f"ratio {self.ratio}: it takes two numbers, 0 < low <= high"
        return super().mistake()


@dataclass(frozen=True)
class Augmentations:
    """Those that there are, in the order in which they are applied. SimSiam does without."""

    vertical_flip: VerticalFlip = field(default_factory=VerticalFlip)
    quarter_turns: QuarterTurns = field(default_factory=QuarterTurns)
    erasing: Erasing = field(default_factory=Erasing)

    def __post_init__(self) -> None:
        """Raise UserError for options that cannot be."""
        for name, (_, augmentation) in self._all():
            mistake = augmentation.mistake()
            if mistake is not None:
                raise UserError(f"--{name.replace('_', '-')}.{mistake}")

    def active(self) -> dict[str, tuple[int, Augmentation]]:
        """Name -> (place, augmentation) of those that are ever applied."""
        return {name: (place, one) for name, (place, one) in self._all() if one.prob > 0}

    def _all(self) -> Iterator[tuple[str, tuple[int, Augmentation]]]:
        for place, option in enumerate(dataclasses.fields(self)):
            yield option.name, (place, getattr(self, option.name))


def augment(
    views: Finished,
    uniforms: Float64[np.ndarray, "n augmentations draws"],
    augmentations: Augmentations,
) -> Finished:
    """Apply all that are active, in place where that is possible; ``uniforms`` is a view's part of ViewParams.extra."""
    for place, augmentation in augmentations.active().values():
        chosen = np.flatnonzero(uniforms[:, place, 0] < augmentation.prob)
        rows = on_device(chosen, views.device)
        views[rows] = augmentation.apply(views[rows], uniforms[chosen, place, 1:])
    return views
