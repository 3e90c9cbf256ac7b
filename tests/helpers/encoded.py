"""Encoded images of every kind that a dataset may hold, good and bad, and batches made of them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from pipeline.backends.base import Batch
from pipeline.sampling.views import CentreCrops, ViewParams, ViewRecipe, centre_crops, draw_views
from tests.helpers.photos import image_bytes, smooth_pixels

ORIENTATION, MODEL = 0x112, 0x110  # tags of EXIF
HEIGHT, WIDTH = 48, 64  # of all images here


def encode(image: Image.Image, encoding: str, **save: object) -> bytes:
    """An image's bytes in one of PIL's encodings."""
    out = io.BytesIO()
    image.save(out, encoding, **save)
    return out.getvalue()


def exif(tag: int, value: object) -> Image.Exif:
    """EXIF data of one tag."""
    made = Image.Exif()
    made[tag] = value
    return made


def gray16() -> np.ndarray:
    """uint16 ``[h, w]`` whose low bytes matter."""
    high = smooth_pixels(5, HEIGHT, WIDTH)[..., 0].astype(np.uint16) << 8
    return high + np.random.default_rng(5).integers(0, 256, high.shape).astype(np.uint16)


def png16() -> bytes:
    """A PNG of three 16-bit channels, which PIL reads but cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = np.stack([gray16(), gray16()[::-1], gray16()[:, ::-1]], -1).astype(">u2")
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def good_images() -> dict[str, bytes]:
    """Images that both PIL and DALI decode."""
    photo = Image.fromarray(smooth_pixels(1, HEIGHT, WIDTH))
    alpha = Image.fromarray(np.concatenate([photo, smooth_pixels(2, HEIGHT, WIDTH)[..., :1]], -1))
    second = [Image.fromarray(smooth_pixels(3, HEIGHT, WIDTH)) for _ in range(2)]  # PIL marks them
    return {
        "JPEG": encode(photo, "JPEG"),
        "gray JPEG": encode(photo.convert("L"), "JPEG"),
        "CMYK JPEG": encode(photo.convert("CMYK"), "JPEG"),
        "progressive JPEG": encode(photo, "JPEG", progressive=True),
        "JPEG of full chroma": encode(photo, "JPEG", subsampling=0),
        "JPEG that EXIF rotates": encode(photo, "JPEG", exif=exif(ORIENTATION, 6)),
        "JPEG with a second image": encode(photo, "MPO", save_all=True, append_images=second[:1]),
        "PNG": encode(photo, "PNG"),
        "gray PNG": encode(photo.convert("L"), "PNG"),
        "PNG with alpha": encode(alpha, "PNG"),
        "gray PNG with alpha": encode(alpha.convert("LA"), "PNG"),
        "PNG with a palette": encode(photo.quantize(64), "PNG"),
        "PNG with a clear colour": encode(photo.quantize(64), "PNG", transparency=3),
        "PNG of one bit": encode(photo.convert("1"), "PNG"),
        "PNG of 16 bits": png16(),
        "gray PNG of 16 bits": encode(Image.fromarray(gray16()), "PNG"),
        "PNG that EXIF rotates": encode(photo, "PNG", exif=exif(ORIENTATION, 8)),
        "WebP": encode(photo, "WEBP"),
        "lossless WebP": encode(photo, "WEBP", lossless=True),
        "WebP with alpha": encode(alpha, "WEBP"),
        "WebP that EXIF rotates": encode(photo, "WEBP", exif=exif(ORIENTATION, 3)),
        "BMP": encode(photo, "BMP"),
        "BMP with a palette": encode(photo.quantize(64), "BMP"),
        "TIFF": encode(photo, "TIFF"),
        "TIFF with LZW": encode(photo, "TIFF", compression="tiff_lzw"),
        "gray TIFF of 16 bits": encode(Image.fromarray(gray16()), "TIFF"),
        "TIFF of two pages": encode(photo, "TIFF", save_all=True, append_images=second[1:]),
        "PPM": encode(photo, "PPM"),
        "PGM": encode(photo.convert("L"), "PPM"),
        "PGM of 16 bits": encode(Image.fromarray(gray16()), "PPM"),
    }


def bad_images() -> dict[str, bytes]:
    """Bytes that neither PIL nor DALI decodes."""
    jpeg, png = image_bytes(1), image_bytes(1, encoding="PNG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    return {
        "nothing": b"",
        "text": b"this is no image",
        "zeros": bytes(1000),
        "a JPEG's header": jpeg[:100],
        "a JPEG without its end": jpeg[:-300],
        "a PNG without its end": png[:-300],
        "a PNG with a changed byte": bytes(flipped),
        "a BMP without its end": image_bytes(1, encoding="BMP")[:-300],
        "a WebP without its end": image_bytes(1, encoding="WEBP")[:-100],
        "a TIFF without its end": image_bytes(1, encoding="TIFF")[:-300],
    }


def only_pil_decodes() -> dict[str, bytes]:
    """Images that PIL decodes and DALI 2.4 does not."""
    photo = Image.fromarray(smooth_pixels(1, HEIGHT, WIDTH))
    return {
        "GIF": encode(photo, "GIF"),
        "lossless WebP with EXIF": encode(photo, "WEBP", lossless=True, exif=exif(MODEL, "camera")),
    }


def batch_of(encoded: list[bytes], recipe: ViewRecipe, *, step: int = 0, centre: bool = False) -> Batch:
    """A batch of images, all of ``HEIGHT`` by ``WIDTH``, with drawn windows or centre crops."""
    ids = np.arange(len(encoded), dtype=np.int64) + 1000 * step
    sizes = np.tile(np.array([[HEIGHT, WIDTH]], dtype=np.int32), (len(ids), 1))
    windows: ViewParams | CentreCrops = (
        centre_crops(recipe.image_size, sizes) if centre else draw_views(recipe, 0, 0, ids, sizes)
    )
    return Batch(0, step, ids, ids, [np.frombuffer(data, dtype=np.uint8) for data in encoded], windows)
