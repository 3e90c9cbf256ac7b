"""Decide on one image of a source: keep its bytes, re-encode it, or refuse it.

Every back end must see the same pixels. An image is kept if its format guarantees that, or if all installed back ends
decode it alike; images of more than 8 bits a sample become 8-bit PNGs by the rule of --sixteen-bit; with --reencode the
others become PNGs of the pixels that PIL decodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.sharding.decode_service import Decoders
from pipeline.sharding.options import ShardingOptions
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


def prepare_image(data: bytes, options: ShardingOptions, decoders: Decoders | None) -> PreparedImage:
    """The image to write for encoded bytes of the source. Raises BadImageError with the reason."""
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
