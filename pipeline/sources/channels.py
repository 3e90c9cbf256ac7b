"""Images of ``--channels N``: read from .npy, from TIFF with several bands, or for N = 1 from any gray image of PIL's.

They are stored as .npy (pipeline/common/arrays.py), at 16 bits if they have more than 8; a rule of --sixteen-bit other
than auto maps them to 8 bits first, as medical images need it: window LO HI.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.arrays import array_shape, is_array, read_array, write_array
from pipeline.common.errors import UserError
from pipeline.sources.image_file import MAX_SIDE, BadImageError, ImageInfo, gray_values
from pipeline.sources.sixteen_bit import DeepPixels, SixteenBitError, SixteenBitRule, eight_bits

TOP = 65535  # the unit of the sums: a byte counts 257 times
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ChannelValues = NDArray[np.uint8] | NDArray[np.uint16]  # [h, w, channels]


@dataclass
class ChannelSums:
    """Sums of the values of each channel over all pixels, in whole numbers: they do not depend on the order."""

    pixels: int
    sums: list[int]
    squares: list[int]

    @classmethod
    def of(cls, values: ChannelValues) -> ChannelSums:
        """The sums of one image."""
        wide = values.reshape(-1, values.shape[2]).astype(np.uint64)
        if values.dtype == np.uint8:
            wide *= np.uint64(TOP // 255)
        return cls(len(wide), wide.sum(axis=0).tolist(), (wide * wide).sum(axis=0).tolist())

    def add(self, other: ChannelSums) -> None:
        """Count the pixels of ``other`` as well."""
        self.pixels += other.pixels
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares, other.squares, strict=True)]

    def about(self) -> dict[str, Any]:
        """``pixels`` of dataset.json: channels, and mean and std of each, of 1. A constant channel gets the std 1."""
        means = [Fraction(total, self.pixels) for total in self.sums]
        variances = [Fraction(square, self.pixels) - mean**2 for square, mean in zip(self.squares, means, strict=True)]
        return {
            "channels": len(means),
            "mean": [round(float(mean / TOP), 8) for mean in means],
            "std": [round(float(variance / TOP**2) ** 0.5, 8) or 1.0 for variance in variances],
        }


def read_channels(data: bytes, channels: int, max_pixels: int) -> ChannelValues:
    """The values of an image, ``[h, w, channels]``. Raises BadImageError for one with other channels.

    Raises UserError for a TIFF with several bands where tifffile is not installed.
    """
    if is_array(data):
        inspect_channels(data, None, max_pixels)
        values = read_array(data)
    elif channels == 1:
        values = gray_values(data, max_pixels)[..., None]
    elif data.startswith(_TIFF):
        values = _read_bands(data, max_pixels)
    else:
        raise BadImageError(f"not an image of {channels} channels: neither .npy nor TIFF")
    _check_count(values.shape[2], channels)
    return values


def _check_count(found: int, channels: int) -> None:
    if found != channels:
        raise BadImageError(f"{found} channels instead of --channels {channels}")


def inspect_channels(data: bytes, channels: int | None, max_pixels: int) -> ImageInfo:
    """Check a .npy image, whose bytes are all of it. Raises BadImageError. ``channels`` None: any number of them."""
    try:
        (height, width, found), *_ = array_shape(data)
    except ValueError as error:
        raise BadImageError(str(error)) from None
    if height * width > max_pixels:
        raise BadImageError(f"larger than --max-pixels {max_pixels}")
    if max(height, width) > MAX_SIDE:
        raise BadImageError(f"a side longer than {MAX_SIDE} pixels")
    if channels is not None:
        _check_count(found, channels)
    return ImageInfo("npy", height, width, plain=True)


def stored_channels(
    values: ChannelValues, rule: SixteenBitRule, window: tuple[int, int] | None
) -> tuple[bytes, ChannelValues]:
    """(the .npy file to store, its values). Raises BadImageError where the rule refuses the image."""
    if values.dtype == np.uint16 and rule != "auto":
        try:
            values = eight_bits(DeepPixels(values.astype(np.uint16, copy=False), TOP), rule, window)
        except SixteenBitError as error:
            raise BadImageError(str(error)) from None
    return write_array(values), values


def _read_bands(data: bytes, max_pixels: int) -> ChannelValues:
    try:
        import tifffile
    except ImportError:
        raise UserError(
            "--channels: TIFF with several bands is read by tifffile, which is not installed: pip install "
            "'siamstream[tiff]', or store the images as .npy"
        ) from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            series = file.series[0]
            axes, shape = series.axes, series.shape
            if len(shape) != 3 or "YX" not in (axes[:2], axes[1:]):
                raise BadImageError(f"TIFF of the axes {axes} and the shape {shape} is not supported")
            first = axes[1:] == "YX"  # bands or pages before rows
            rows, columns = shape[1:] if first else shape[:2]
            if rows * columns > max_pixels:
                raise BadImageError(f"larger than --max-pixels {max_pixels}")
            if max(rows, columns) > MAX_SIDE:
                raise BadImageError(f"a side longer than {MAX_SIDE} pixels")
            if series.dtype not in (np.uint8, np.uint16):
                raise BadImageError(f"TIFF of {series.dtype}: an image has uint8 or uint16")
            values = series.asarray()
    except BadImageError:
        raise
    except Exception as error:  # noqa: BLE001 a decoder may raise anything on hostile bytes
        raise BadImageError(f"cannot be decoded: {(str(error).splitlines() or [repr(error)])[0][:200]}") from None
    return np.ascontiguousarray(values.transpose(1, 2, 0) if first else values)
