"""View parameters and squares made by hand, so that a test can check one operation at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pipeline.backends import reference
from pipeline.backends.photometric import Photometric
from pipeline.sampling.augmentations import DRAWS
from pipeline.sampling.views import ViewParams, ViewRecipe
from tests.helpers.photos import smooth_pixels

VIEWS = 2
BYTES = ViewRecipe(mean=(0.0, 0.0, 0.0), std=(1 / 255,) * 3)  # normalising with this mean and std leaves 0 .. 255
NEUTRAL: dict[str, Any] = {
    "crop": [0, 0, 1, 1],
    "jitter": False,
    "order": [0, 1, 2, 3],
    "factors": [1, 1, 1, 0],
    "gray": False,
    "sigma": 0,
    "solarize": False,
    "flip": False,
    "extra": np.ones((0, DRAWS)),
}
DTYPES: dict[str, Any] = {
    "crop": np.int32,
    "order": np.int8,
    "factors": np.float32,
    "sigma": np.float32,
    "extra": np.float64,
}


def view_params(count: int, **fields: Any) -> ViewParams:
    """Parameters of ``count`` samples that change nothing but ``fields``: one value for all, or one a sample."""
    made = {}
    for name, neutral in NEUTRAL.items():
        inner = np.shape(neutral)
        value = np.asarray(fields.get(name, neutral), dtype=DTYPES.get(name, bool))
        if value.ndim > len(inner):
            value = value[:, None]
        made[name] = np.array(np.broadcast_to(value, (count, VIEWS, *inner)))
    return ViewParams(**made)


def squares(kind: str, count: int, side: int) -> UInt8[Tensor, "n s s 3"]:
    """Images of one kind: smooth, noise, or of one colour."""
    rng = np.random.default_rng(side)
    match kind:
        case "smooth":
            pixels = np.stack([smooth_pixels(seed, side, side) for seed in range(count)])
        case "noise":
            pixels = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        case "constant":
            colours = np.array([[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0], [3, 200, 90]], dtype=np.uint8)
            pixels = np.broadcast_to(colours[np.arange(count) % 5, None, None], (count, side, side, 3)).copy()
        case _:
            raise AssertionError(kind)
    return torch.from_numpy(pixels)


def transformed(
    images: UInt8[Tensor, "n s s 3"], params: ViewParams, recipe: ViewRecipe = BYTES, threads: int = 1
) -> list[Float[Tensor, "n 3 s s"]]:
    """Both views by the compiled stage on the CPU."""
    with ThreadPoolExecutor(threads) as pool:
        return Photometric(recipe, torch.device("cpu"), torch.float32, pool, threads)([images] * VIEWS, params)


def referred(
    images: UInt8[Tensor, "n s s 3"], params: ViewParams, recipe: ViewRecipe = BYTES
) -> list[Float[Tensor, "n 3 s s"]]:
    """Both views by torchvision."""
    planar = images.permute(0, 3, 1, 2)
    views = []
    for view in range(VIEWS):
        made = []
        for sample, image in enumerate(planar):
            coloured = reference.colour(image, params, sample, view)
            finished = reference.blur_and_flip(coloured, params, sample, view, recipe)
            made.append(reference.normalise(finished, recipe))
        views.append(torch.stack(made))
    return views


def difference(
    one: list[Float[Tensor, "n 3 s s"]], other: list[Float[Tensor, "n 3 s s"]], recipe: ViewRecipe = BYTES
) -> Float[Tensor, "2 n 3 s s"]:
    """Absolute difference of two back ends' views, in steps of 0 .. 255."""
    std = torch.tensor(recipe.std)[:, None, None]
    return (torch.stack(one).float() - torch.stack(other).float()).abs() * std * 255
