"""Random images in all formats, modes and variants that PIL writes, and in some that only other programs write."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.helpers.photos import smooth_pixels

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
TIFF_COMPRESSIONS = (
    None, "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "packbits", "jpeg", "group3", "group4", "lzma", "zstd",
    "webp", "tiff_ccitt",
)  # fmt: skip


def pixels_of(mode: str, seed: int, height: int, width: int) -> Image.Image:
    """A random image of one of PIL's modes, whose values span the mode's range."""
    photo = Image.fromarray(smooth_pixels(seed, height, width))
    match mode:
        case "I;16":
            wide = smooth_pixels(seed, height, width, 1)[..., 0].astype(np.uint16) * 257
            return Image.fromarray(wide)
        case "I":
            return Image.fromarray(smooth_pixels(seed, height, width, 1)[..., 0].astype(np.int32) * 257)
        case "RGBA" | "RGBa" | "LA" | "PA":
            alpha = smooth_pixels(seed + 1, height, width, 1)[..., 0]
            rgba = Image.fromarray(np.dstack([np.asarray(photo), alpha]))
            return rgba if mode == "RGBA" else rgba.convert("RGBa" if mode == "RGBa" else "LA").convert(mode)
        case "LAB":
            from PIL import ImageCms

            return ImageCms.profileToProfile(
                photo, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
            )
        case "P":
            return photo.quantize(1 + seed % 256)
        case "HSV" | "YCbCr" | "CMYK" | "RGBX" | "F" | "L" | "1" | "RGB":
            return photo.convert(mode)
        case _:
            raise AssertionError(mode)


def options_of(encoding: str, rng: random.Random) -> dict[str, object]:
    """Random options of one of PIL's encoders."""
    match encoding:
        case "JPEG" | "MPO":
            return {
                "quality": rng.randint(5, 100),
                "progressive": rng.random() < 0.3,
                "optimize": rng.random() < 0.3,
                "subsampling": rng.choice([0, 1, 2]),
                "restart_marker_blocks": rng.choice([0, 0, 1, 7]),
                "keep_rgb": rng.random() < 0.2,
            }
        case "PNG":
            return {
                "optimize": rng.random() < 0.3,
                "compress_level": rng.randint(0, 9),
                **({"bits": rng.choice([1, 2, 4, 8])} if rng.random() < 0.3 else {}),
                **({"transparency": rng.randint(0, 255)} if rng.random() < 0.1 else {}),
            }
        case "WEBP":
            return {
                "lossless": rng.random() < 0.4,
                "quality": rng.randint(1, 100),
                "method": rng.randint(0, 4),
                "exact": rng.random() < 0.3,
                "alpha_quality": rng.choice([10, 100]),
            }
        case "TIFF":
            return {
                "compression": rng.choice(TIFF_COMPRESSIONS),
                "big_tiff": rng.random() < 0.1,
                **({"strip_size": rng.choice([1, 1000, 1 << 20])} if rng.random() < 0.3 else {}),
            }
        case _:
            return {}


def random_image(rng: random.Random, only: str | None = None) -> tuple[str, bytes]:
    """(what it is, its bytes): an image of a random format, or ``only`` one, mode and size, with random options."""
    Image.init()
    encodings = sorted(set(Image.SAVE) - {"PDF", "BUFR", "GRIB", "HDF5", "WMF", "EPS", "AVIF"})
    while True:
        common = rng.choices(["PNG", "TIFF", "WEBP", "BMP", "PPM", "JPEG", None], [5, 7, 3, 3, 3, 2, 2])[0]
        encoding = only or common or rng.choice(encodings)
        mode = rng.choice(MODES)
        height, width = rng.randint(1, 40), rng.randint(1, 40)
        options = options_of(encoding, rng)
        out = io.BytesIO()
        try:
            pixels_of(mode, rng.randrange(1000), height, width).save(out, encoding, **options)
        except (OSError, ValueError, TypeError, KeyError, SystemError, RuntimeError, struct.error):
            continue  # PIL does not write this mode in this format
        return f"{encoding} {mode} {height} x {width} {options}", out.getvalue()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """``data`` with bytes changed, removed, inserted or cut off somewhere."""
    at, length = rng.randrange(len(data)), rng.randrange(1, 40)
    match rng.randrange(5):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        case 3:
            return data[:at] + rng.randbytes(length) + data[at + length :]
        case _:
            return data[:at] + rng.randbytes(length) + data[at:]


def png(
    rows: list[bytes], width: int, bits: int, colour: int, *, before: bytes = b"", stream: Callable = zlib.compress
) -> bytes:
    """A PNG of rows that begin with their filter; ``before``: chunks before the pixels; ``stream`` compresses."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + before + chunk(b"IDAT", stream(b"".join(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
