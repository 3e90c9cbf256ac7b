"""Runs the GPU's kernels through Triton's interpreter and prints how far they are from the CPU's, as JSON.

A script of its own, because Triton decides between compiling and interpreting when it is imported.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from pipeline.backends.photometric_gpu import transform_on_gpu
from pipeline.sampling.views import ViewRecipe, draw_views
from tests.helpers.crafted import difference, squares, transformed


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


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "whole images": compare(16, 10, ViewRecipe(image_size=16, solarize_prob=0.3, blur_radius=3)),
                "more than a block": compare(
                    37, 4, ViewRecipe(image_size=37, jitter_prob=1, blur_prob=1, blur_radius=2)
                ),
                "fewer taps than the window": compare(24, 6, ViewRecipe(image_size=24, blur_prob=1)),
                "window wider than the view": compare(3, 4, ViewRecipe(image_size=3, blur_prob=1)),
            }
        )
    )
