"""The photometric stage on a GPU: four Triton kernels that together touch each byte a handful of times.

The image's mean gray, which contrast needs; colour; horizontal blur; and vertical blur with solarize, normalise and
flip. Every kernel has several programs an image, so that 64 images fill a GPU. The operations and their rounding are
those of photometric_cpu.py. The tests compare the two: on a GPU, and elsewhere through Triton's interpreter
(TRITON_INTERPRET=1).
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int32, UInt8
from numpy.typing import NDArray
from torch import Tensor

from pipeline.common.buffers import on_device
from pipeline.common.compiled_code import choose_triton_folder
from pipeline.sampling.views import ViewParams, ViewRecipe

choose_triton_folder()
COLOUR_BLOCK = 1024  # pixels a program handles at a time
ROW_BLOCK = 1024  # values of one channel
# Columns of the table that goes to the GPU, a row an image: whole numbers, then real ones.
JITTER, ORDER, GRAY, SOLARIZE, FLIP = (tl.constexpr(column) for column in (0, 1, 5, 6, 7))
FLAGS = tl.constexpr(8)  # columns of whole numbers; those of real ones count from here
SIGMA, SCALE, OFFSET = (tl.constexpr(column) for column in (4, 5, 8))
REACH = tl.constexpr(4.0)  # BLUR_REACH of photometric_cpu.py
ROW = tl.constexpr(19)


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
    table = on_device(_table(params, view, scale, offset), squares.device)
    flags, numbers = table, table[:, FLAGS.value :].view(torch.float32)
    coloured = torch.empty((count, 3, pixels), dtype=torch.uint8, device=squares.device)
    rows = torch.empty((count, 3, pixels), dtype=torch.float32, device=squares.device)
    out = torch.empty((count, side, side, 3), dtype=dtype, device=squares.device)
    blocks = triton.cdiv(pixels, ROW_BLOCK)
    radius = recipe.blur_window // 2
    # Colours are truncated to bytes as on the CPU, where a * b + c is rounded twice; sums of the blur may be fused.
    parts = triton.cdiv(pixels, COLOUR_BLOCK)
    sums = torch.empty((count, parts), dtype=torch.float32, device=squares.device)
    grid = (count, parts)
    _gray_sums[grid](squares, sums, flags, numbers, pixels, BLOCK=COLOUR_BLOCK, enable_fp_fusion=False)
    _colour[grid](squares, sums, coloured, flags, numbers, pixels, parts, BLOCK=COLOUR_BLOCK, enable_fp_fusion=False)
    _blur_rows[(count, 3, blocks)](coloured, rows, numbers, side, RADIUS=radius, BLOCK=ROW_BLOCK, enable_fp_fusion=True)
    _finish[(count, 3, blocks)](
        coloured,
        rows,
        out,
        flags,
        numbers,
        recipe.solarize_threshold,
        side,
        RADIUS=radius,
        BLOCK=ROW_BLOCK,
        enable_fp_fusion=True,
    )
    return out.permute(0, 3, 1, 2)


def _table(
    params: ViewParams, view: int, scale: NDArray[np.float32], offset: NDArray[np.float32]
) -> Int32[np.ndarray, "n 19"]:
    """The parameters of one view as one table, so that one upload takes them all; real numbers by their bits."""
    flags = np.column_stack(
        [
            params.jitter[:, view],
            params.order[:, view],
            params.gray[:, view],
            params.solarize[:, view],
            params.flip[:, view],
        ]
    )
    of_all = np.tile(np.concatenate([scale, offset]), (len(flags), 1))
    numbers = np.column_stack([params.factors[:, view], params.sigma[:, view], of_all]).astype(np.float32)
    return np.hstack([flags.astype(np.int32), numbers.view(np.int32)])


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
def _gray_sums(squares, sums, flags, numbers, pixels: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the gray values of a part of one image, as contrast finds them; whole numbers, exact in float32."""
    index = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    flags += index * ROW
    numbers += index * ROW
    if tl.load(flags + JITTER) != 0:
        at = part * BLOCK + tl.arange(0, BLOCK)
        mask = at < pixels
        red, green, blue = _load_pixels(squares + index * pixels * 3, at, mask)
        before_contrast = 1
        for position in range(4):
            operation = tl.load(flags + ORDER + position)
            before_contrast = tl.where(operation == 1, 0, before_contrast)
            if before_contrast != 0:
                red, green, blue = _operate(operation, tl.load(numbers + operation), 0.0, red, green, blue)
        total = tl.sum(tl.where(mask, _luma(red, green, blue), 0.0))
        tl.store(sums + index * tl.num_programs(1) + part, total)


@triton.jit
def _colour(squares, sums, coloured, flags, numbers, pixels: tl.constexpr, parts: tl.constexpr, BLOCK: tl.constexpr):
    """Jitter and grayscale of a part of one image: interleaved bytes in, one plane a channel out."""
    index = tl.program_id(0).to(tl.int64)
    planes = coloured + index * pixels * 3
    flags += index * ROW
    numbers += index * ROW
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < pixels
    red, green, blue = _load_pixels(squares + index * pixels * 3, at, mask)
    if tl.load(flags + JITTER) != 0:
        every = tl.arange(0, triton.next_power_of_2(parts))
        mean = tl.sum(tl.load(sums + index * parts + every, mask=every < parts, other=0.0)) / pixels
        for position in range(4):
            operation = tl.load(flags + ORDER + position)
            red, green, blue = _operate(operation, tl.load(numbers + operation), mean, red, green, blue)
    if tl.load(flags + GRAY) != 0:
        red = _luma(red, green, blue)
        green = red
        blue = red
    tl.store(planes + at, red.to(tl.uint8), mask=mask)
    tl.store(planes + pixels + at, green.to(tl.uint8), mask=mask)
    tl.store(planes + 2 * pixels + at, blue.to(tl.uint8), mask=mask)


@triton.jit
def _blur_radius(sigma, RADIUS: tl.constexpr):
    """As on the CPU: beyond REACH sigmas a tap adds less than 0.02 of 255."""
    whole = (sigma * REACH).to(tl.int32)
    return tl.minimum(whole + (whole < sigma * REACH).to(tl.int32), RADIUS)


@triton.jit
def _reflect(at, side):
    """Fold a coordinate back into the image, the border pixel not repeated."""
    at = tl.abs(at)
    return side - 1 - tl.abs(side - 1 - at)


@triton.jit
def _blur_rows(coloured, rows, numbers, side: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr):
    """Horizontal blur of a part of one channel; nothing where the image is not blurred."""
    index = tl.program_id(0).to(tl.int64)
    sigma = tl.load(numbers + index * ROW + SIGMA)
    if sigma > 0.0:
        plane = (index * 3 + tl.program_id(1)) * side * side
        at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        mask = at < side * side
        row, column = at // side, at % side
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        weights = 0.0
        radius = _blur_radius(sigma, RADIUS)
        for tap in range(-radius, radius + 1):
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
    sigma = tl.load(numbers + index * ROW + SIGMA)
    if sigma > 0.0:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        weights = 0.0
        radius = _blur_radius(sigma, RADIUS)
        for tap in range(-radius, radius + 1):
            weight = tl.exp(-0.5 * (tap / sigma) * (tap / sigma))
            weights += weight
            total += weight * tl.load(rows + plane + _reflect(row + tap, side) * side + column, mask=mask, other=0.0)
        value = tl.floor(total / weights + 0.5)
    else:
        value = tl.load(coloured + plane + at, mask=mask, other=0).to(tl.float32)
    flags += index * ROW
    if tl.load(flags + SOLARIZE) != 0:
        value = tl.where(value < threshold, value, 255.0 - value)
    if tl.load(flags + FLIP) != 0:
        column = side - 1 - column
    numbers += index * ROW
    value = value * tl.load(numbers + SCALE + channel) + tl.load(numbers + OFFSET + channel)
    target = out + (index * side * side + row * side + column) * 3 + channel
    tl.store(target, value.to(out.dtype.element_ty), mask=mask)
