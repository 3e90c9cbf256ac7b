"""The photometric stage on the CPU: colour, gray, blur, solarize, normalise, flip; compiled, one image at a time.

DALI's own colour operators miss torchvision's contrast and hue, and hue in DALI arithmetic costs more than all the rest
of the loader. Numba compiles the loops below to vector code and releases the GIL, so threads run in parallel.
pipeline/backends/reference.py does the same through torchvision, slowly; tests compare the two. Every operation
rounds to whole bytes as torchvision's does on byte images.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.common.compiled_code import cached_jit

BLUR_REACH = 4.0  # sigmas; the weights beyond add less than 0.02 of 255
GRAY_R, GRAY_G, GRAY_B = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # torchvision's rgb_to_grayscale
ZERO, HALF, ONE, FOUR, SIX, TOP = (np.float32(value) for value in (0, 0.5, 1, 4, 6, 255))
HUE_TO_BYTE = np.float32(255.999 / 255)  # torchvision turns 0..1 into bytes by truncating 255.999 times it


_compiled = cached_jit(nogil=True, fastmath={"contract", "nsz", "nnan", "ninf"}, error_model="numpy")


@_compiled
def transform_images(
    images, jitter, order, factors, gray, sigma, blur_radius, solarize, threshold, flip, scale, offset, out
):
    """Transform uint8 ``images [n, 3, h, w]`` into float32 ``out [n, h, w, 3]``.

    ``jitter``, ``gray``, ``solarize``, ``flip``: bool ``[n]``; ``order``: int8 ``[n, 4]``; ``factors``: float32
    ``[n, 4]``; ``sigma``: float32 ``[n]``; as in ViewParams. ``out = byte * scale + offset``, per channel.
    """
    count, _, height, width = images.shape
    planes = np.empty((3, height * width), dtype=np.uint8)
    rows = np.empty((height, width), dtype=np.float32)
    for index in range(count):
        planes[:] = images[index].reshape(3, height * width)
        if jitter[index]:
            for operation in order[index]:
                factor = factors[index, operation]
                if operation == 0:
                    _brightness(planes, factor)
                elif operation == 1:
                    _contrast(planes, factor)
                elif operation == 2:
                    _saturation(planes, factor)
                else:
                    _hue(planes, factor)
        if gray[index]:
            _grayscale(planes)
        if sigma[index] > 0:
            radius = min(blur_radius, math.ceil(BLUR_REACH * sigma[index]))
            for channel in range(3):
                _blur(planes[channel].reshape(height, width), sigma[index], radius, rows)
        if solarize[index]:
            _solarize(planes, threshold)
        for channel in range(3):
            _normalise(
                planes[channel].reshape(height, width),
                flip[index],
                scale[channel],
                offset[channel],
                out[index, :, :, channel],
            )


@_compiled
def _byte(value):
    return np.uint8(np.int32(min(max(value, ZERO), TOP)))


@_compiled
def _luma(planes, pixel):
    """Gray value of one pixel, a whole number."""
    red, green, blue = np.float32(planes[0, pixel]), np.float32(planes[1, pixel]), np.float32(planes[2, pixel])
    return np.float32(np.int32(red * GRAY_R + green * GRAY_G + blue * GRAY_B))


@_compiled
def _brightness(planes, factor):
    for channel in range(3):
        plane = planes[channel]
        for pixel in range(plane.size):
            plane[pixel] = _byte(np.float32(plane[pixel]) * factor)


@_compiled
def _contrast(planes, factor):
    total = 0
    for pixel in range(planes.shape[1]):
        total += np.int32(_luma(planes, pixel))
    shift = np.float32(total / planes.shape[1]) * (ONE - factor)
    for channel in range(3):
        plane = planes[channel]
        for pixel in range(plane.size):
            plane[pixel] = _byte(np.float32(plane[pixel]) * factor + shift)


@_compiled
def _saturation(planes, factor):
    for pixel in range(planes.shape[1]):
        shift = _luma(planes, pixel) * (ONE - factor)
        planes[0, pixel] = _byte(np.float32(planes[0, pixel]) * factor + shift)
        planes[1, pixel] = _byte(np.float32(planes[1, pixel]) * factor + shift)
        planes[2, pixel] = _byte(np.float32(planes[2, pixel]) * factor + shift)


@_compiled
def _hue(planes, turns):
    """Turn the hue in HSV, the colour circle counted in sixths."""
    shift = SIX * turns
    for pixel in range(planes.shape[1]):
        red, green, blue = np.float32(planes[0, pixel]), np.float32(planes[1, pixel]), np.float32(planes[2, pixel])
        value = max(red, green, blue)
        chroma = value - min(red, green, blue)
        inverse = ONE / (chroma if chroma > ZERO else ONE)
        from_red = (green - blue) * inverse
        from_green = (blue - red) * inverse + np.float32(2)
        from_blue = (red - green) * inverse + FOUR
        sixths = (from_red if value == red else (from_green if value == green else from_blue)) + shift
        sixths = sixths + SIX if sixths < ZERO else sixths
        sixths = sixths - SIX if sixths >= SIX else sixths
        planes[0, pixel] = _hue_channel(np.float32(5) + sixths, value, chroma)
        planes[1, pixel] = _hue_channel(np.float32(3) + sixths, value, chroma)
        planes[2, pixel] = _hue_channel(np.float32(1) + sixths, value, chroma)


@_compiled
def _hue_channel(sixths, value, chroma):
    """One channel of HSV to RGB: value less chroma times a trapezium over the colour circle."""
    sixths = sixths - SIX if sixths >= SIX else sixths
    return _byte((value - chroma * max(ZERO, min(sixths, FOUR - sixths, ONE))) * HUE_TO_BYTE)


@_compiled
def _grayscale(planes):
    for pixel in range(planes.shape[1]):
        luma = _byte(_luma(planes, pixel))
        planes[0, pixel] = luma
        planes[1, pixel] = luma
        planes[2, pixel] = luma


@_compiled
def _solarize(planes, threshold):
    for channel in range(3):
        plane = planes[channel]
        for pixel in range(plane.size):
            plane[pixel] = plane[pixel] if plane[pixel] < threshold else np.uint8(255 - plane[pixel])


@_compiled
def _blur(plane, sigma, radius, rows):
    """Gaussian blur of one channel in place, border reflected; ``rows`` is scratch of the plane's shape."""
    height, width = plane.shape
    weights = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    weights = (weights / (2 * weights.sum() - weights[0])).astype(np.float32)
    padded = np.empty(width + 2 * radius, dtype=np.float32)
    middle = padded[radius : radius + width]
    for y in range(height):
        line, row = plane[y], rows[y]
        for x in range(width):
            middle[x] = np.float32(line[x])
        for x in range(1, radius + 1):
            padded[radius - x] = padded[radius + x]
            padded[radius + width - 1 + x] = padded[radius + width - 1 - x]
        for x in range(width):
            row[x] = middle[x] * weights[0]
        for tap in range(1, radius + 1):
            # Slices, for an index that might be negative as far as the compiler knows keeps it from vector code.
            _add_pair(row, weights[tap], padded[radius - tap :][:width], padded[radius + tap :][:width])
    summed = np.empty(width, dtype=np.float32)
    for y in range(height):
        line, row = plane[y], rows[y]
        for x in range(width):
            summed[x] = row[x] * weights[0]
        for tap in range(1, radius + 1):
            _add_pair(summed, weights[tap], rows[abs(y - tap)], rows[height - 1 - abs(height - 1 - y - tap)])
        for x in range(width):
            line[x] = np.uint8(np.int32(summed[x] + HALF))


@_compiled
def _add_pair(row, weight, one, other):
    for x in range(row.size):
        row[x] += weight * (one[x] + other[x])


@_compiled
def _normalise(plane, flip, scale, offset, out):
    height, width = plane.shape
    for y in range(height):
        if flip:
            for x in range(width):
                out[y, x] = np.float32(plane[y, width - 1 - x]) * scale + offset
        else:
            for x in range(width):
                out[y, x] = np.float32(plane[y, x]) * scale + offset
