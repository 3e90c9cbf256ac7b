"""Image files of many formats and modes, of which docs/formats.md says what sharding does with each."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from tests.helpers.any_image import chunk, png
from tests.helpers.encoded import HEIGHT, WIDTH, encode, exif, gray16
from tests.helpers.lossless_jpeg import lossless_jpeg
from tests.helpers.photos import smooth_pixels

TWELVE_BITS = 4095


def photo() -> Image.Image:
    return Image.fromarray(smooth_pixels(1, HEIGHT, WIDTH))


def alpha() -> Image.Image:
    return Image.fromarray(np.dstack([smooth_pixels(1, HEIGHT, WIDTH), smooth_pixels(2, HEIGHT, WIDTH)[..., :1]]))


def twelve_bits() -> np.ndarray:
    """uint16 ``[h, w]``: 12-bit data in 16 bits."""
    return (gray16() >> 4).astype(np.uint16)


def rows(samples: np.ndarray) -> list[bytes]:
    """The rows of a PNG without a filter."""
    return [b"\0" + row.astype(samples.dtype.newbyteorder(">")).tobytes() for row in samples]


def colour16() -> np.ndarray:
    """uint16 ``[h, w, 3]`` over the whole range."""
    return np.stack([gray16(), gray16()[::-1], gray16()[:, ::-1]], -1)


def without(data: bytes, marker: bytes) -> bytes:
    """A JPEG without one of its segments."""
    start = data.index(marker)
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encode(photo(), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + b"\xff\xd9"


def huge_jpeg(height: int, width: int) -> bytes:
    """A small JPEG whose header announces another size."""
    data = bytearray(encode(photo(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def rgb_png(**options: object) -> bytes:
    return png(rows(smooth_pixels(1, HEIGHT, WIDTH)), WIDTH, 8, 2, **options)  # type: ignore[arg-type]


def bad_checksum() -> bytes:
    """A PNG with a wrong checksum of its pixels' chunk."""
    data = bytearray(rgb_png())
    data[data.rindex(b"IEND") - 5] ^= 1
    return bytes(data)


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(data) + compressor.flush()


def cgbi() -> bytes:
    """A PNG as Xcode writes it for iPhones: an extra chunk, and a zlib stream without header and trailer."""
    data = rgb_png(stream=raw_deflate)
    return data[:8] + chunk(b"CgBI", b"P\0 \2") + data[8:]


def interlaced() -> bytes:
    """A gray PNG in Adam7's seven passes."""
    pixels = smooth_pixels(1, HEIGHT, WIDTH)[..., 0]
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    parts = [row for top, left, down, right in passes for row in rows(pixels[top::down, left::right])]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 0, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"".join(parts))) + chunk(b"IEND", b"")


def bmp(bits: int, pixels: bytes, compression: int = 0, masks: bytes = b"", height: int = HEIGHT) -> bytes:
    """A BMP with a BITMAPINFOHEADER."""
    start = 14 + 40 + len(masks)
    info = struct.pack("<IiiHHIIiiII", 40, WIDTH, height, 1, bits, compression, len(pixels), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + info + masks + pixels


def bmp16(green_bits: int) -> bytes:
    """A BMP of 5-5-5 or 5-6-5 bits."""
    red, green, blue = (smooth_pixels(1, HEIGHT, WIDTH)[::-1, :, c].astype(np.uint16) for c in range(3))
    shift = green_bits - 5
    packed = (red >> 3) << (10 + shift) | (green >> (8 - green_bits)) << 5 | blue >> 3
    if green_bits == 5:
        return bmp(16, packed.astype("<u2").tobytes())
    return bmp(16, packed.astype("<u2").tobytes(), 3, struct.pack("<III", 0xF800, 0x07E0, 0x001F))


def rle_bmp() -> bytes:
    """A BMP of run lengths, with a gray palette."""
    palette = b"".join(bytes([v, v, v, 0]) for v in range(256))
    pixels = (
        b"".join(b"".join(bytes([8, 8 * x + y]) for x in range(WIDTH // 8)) + b"\0\0" for y in range(HEIGHT)) + b"\0\1"
    )
    return bmp(8, pixels, 1, palette)


def tiff(samples: np.ndarray, photometric: int, order: str = "<", **tags: int) -> bytes:
    """An uncompressed TIFF of one strip; ``tags`` by the names of TIFF 6.0."""
    channels = samples.shape[2] if samples.ndim == 3 else 1
    bits = samples.dtype.itemsize * 8
    pixels = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    known = {"planar": 284, "extra": 338, "orientation": 274, "sample_format": 339, "predictor": 317}
    entries = [
        (256, 3, [samples.shape[1]]), (257, 3, [samples.shape[0]]), (258, 3, [bits] * channels), (259, 3, [1]),
        (262, 3, [photometric]), (273, 4, [8]), (277, 3, [channels]), (278, 3, [samples.shape[0]]),
        (279, 4, [len(pixels)]), *((known[name], 3, [value]) for name, value in tags.items()),
    ]  # fmt: skip
    offset = 8 + len(pixels)
    table, beyond = b"", b""
    after = offset + 2 + 12 * len(entries) + 4
    for tag, kind, values in sorted(entries):
        content = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(content) > 4:
            content, beyond = struct.pack(f"{order}I", after + len(beyond)), beyond + content
        table += struct.pack(f"{order}HHI", tag, kind, len(values)) + content.ljust(4, b"\0")
    magic = b"II" if order == "<" else b"MM"
    head = magic + struct.pack(f"{order}HI", 42, offset) + pixels
    return head + struct.pack(f"{order}H", len(entries)) + table + bytes(4) + beyond


def pnm(magic: str, maxval: int, samples: np.ndarray) -> bytes:
    """A PNM, as text for P2 and P3."""
    head = f"{magic} # a comment\n{samples.shape[1]} {samples.shape[0]}\n{maxval}\n".encode()
    if magic in ("P2", "P3"):
        return head + " ".join(map(str, samples.ravel())).encode() + b"\n"
    return head + samples.astype(">u2" if maxval > 255 else "u1").tobytes()


def scaled(maxval: int) -> np.ndarray:
    return (smooth_pixels(1, HEIGHT, WIDTH)[..., 0].astype(int) * maxval // 255).astype(np.uint16)


KINDS: dict[str, Callable[[], bytes]] = {
    # JPEG
    "JPEG, RGB": lambda: encode(photo(), "JPEG"),
    "JPEG, gray": lambda: encode(photo().convert("L"), "JPEG"),
    "JPEG, progressive": lambda: encode(photo(), "JPEG", progressive=True),
    "JPEG, MPO with a second image": lambda: encode(photo(), "MPO", save_all=True, append_images=[photo()]),
    "JPEG, EXIF orientation (ignored)": lambda: encode(photo(), "JPEG", exif=exif(0x112, 6)),
    "JPEG, CMYK with an Adobe marker": lambda: encode(photo().convert("CMYK"), "JPEG"),
    "JPEG, CMYK without an Adobe marker": lambda: without(encode(photo().convert("CMYK"), "JPEG"), b"\xff\xee"),
    "JPEG, lossless": lambda: lossless_jpeg(smooth_pixels(1, HEIGHT, WIDTH)),
    "JPEG, truncated": lambda: encode(photo(), "JPEG")[:-300],
    "JPEG, more than 100 scans": lambda: many_scans(200),
    "JPEG, 65535 x 65535 pixels in its header": lambda: huge_jpeg(65535, 65535),
    "JPEG, 9000 x 9000 pixels in its header, data for 3,072": lambda: huge_jpeg(9000, 9000),
    # PNG
    "PNG, RGB": rgb_png,
    "PNG, RGB with alpha (dropped)": lambda: encode(alpha(), "PNG"),
    "PNG, gray": lambda: encode(photo().convert("L"), "PNG"),
    "PNG, gray with alpha (dropped)": lambda: encode(alpha().convert("LA"), "PNG"),
    "PNG, palette": lambda: encode(photo().quantize(64), "PNG"),
    "PNG, palette with a transparent colour": lambda: encode(photo().quantize(64), "PNG", transparency=3),
    "PNG, 1 bit": lambda: encode(photo().convert("1"), "PNG"),
    "PNG, 4 bits": lambda: encode(photo().quantize(16), "PNG", bits=4),
    "PNG, interlaced": interlaced,
    "PNG, gray of 16 bits": lambda: encode(Image.fromarray(gray16()), "PNG"),
    "PNG, gray of 16 bits with 12-bit data": lambda: encode(Image.fromarray(twelve_bits()), "PNG"),
    "PNG, RGB of 16 bits": lambda: png(rows(colour16()), WIDTH, 16, 2),
    "PNG, RGB of 16 bits with 12-bit data": lambda: png(rows(colour16() >> 4), WIDTH, 16, 2),
    "PNG, RGB of 16 bits with alpha": lambda: png(rows(np.dstack([colour16(), gray16()])), WIDTH, 16, 6),
    "PNG, gray of 16 bits with alpha": lambda: png(rows(np.dstack([gray16(), gray16()])), WIDTH, 16, 4),
    "PNG, wrong checksum of the pixels": bad_checksum,
    "PNG, no zlib trailer": lambda: rgb_png(stream=lambda data: zlib.compress(data)[:-4]),
    "PNG, half of the rows": lambda: rgb_png(stream=lambda data: zlib.compress(data[: len(data) // 2])),
    "PNG, without its end": lambda: rgb_png()[:-12],
    "PNG, of an iPhone (CgBI)": cgbi,
    "PNG, palette too short": lambda: png(
        rows(np.full((HEIGHT, WIDTH), 9, np.uint8)), WIDTH, 8, 3, before=chunk(b"PLTE", bytes(6))
    ),
    # WebP
    "WebP, lossy": lambda: encode(photo(), "WEBP"),
    "WebP, lossless": lambda: encode(photo(), "WEBP", lossless=True),
    "WebP, with alpha (dropped)": lambda: encode(alpha(), "WEBP"),
    "WebP, animated (first frame)": lambda: encode(photo(), "WEBP", save_all=True, append_images=[photo().rotate(90)]),
    "WebP, lossless with EXIF": lambda: encode(photo(), "WEBP", lossless=True, exif=exif(0x110, "camera")),
    # BMP
    "BMP, 24 bits": lambda: encode(photo(), "BMP"),
    "BMP, 32 bits": lambda: encode(alpha(), "BMP"),
    "BMP, palette": lambda: encode(photo().quantize(64), "BMP"),
    "BMP, 1 bit": lambda: encode(photo().convert("1"), "BMP"),
    "BMP, 5-5-5": lambda: bmp16(5),
    "BMP, 5-6-5": lambda: bmp16(6),
    "BMP, run lengths": rle_bmp,
    "BMP, top row first": lambda: bmp(24, smooth_pixels(1, HEIGHT, WIDTH)[..., ::-1].tobytes(), height=-HEIGHT),
    # TIFF
    "TIFF, RGB": lambda: encode(photo(), "TIFF"),
    "TIFF, gray": lambda: encode(photo().convert("L"), "TIFF"),
    "TIFF, palette": lambda: encode(photo().quantize(64), "TIFF"),
    "TIFF, CMYK": lambda: encode(photo().convert("CMYK"), "TIFF"),
    "TIFF, YCbCr": lambda: encode(photo().convert("YCbCr"), "TIFF"),
    "TIFF, LZW, deflate, packbits, zstd": lambda: encode(photo(), "TIFF", compression="tiff_lzw"),
    "TIFF, JPEG": lambda: encode(photo(), "TIFF", compression="jpeg"),
    "TIFF, LZMA": lambda: encode(photo(), "TIFF", compression="lzma"),
    "TIFF, fax (group 3 or 4)": lambda: encode(photo().convert("1"), "TIFF", compression="group4"),
    "TIFF, 1 bit, not fax": lambda: encode(photo().convert("1"), "TIFF"),
    "TIFF, several pages (first)": lambda: encode(photo(), "TIFF", save_all=True, append_images=[photo()]),
    "TIFF, BigTIFF": lambda: encode(photo(), "TIFF", big_tiff=True),
    "TIFF, alpha (dropped)": lambda: tiff(np.asarray(alpha()), 2, extra=2),
    "TIFF, premultiplied alpha": lambda: tiff(np.asarray(alpha().convert("RGBa")), 2, extra=1),
    "TIFF, gray with alpha": lambda: encode(alpha().convert("LA"), "TIFF"),
    "TIFF, white is zero": lambda: tiff(smooth_pixels(1, HEIGHT, WIDTH)[..., 0], 0),
    "TIFF, orientation tag": lambda: encode(photo(), "TIFF", exif=exif(0x112, 6)),
    "TIFF, gray of 16 bits": lambda: tiff(gray16(), 1),
    "TIFF, gray of 16 bits, big-endian": lambda: tiff(gray16(), 1, ">"),
    "TIFF, gray of 16 bits, white is zero": lambda: tiff(gray16(), 0),
    "TIFF, gray of 16 bits with 12-bit data": lambda: tiff(twelve_bits(), 1),
    "TIFF, RGB of 16 bits": lambda: tiff(colour16(), 2),
    "TIFF, RGB of 16 bits, big-endian": lambda: tiff(colour16(), 2, ">"),
    "TIFF, 32-bit integers": lambda: encode(photo().convert("I"), "TIFF"),
    "TIFF, floating point": lambda: encode(photo().convert("F"), "TIFF"),
    # PNM
    "PBM": lambda: encode(photo().convert("1"), "PPM"),
    "PGM": lambda: encode(photo().convert("L"), "PPM"),
    "PPM": lambda: encode(photo(), "PPM"),
    "PGM, maxval 100": lambda: pnm("P5", 100, scaled(100)),
    "PPM, maxval 100": lambda: pnm("P6", 100, np.dstack([scaled(100)] * 3)),
    "PGM, maxval 4095": lambda: pnm("P5", TWELVE_BITS, scaled(TWELVE_BITS)),
    "PGM, maxval 65535": lambda: pnm("P5", 65535, gray16()),
    "PGM, maxval 65535 with 12-bit data": lambda: pnm("P5", 65535, twelve_bits()),
    "PPM, maxval 65535": lambda: pnm("P6", 65535, colour16()),
    "PGM as text": lambda: pnm("P2", 255, scaled(255)),
    "PGM as text, without a newline at its end": lambda: pnm("P2", 255, scaled(255))[:-1],
    "PPM as text": lambda: pnm("P3", 255, np.dstack([scaled(255)] * 3)),
    "PFM": lambda: encode(photo().convert("F"), "PPM"),
    # others
    "GIF": lambda: encode(photo(), "GIF"),
    "JPEG 2000": lambda: encode(photo(), "JPEG2000"),
    "ICO": lambda: encode(photo(), "ICO"),
}  # fmt: skip
