"""Check one encoded image: can every back end decode it, and how large is it?

Used by sharding and by check_shards before an image becomes a sample. PIL decodes, because it is strict: a truncated
file fails, while a region decode on a GPU may succeed. Formats and variants that DALI does not read are refused, so
that an accepted image cannot stop a batch during training.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

from PIL import Image
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.common.png import without_text
from pipeline.sources.file_kinds import SEGMENT, describe_unknown, jpeg_frame

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
_TIFF_MODES = frozenset({"RGB", "L", "P", "RGBA", "CMYK", "YCbCr", "I;16"})
MAX_SIDE = 65535  # samples.npy keeps height and width as uint16
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


def inspect_image(data: bytes, verify: Verify, max_pixels: int) -> ImageInfo:
    """Check encoded bytes. ``full`` decodes the image; ``header`` and ``none`` read the header only.

    Raises BadImageError with the reason: not an image, a format DALI cannot decode, too large, truncated, ...
    """
    image = _open(data, max_pixels)
    inspected = ImageInfo(EXTENSIONS[_format(image)], image.height, image.width)
    if verify == "full":
        # A JPEG is decoded at an eighth of its size: all entropy codes are read, and the skipped IDCT cannot fail.
        if not _is_lossless_jpeg(image, data):  # it has no DCT to be scaled
            image.draft(None, (1, 1))
        _decode(image)
    return inspected


def shrink_image(data: bytes, shorter_side: int, quality: int, max_pixels: int) -> bytes | None:
    """JPEG bytes with the shorter side resized to ``shorter_side`` pixels; None if it is not larger than that.

    Raises BadImageError if the image cannot be decoded.
    """
    image = _open(data, max_pixels)
    short = min(image.size)
    if short <= shorter_side:
        return None
    width, height = (max(1, round(side * shorter_side / short)) for side in image.size)
    if not _is_lossless_jpeg(image, data):
        image.draft(None, (2 * width, 2 * height))  # DCT scaling stays at twice the target: no visible loss
    pixels = _decode(image)
    out = io.BytesIO()
    pixels.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0).save(out, "JPEG", quality=quality)
    return out.getvalue()


def _open(data: bytes, max_pixels: int) -> Image.Image:
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
    _check_variant(image, data)
    return image


def _check_variant(image: Image.Image, data: bytes) -> None:
    """Refuse the variants that PIL reads but DALI 2.4 does not, or not alike (measured)."""
    if _format(image) == "JPEG":
        _check_segments(data)
    if image.format == "PNG" and b"IEND" not in data:
        raise BadImageError("truncated")
    if image.format == "WEBP" and "exif" in image.info and b"VP8L" in data:
        raise BadImageError("lossless WebP with EXIF is not supported")
    if isinstance(image, TiffImageFile) and image.tag_v2.get(Base.Orientation, 1) != 1:
        raise BadImageError("TIFF with an orientation tag is not supported")  # PIL turns it, DALI does not
    if image.format == "PPM" and image.mode == "F":
        raise BadImageError("PPM with floating-point pixels is not supported")
    if image.format == "TIFF":
        compression = image.info.get("compression", "raw")
        if compression not in _TIFF_COMPRESSIONS:
            raise BadImageError(f"TIFF with {compression} compression is not supported")
        if image.mode not in _TIFF_MODES and not (image.mode == "1" and compression in ("group3", "group4")):
            raise BadImageError(f"TIFF with {image.mode} pixels is not supported")


def _check_segments(data: bytes) -> None:
    """Refuse a JPEG unless each segment up to the scan begins where the one before ends (ITU-T T.81, B.1.1).

    DALI requires it; PIL skips unknown bytes. tests/test_hostile_input.py compares with DALI's decoder.
    """
    at = 2  # after the start-of-image marker
    while at < len(data):
        segment = SEGMENT.match(data, at)
        if segment is not None and segment["marker"] == b"\xda":
            return
        length = 0 if segment is None else int.from_bytes(segment["length"], "big")
        if segment is None or length < 2:  # the length includes its own two bytes
            raise BadImageError("damaged header: its JPEG segments do not follow each other")
        at = segment.start("length") + length
    raise BadImageError("truncated")


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


def _is_lossless_jpeg(image: Image.Image, data: bytes) -> bool:
    frame = jpeg_frame(data) if _format(image) == "JPEG" else None
    return frame is not None and frame.marker == 0xC3


def _reason(error: Exception, what: str) -> str:
    if "truncated" in str(error).lower():
        return "truncated"  # PIL's message contains a byte count; the summary groups by reason
    return f"{what}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()
    return text[0][:200] if text else type(error).__name__
