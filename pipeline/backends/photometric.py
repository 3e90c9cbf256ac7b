"""The photometric stage: byte squares and drawn parameters in, normalised channels-last views out.

``Photometric`` runs the compiled CPU pass (photometric_cpu.py) or the Triton kernels (photometric_gpu.py). Both follow
pipeline/backends/reference.py operation by operation.
"""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pipeline.common.buffers import Buffers
from pipeline.sampling.augmentations import DRAWS, augment, augment_bytes
from pipeline.sampling.views import CentreCrops, ViewParams, ViewRecipe

Squares = UInt8[Tensor, "n s s 3"]
View = Float[Tensor, "n 3 s s"]
CHUNKS_PER_THREAD = 4  # images differ in cost (half of them are blurred), so threads take small parts


class Photometric:
    """Turns squares into views on one device."""

    def __init__(
        self, recipe: ViewRecipe, device: torch.device, dtype: torch.dtype, pool: ThreadPoolExecutor, threads: int
    ) -> None:
        """``dtype`` of the views; ``pool`` has at least ``threads`` workers (used on the CPU only)."""
        self._recipe = recipe
        self._device = device
        self._dtype = dtype
        self._pool = pool
        self._threads = threads
        self._buffers = Buffers(torch.float32)
        std = np.array(recipe.std)
        self._scale = (1 / (255 * std)).astype(np.float32)
        self._offset = (-np.array(recipe.mean) / std).astype(np.float32)

    def __call__(
        self, squares: list[UInt8[Tensor, "n _ _ 3"]], windows: ViewParams | CentreCrops
    ) -> list[Float[Tensor, "n 3 _ _"]]:
        """Each view ``[n, 3, s, s]``, channels-last in memory. Centre crops are only normalised.

        ``squares`` may be changed in place.
        """
        match windows:
            case ViewParams() as params:
                for view, square in enumerate(squares):
                    augment_bytes(square.permute(0, 3, 1, 2), params.extra[:, view], self._recipe.extra)
                views = [self._view(square, params, view) for view, square in enumerate(squares)]
                return [augment(made, params.extra[:, view], self._recipe.extra) for view, made in enumerate(views)]
            case CentreCrops():
                return [self._view(square, _neutral(len(windows)), view) for view, square in enumerate(squares)]

    def _view(self, squares: Squares, params: ViewParams, view: int) -> View:
        match self._device.type:
            case "cuda":
                from pipeline.backends.photometric_gpu import transform_on_gpu

                own = self._recipe.per_view[view]
                return transform_on_gpu(squares, params, view, own, self._scale, self._offset, self._dtype)
            case "cpu":
                return self._transform_on_cpu(squares, params, view)
            case other:
                raise AssertionError(f"no photometric stage for {other}")

    def _transform_on_cpu(self, squares: Squares, params: ViewParams, view: int) -> View:
        from pipeline.backends.photometric_cpu import transform_images

        out = self._buffers.lend(tuple(squares.shape))
        images, result = squares.permute(0, 3, 1, 2).contiguous().numpy(), out.numpy()  # planar, as in cpu_crop.py
        recipe = self._recipe.per_view[view]
        fields = (params.jitter, params.order, params.factors, params.gray, params.sigma, params.solarize, params.flip)
        # Contiguous, so that every part has the one memory layout that the function is compiled for.
        columns = [np.ascontiguousarray(field[:, view]) for field in fields]

        def transform(part: slice) -> None:
            jitter, order, factors, gray, sigma, solarize, flip = (column[part] for column in columns)
            transform_images(
                images[part],
                jitter,
                order,
                factors,
                gray,
                sigma,
                recipe.blur_window // 2,
                solarize,
                recipe.solarize_threshold,
                flip,
                self._scale,
                self._offset,
                result[part],
            )

        list(self._pool.map(transform, parts_of(len(images), self._threads)))
        return out.permute(0, 3, 1, 2).to(self._dtype)


def parts_of(count: int, threads: int) -> list[slice]:
    """``count`` images in portions for ``threads`` workers."""
    bounds = np.linspace(0, count, threads * CHUNKS_PER_THREAD + 1).astype(int).tolist()
    return [slice(start, end) for start, end in itertools.pairwise(bounds) if end > start]


def _neutral(count: int) -> ViewParams:
    no = np.zeros((count, 1), dtype=bool)
    return ViewParams(
        crop=np.zeros((count, 1, 4), dtype=np.int32),
        jitter=no,
        order=np.zeros((count, 1, 4), dtype=np.int8),
        factors=np.ones((count, 1, 4), dtype=np.float32),
        gray=no,
        sigma=np.zeros((count, 1), dtype=np.float32),
        solarize=no,
        flip=no,
        extra=np.ones((count, 1, 0, DRAWS)),
    )
