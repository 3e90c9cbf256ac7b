"""Decide on one image of a source: keep its bytes, re-encode it, or refuse it.

Every back end must see the same pixels. An image is kept if its format guarantees that, or if all installed back ends
decode it alike; images of more than 8 bits a sample become 8-bit PNGs by the rule of --sixteen-bit; with --reencode the
others become PNGs of the pixels that PIL decodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.sharding.decode_service import Decoders
from pipeline.sharding.options import ShardingOptions
from pipeline.sources.channels import ChannelSums, read_channels, stored_channels
from pipeline.sources.image_file import (
    BadImageError,
    ImageInfo,
    Verify,
    eight_bit_image,
    inspect_image,
    lossless_image,
    shrink_image,
)


@dataclass(frozen=True)
class PreparedImage:
    """An image as it will be written."""

    data: bytes
    extension: str
    height: int  # pixels
    width: int  # pixels
    change: str | None  # how and why it was re-encoded without --shorter-side, for reencoded.jsonl
    sums: ChannelSums | None = None  # of --channels


def prepare_image(data: bytes, options: ShardingOptions, decoders: Decoders | None) -> PreparedImage:
    """The image to write for encoded bytes of the source. Raises BadImageError with the reason."""
    if options.channels is not None:
        return _prepare_channels(data, options, options.channels)
    original, change = data, None
    image = inspect_image(data, options.verify, options.max_pixels, variants=True)
    if image.deep:
        data = eight_bit_image(data, options.max_pixels, options.sixteen_bit, options.sixteen_bit_window)
        change = f"8 bits of more, {options.sixteen_bit_text()}"
    elif (fault := find_fault(data, image, options.verify, decoders)) is not None:
        if not options.reencode:
            raise BadImageError(f"{fault}; --reencode stores the pixels that PIL decodes")
        data = lossless_image(data, options.max_pixels)
        change = fault
    if options.shorter_side is not None:
        data = shrink_image(data, options.shorter_side, options.jpeg_quality, options.max_pixels) or data
    if data is not original:
        image = inspect_image(data, "none", options.max_pixels)
    return PreparedImage(data, image.extension, image.height, image.width, change)


def _prepare_channels(data: bytes, options: ShardingOptions, channels: int) -> PreparedImage:
    values = read_channels(data, channels, options.max_pixels)
    deep = values.dtype == np.uint16
    stored, values = stored_channels(values, options.sixteen_bit, options.sixteen_bit_window)
    changed = deep and values.dtype == np.uint8
    change = f"8 bits of more, {options.sixteen_bit_text()}" if changed else None
    height, width, _ = values.shape
    return PreparedImage(stored, "npy", height, width, change, ChannelSums.of(values))


def inspect_in_place(data: bytes, options: ShardingOptions, decoders: Decoders | None) -> ImageInfo:
    """Inspect an image whose bytes stay where they are. Raises BadImageError with the reason to leave it out."""
    image = inspect_image(data, options.verify, options.max_pixels)
    if image.deep:  # back ends scale it by the full range: is that what the rule allows?
        eight_bit_image(data, options.max_pixels, options.sixteen_bit, None)
    if (fault := find_fault(data, image, options.verify, decoders)) is not None:
        raise BadImageError(fault)
    return image


def find_fault(data: bytes, image: ImageInfo, verify: Verify, decoders: Decoders | None) -> str | None:
    """Why an inspected image cannot be used on every back end; None if it can. Only ``full`` decodes to find out."""
    if image.fault is not None or image.plain or verify != "full" or decoders is None:
        return image.fault
    return decoders.fault(data)
