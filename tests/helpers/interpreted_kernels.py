"""Runs the GPU's kernels through Triton's interpreter and prints how far they are from the CPU's, as JSON.

A script of its own, because Triton decides between compiling and interpreting when it is imported.
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from triton.runtime import interpreter

from pipeline.backends.photometric_gpu import ROW, SIGMA, _blur_rows, transform_on_gpu
from pipeline.sampling.views import ViewRecipe, draw_views
from tests.helpers.crafted import difference, squares, transformed


def index_with_numpy_2_5() -> None:
    """Bounds of a loop as later versions of Triton read them: 3.6 takes int() of [1], which numpy 2.5 refuses."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patched


def compare(side: int, count: int, recipe: ViewRecipe) -> dict[str, float]:
    """Both views of ``count`` images, noise and smooth, by interpreter and CPU."""
    images = torch.cat([squares("smooth", count // 2, side), squares("noise", count - count // 2, side)])
    params = draw_views(recipe, 5, 0, np.arange(count), np.full((count, 2), side, dtype=np.int32))
    std = np.array(recipe.std)
    scale, offset = (1 / (255 * std)).astype(np.float32), (-np.array(recipe.mean) / std).astype(np.float32)
    views = [transform_on_gpu(images, params, view, recipe, scale, offset, torch.float32) for view in range(2)]
    apart = difference(views, transformed(images, params, recipe), recipe)
    channels_last = all(view.is_contiguous(memory_format=torch.channels_last) for view in views)
    return {"max": apart.max().item(), "mean": apart.mean().item(), "channels_last": channels_last}


def blurred_rows(sigmas: tuple[float, ...] = (0.3, 0.5, 1.0, 1.3), side: int = 32) -> dict[str, float]:
    """One blur along the rows, by the interpreter and in float64 with ceil(4 sigma) taps to each side."""
    planes = np.random.default_rng(0).integers(0, 2, (len(sigmas), 3, side, side)).astype(np.uint8) * 255
    table = torch.zeros(len(sigmas), ROW.value)
    table[:, SIGMA.value] = torch.tensor(sigmas)
    rows = torch.empty(planes.shape)
    _blur_rows[(len(sigmas), 3, 1)](torch.from_numpy(planes), rows, table, side, RADIUS=11, BLOCK=1024)
    apart = 0.0
    for sigma, plane, made in zip(sigmas, planes, rows.numpy(), strict=True):
        radius = int(np.ceil(np.float32(4) * np.float32(sigma)))
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        wide = np.pad(plane.astype(np.float64), ((0, 0), (0, 0), (radius, radius)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(wide, 2 * radius + 1, axis=2)
        apart = max(apart, np.abs(windows @ (weights / weights.sum()) - made).max())
    return {"max": float(apart)}


if __name__ == "__main__":
    index_with_numpy_2_5()
    print(
        json.dumps(
            {
                "whole images": compare(16, 10, ViewRecipe(image_size=16, solarize_prob=0.3, blur_radius=3)),
                "more than a block": compare(
                    37, 4, ViewRecipe(image_size=37, jitter_prob=1, blur_prob=1, blur_radius=2)
                ),
                "fewer taps than the window": compare(24, 6, ViewRecipe(image_size=24, blur_prob=1)),
                "rows blurred with ceil(4 sigma) taps": blurred_rows(),
                "window wider than the view": compare(3, 4, ViewRecipe(image_size=3, blur_prob=1)),
            }
        )
    )
