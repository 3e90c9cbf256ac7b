"""Owns the photometric stage on a GPU: three Triton kernels that together touch each byte a handful of times.

Colour (one program an image, because contrast needs the image's mean), horizontal blur, and vertical blur with
solarize, normalise and flip. The operations and their rounding are those of photometric_cpu.py, and the tests
compare the two: on a GPU, and everywhere else through Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.buffers import on_device
from pipeline.sampling.views import ViewParams, ViewRecipe

COLOUR_BLOCK = 1024  # pixels a program handles at a time
ROW_BLOCK = 1024  # values of one channel
# Columns of the tables that go to the GPU.
JITTER, ORDER, GRAY, SOLARIZE, FLIP = (tl.constexpr(column) for column in (0, 1, 5, 6, 7))
FLAGS = tl.constexpr(8)
SIGMA = tl.constexpr(4)
NUMBERS = tl.constexpr(5)


def transform_on_gpu(
    squares: UInt8[Tensor, "n s s 3"],
    params: ViewParams,
    view: int,
    recipe: ViewRecipe,
    scale: NDArray[np.float32],
    offset: NDArray[np.float32],
    dtype: torch.dtype,
) -> Float[Tensor, "n 3 s s"]:
    """One view of n images on the current stream: ``byte * scale + offset`` per channel, channels-last in memory."""
    count, side = squares.shape[:2]
    pixels = side * side
    squares = squares.contiguous()
    flags, numbers = _tables(params, view, squares.device)
    coloured = torch.empty((count, 3, pixels), dtype=torch.uint8, device=squares.device)
    rows = torch.empty((count, 3, pixels), dtype=torch.float32, device=squares.device)
    out = torch.empty((count, side, side, 3), dtype=dtype, device=squares.device)
    blocks = triton.cdiv(pixels, ROW_BLOCK)
    radius = recipe.blur_window // 2
    # Colours are truncated to bytes as on the CPU, where a * b + c is rounded twice; sums of the blur may be fused.
    _colour[(count,)](squares, coloured, flags, numbers, pixels, BLOCK=COLOUR_BLOCK, enable_fp_fusion=False)
    _blur_rows[(count, 3, blocks)](coloured, rows, numbers, side, RADIUS=radius, BLOCK=ROW_BLOCK, enable_fp_fusion=True)
    _finish[(count, 3, blocks)](
        coloured,
        rows,
        out,
        flags,
        numbers,
        on_device(scale, squares.device),
        on_device(offset, squares.device),
        recipe.solarize_threshold,
        side,
        RADIUS=radius,
        BLOCK=ROW_BLOCK,
        enable_fp_fusion=True,
    )
    return out.permute(0, 3, 1, 2)


def _tables(params: ViewParams, view: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The parameters of one view as two tables, a row an image: whole numbers and real ones."""
    flags = np.column_stack(
        [
            params.jitter[:, view],
            params.order[:, view],
            params.gray[:, view],
            params.solarize[:, view],
            params.flip[:, view],
        ]
    )
    numbers = np.column_stack([params.factors[:, view], params.sigma[:, view]])
    return on_device(flags.astype(np.int32), device), on_device(numbers.astype(np.float32), device)


@triton.jit
def _byte(value):
    """Truncate to 0 .. 255 and stay a float, as all whole-number steps do here."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32).to(tl.float32)


@triton.jit
def _luma(red, green, blue):
    return (red * 0.2989 + green * 0.587 + blue * 0.114).to(tl.int32).to(tl.float32)


@triton.jit
def _hue_channel(sixths, value, chroma):
    sixths = tl.where(sixths >= 6.0, sixths - 6.0, sixths)
    trapezium = tl.maximum(tl.minimum(tl.minimum(sixths, 4.0 - sixths), 1.0), 0.0)
    return _byte((value - chroma * trapezium) * (255.999 / 255.0))


@triton.jit
def _hue(red, green, blue, turns):
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    inverse = 1.0 / tl.where(chroma > 0.0, chroma, 1.0)
    from_red = (green - blue) * inverse
    from_green = (blue - red) * inverse + 2.0
    from_blue = (red - green) * inverse + 4.0
    sixths = tl.where(value == red, from_red, tl.where(value == green, from_green, from_blue)) + 6.0 * turns
    sixths = tl.where(sixths < 0.0, sixths + 6.0, sixths)
    sixths = tl.where(sixths >= 6.0, sixths - 6.0, sixths)
    return (
        _hue_channel(sixths + 5.0, value, chroma),
        _hue_channel(sixths + 3.0, value, chroma),
        _hue_channel(sixths + 1.0, value, chroma),
    )


@triton.jit
def _operate(operation, factor, mean, red, green, blue):
    """One of ColorJitter's operations: brightness, contrast, saturation, hue."""
    if operation == 3:
        red, green, blue = _hue(red, green, blue, factor)
    else:
        anchor = tl.zeros_like(red)
        if operation == 1:
            anchor += mean
        if operation == 2:
            anchor += _luma(red, green, blue)
        shift = anchor * (1.0 - factor)
        red, green, blue = _byte(red * factor + shift), _byte(green * factor + shift), _byte(blue * factor + shift)
    return red, green, blue


@triton.jit
def _load_pixels(image, at, mask):
    red = tl.load(image + 3 * at, mask=mask, other=0).to(tl.float32)
    green = tl.load(image + 3 * at + 1, mask=mask, other=0).to(tl.float32)
    blue = tl.load(image + 3 * at + 2, mask=mask, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def _colour(squares, coloured, flags, numbers, pixels: tl.constexpr, BLOCK: tl.constexpr):
    """Jitter and grayscale of one image: interleaved bytes in, one plane a channel out."""
    index = tl.program_id(0).to(tl.int64)
    image = squares + index * pixels * 3
    planes = coloured + index * pixels * 3
    flags += index * FLAGS
    numbers += index * NUMBERS
    jitter = tl.load(flags + JITTER)
    mean = 0.0
    if jitter != 0:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, pixels, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mask = at < pixels
            red, green, blue = _load_pixels(image, at, mask)
            before_contrast = 1
            for position in range(4):
                operation = tl.load(flags + ORDER + position)
                before_contrast = tl.where(operation == 1, 0, before_contrast)
                if before_contrast != 0:
                    red, green, blue = _operate(operation, tl.load(numbers + operation), 0.0, red, green, blue)
            total += tl.where(mask, _luma(red, green, blue), 0.0)
        mean = tl.sum(total) / pixels
    gray = tl.load(flags + GRAY)
    for start in range(0, pixels, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < pixels
        red, green, blue = _load_pixels(image, at, mask)
        if jitter != 0:
            for position in range(4):
                operation = tl.load(flags + ORDER + position)
                red, green, blue = _operate(operation, tl.load(numbers + operation), mean, red, green, blue)
        if gray != 0:
            red = _luma(red, green, blue)
            green = red
            blue = red
        tl.store(planes + at, red.to(tl.uint8), mask=mask)
        tl.store(planes + pixels + at, green.to(tl.uint8), mask=mask)
        tl.store(planes + 2 * pixels + at, blue.to(tl.uint8), mask=mask)


@triton.jit
def _reflect(at, side):
    """Fold a coordinate back into the image, the border pixel not repeated."""
    at = tl.abs(at)
    return side - 1 - tl.abs(side - 1 - at)


@triton.jit
def _blur_rows(coloured, rows, numbers, side: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr):
    """Horizontal blur of a part of one channel; nothing where the image is not blurred."""
    index = tl.program_id(0).to(tl.int64)
    sigma = tl.load(numbers + index * NUMBERS + SIGMA)
    if sigma > 0.0:
        plane = (index * 3 + tl.program_id(1)) * side * side
        at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        mask = at < side * side
        row, column = at // side, at % side
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        weights = 0.0
        for tap in range(-RADIUS, RADIUS + 1):
            weight = tl.exp(-0.5 * (tap / sigma) * (tap / sigma))
            weights += weight
            value = tl.load(coloured + plane + row * side + _reflect(column + tap, side), mask=mask, other=0)
            total += weight * value.to(tl.float32)
        tl.store(rows + plane + at, total / weights, mask=mask)


@triton.jit
def _finish(
    coloured,
    rows,
    out,
    flags,
    numbers,
    scale,
    offset,
    threshold: tl.constexpr,
    side: tl.constexpr,
    RADIUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Vertical blur where there is one, then solarize, normalise and flip of a part of one channel."""
    index = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1)
    plane = (index * 3 + channel) * side * side
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = at < side * side
    row, column = at // side, at % side
    sigma = tl.load(numbers + index * NUMBERS + SIGMA)
    if sigma > 0.0:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        weights = 0.0
        for tap in range(-RADIUS, RADIUS + 1):
            weight = tl.exp(-0.5 * (tap / sigma) * (tap / sigma))
            weights += weight
            total += weight * tl.load(rows + plane + _reflect(row + tap, side) * side + column, mask=mask, other=0.0)
        value = tl.floor(total / weights + 0.5)
    else:
        value = tl.load(coloured + plane + at, mask=mask, other=0).to(tl.float32)
    flags += index * FLAGS
    if tl.load(flags + SOLARIZE) != 0:
        value = tl.where(value < threshold, value, 255.0 - value)
    if tl.load(flags + FLIP) != 0:
        column = side - 1 - column
    value = value * tl.load(scale + channel) + tl.load(offset + channel)
    target = out + (index * side * side + row * side + column) * 3 + channel
    tl.store(target, value.to(out.dtype.element_ty), mask=mask)
