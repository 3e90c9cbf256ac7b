"""Check one encoded image: can every back end decode it, and how large is it?

Used by sharding and by check_shards before an image becomes a sample. PIL decodes, because it is strict: a truncated
file fails, while a region decode on a GPU may succeed. Formats and variants that DALI does not read are refused, so
that an accepted image cannot stop a batch during training. What this file cannot tell by itself, whether the other
back ends see the same pixels, pipeline/sharding/prepare_image.py finds out for images that are not ``plain``.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.common.png import without_text
from pipeline.sources.file_kinds import JpegFrame, describe_unknown, jpeg_header
from pipeline.sources.plain_png import is_plain_png, lacks_rows
from pipeline.sources.sixteen_bit import SixteenBitError, SixteenBitRule, eight_bits, is_deep, read_deep

Verify = Literal["full", "header", "none"]
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tiff", "PPM": "ppm"}
_JPEG_SUFFIXES = {"jpg", "jpeg", "jpe", "jfif", "pjpeg", "pjp"}
IMAGE_SUFFIXES = frozenset(_JPEG_SUFFIXES | {"png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"})
_TIFF_COMPRESSIONS = frozenset(
    [
        "raw",
        "tiff_lzw",
        "tiff_deflate",
        "tiff_adobe_deflate",
        "packbits",
        "jpeg",
        "group3",
        "group4",
        "zstd",
    ]  # not lzma, webp, ...
)
_TIFF_MODES = frozenset({"RGB", "L", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B"})
_PLAIN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive
_DCT_FRAMES = _PLAIN_FRAMES | {0xC9, 0xCA}  # with arithmetic coding; not lossless, which has no DCT to be scaled
MAX_SIDE = 65535  # samples.npy keeps height and width as uint16
MAX_SCANS = 100  # of a JPEG; progressive encoders write about 10
MAX_PASSES = 20  # scans x pixels of a JPEG, in images of --max-pixels; 100 million pixels a scan take about 0.15 s
PIXELS_PER_BYTE = 8192  # of a JPEG: at least 1 bit for each block of an MCU, whose side is 32 pixels at most
# PIL's own limit warns at 89 million pixels and fails at twice that; --max-pixels is checked before decoding.
Image.MAX_IMAGE_PIXELS = None


class BadImageError(Exception):
    """An image is refused; the message is the reason for rejected.jsonl."""


@dataclass(frozen=True)
class ImageInfo:
    """Format and size of one accepted image, as stored: EXIF orientation is ignored."""

    extension: str  # of the content, without a dot: a PNG named .jpg is "png"
    height: int  # pixels
    width: int  # pixels
    plain: bool = False  # every back end is known to decode it alike; only ``full`` finds out
    deep: bool = False  # more than 8 bits a sample
    fault: str | None = None  # why DALI does not read this variant, where that is known without decoding


def inspect_image(data: bytes, verify: Verify, max_pixels: int, *, variants: bool = False) -> ImageInfo:
    """Check encoded bytes. ``full`` decodes the image; ``header`` and ``none`` read the header only.

    ``variants``: do not refuse variants of a format that DALI does not read, but name the reason in ``fault``.
    Raises BadImageError with the reason: not an image, a format DALI cannot decode, too large, truncated, ...
    """
    image, frame = _open(data, max_pixels)
    fault = _variant_fault(image, data)
    if fault is not None and not variants:
        raise BadImageError(fault)
    inspected = ImageInfo(EXTENSIONS[_format(image)], image.height, image.width, deep=is_deep(image, data), fault=fault)
    return replace(inspected, plain=_verify(image, frame, data)) if verify == "full" else inspected


def _verify(image: Image.Image, frame: JpegFrame | None, data: bytes) -> bool:
    """Decode the image to its end; returns whether it is plain. Raises BadImageError."""
    if image.format == "PNG":
        if is_plain_png(data):
            return True
        if lacks_rows(data):
            raise BadImageError("truncated")
    if frame is not None and frame.marker in _DCT_FRAMES:
        # A JPEG is decoded at an eighth of its size: all entropy codes are read, and the skipped IDCT cannot fail.
        image.draft(None, (1, 1))
    _decode(image)
    return frame is not None and frame.marker in _PLAIN_FRAMES and frame.components in (1, 3)


def shrink_image(data: bytes, shorter_side: int, quality: int, max_pixels: int) -> bytes | None:
    """JPEG bytes with the shorter side resized to ``shorter_side`` pixels; None if it is not larger than that.

    Raises BadImageError if the image cannot be decoded.
    """
    image, frame = _open(data, max_pixels)
    short = min(image.size)
    if short <= shorter_side:
        return None
    width, height = (max(1, round(side * shorter_side / short)) for side in image.size)
    if frame is not None and frame.marker in _DCT_FRAMES:
        image.draft(None, (2 * width, 2 * height))  # DCT scaling stays at twice the target: no visible loss
    pixels = _decode(image)
    out = io.BytesIO()
    pixels.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0).save(out, "JPEG", quality=quality)
    return out.getvalue()


def lossless_image(data: bytes, max_pixels: int) -> bytes:
    """A PNG of 8 bits, gray or RGB, with the pixels that PIL decodes. Raises BadImageError."""
    return _png(_decode(_open(data, max_pixels)[0]))


def eight_bit_image(data: bytes, max_pixels: int, rule: SixteenBitRule, window: tuple[int, int] | None) -> bytes:
    """A PNG of 8 bits, gray or RGB, for an image that is ``deep``. Raises BadImageError, also where the rule does."""
    _open(data, max_pixels)
    try:
        return _png(Image.fromarray(eight_bits(read_deep(data), rule, window)))
    except SixteenBitError as error:
        raise BadImageError(str(error)) from None
    except Exception as error:  # noqa: BLE001 a decoder may raise anything on hostile bytes
        raise BadImageError(_reason(error, "cannot be decoded")) from None


def gray_values(data: bytes, max_pixels: int) -> UInt8[np.ndarray, "h w"] | UInt16[np.ndarray, "h w"]:
    """The values of a gray image of 8 or 16 bits, unchanged. Raises BadImageError for one with colours."""
    image, _ = _open(data, max_pixels)
    if is_deep(image, data):
        try:
            values = read_deep(data).values
        except Exception as error:  # noqa: BLE001 a decoder may raise anything on hostile bytes
            raise BadImageError(_reason(error, "cannot be decoded")) from None
    elif image.mode in ("L", "1"):
        values = np.asarray(_decode(image).convert("L"))
    else:
        raise BadImageError(f"{image.mode} pixels, not those of one channel")
    if values.ndim != 2:
        raise BadImageError(f"{values.shape[2]} channels, not one")
    return values


def gray_thumbnail(data: bytes, width: int, height: int, max_pixels: int) -> UInt8[np.ndarray, "h w"]:
    """The whole image in gray, shrunk to ``width`` x ``height`` pixels by their means; a deep image by its own range.

    Raises BadImageError if the image cannot be decoded.
    """
    image, frame = _open(data, max_pixels)
    if is_deep(image, data):
        image = Image.open(io.BytesIO(eight_bit_image(data, max_pixels, "min-max", None)))
    elif frame is not None and frame.marker in _DCT_FRAMES:
        image.draft("L", (4 * width, 4 * height))
    return np.asarray(_decode(image).convert("L").resize((width, height), Image.Resampling.BOX))


def _png(pixels: Image.Image) -> bytes:
    out = io.BytesIO()
    pixels.info.clear()  # a transparency left over from the source makes PIL's writer fail, and only pixels count
    pixels.save(out, "PNG")
    return out.getvalue()


def _open(data: bytes, max_pixels: int) -> tuple[Image.Image, JpegFrame | None]:
    """An image whose header was read and checked, and the frame header of a JPEG."""
    if not data:
        raise BadImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about odd metadata do not refuse an image
            image = Image.open(io.BytesIO(without_text(data)), formats=tuple(EXTENSIONS))
    except Image.UnidentifiedImageError:
        raise BadImageError(describe_unknown(data)) from None
    except Exception as error:  # noqa: BLE001 a parser may raise anything on hostile bytes
        raise BadImageError(_reason(error, "damaged header")) from None
    if image.width * image.height > max_pixels:
        raise BadImageError(f"larger than --max-pixels {max_pixels}")
    if max(image.size) > MAX_SIDE:
        raise BadImageError(f"a side longer than {MAX_SIDE} pixels")
    frame = None
    if _format(image) == "JPEG":
        frame, fault = jpeg_header(data)
        if fault is not None:
            raise BadImageError(fault)
        _check_bounds(image, data, frame, max_pixels)
    if image.format == "PNG" and data[12:16] == b"CgBI":
        raise BadImageError("PNG as Xcode writes it for iPhones (CgBI) is not supported")
    if image.format == "PNG" and b"IEND" not in data:
        raise BadImageError("truncated")
    if image.format == "PPM" and image.mode == "F":
        raise BadImageError("PPM with floating-point pixels is not supported")
    if image.format == "TIFF" and image.mode in ("F", "I"):  # no rule maps such values to 8 bits
        raise BadImageError(f"TIFF with {image.mode} pixels is not supported")
    return image, frame


def _variant_fault(image: Image.Image, data: bytes) -> str | None:
    """Why DALI 2.4 does not read a variant that PIL reads, or not alike (measured); None for all others."""
    if image.format == "WEBP" and "exif" in image.info and b"VP8L" in data:
        return "lossless WebP with EXIF is not supported"
    if isinstance(image, TiffImageFile):
        compression = image.info.get("compression", "raw")
        if image.tag_v2.get(Base.Orientation, 1) != 1:
            return "TIFF with an orientation tag is not supported"  # PIL turns it, DALI does not
        if compression not in _TIFF_COMPRESSIONS:
            return f"TIFF with {compression} compression is not supported"
        if image.mode not in _TIFF_MODES and not (image.mode == "1" and compression in ("group3", "group4")):
            return f"TIFF with {image.mode} pixels is not supported"
    return None


def _check_bounds(image: Image.Image, data: bytes, frame: JpegFrame | None, max_pixels: int) -> None:
    """Refuse a JPEG that takes unreasonably long to decode for its size."""
    pixels = image.width * image.height
    if frame is not None and frame.has_one_scan:
        scans = 1  # counting takes as long as all other checks of the header together
    else:
        scans = data.count(b"\xff\xda")  # inside a scan 0xff is followed by 0 or a restart marker, so these are scans
    if scans > MAX_SCANS or scans * pixels > MAX_PASSES * max_pixels:
        raise BadImageError("JPEG with too many scans: decoding takes a pass over all pixels for each")
    if len(data) * PIXELS_PER_BYTE < pixels and frame is not None and frame.marker in _PLAIN_FRAMES:
        raise BadImageError("truncated: far too few bytes for the pixels that its header announces")


def _decode(image: Image.Image) -> Image.Image:
    """Decode all pixels to RGB, as torchvision's loaders do, or to L for a gray image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return image if image.mode in ("RGB", "L") else image.convert("RGB")
    except Exception as error:  # noqa: BLE001 a decoder may raise anything on hostile bytes
        raise BadImageError(_reason(error, "cannot be decoded")) from None


def _format(image: Image.Image) -> str:
    return "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG followed by further frames


def _reason(error: Exception, what: str) -> str:
    if "truncated" in str(error).lower():
        return "truncated"  # PIL's message contains a byte count; the summary groups by reason
    return f"{what}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__
