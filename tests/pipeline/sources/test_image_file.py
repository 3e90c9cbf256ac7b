"""Which bytes count as an image, with the kinds of bad input that real collections hold."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.backends.reference import decode
from pipeline.common.png import without_text
from pipeline.sources import image_file
from pipeline.sources.image_file import BadImageError, inspect_image, shrink_image
from tests.helpers.lossless_jpeg import lossless_jpeg
from tests.helpers.photos import image_bytes, smooth_pixels

LIMIT = 100_000_000


def jpeg() -> bytes:
    return image_bytes(1, 48, 64)


def sixteen_bit_png() -> bytes:
    out = io.BytesIO()
    Image.fromarray(smooth_pixels(1, 48, 64, 1)[..., 0].astype(np.uint16) * 257).save(out, "PNG")
    return out.getvalue()


def animated(encoding: str) -> bytes:
    out, frame = io.BytesIO(), Image.fromarray(smooth_pixels(1, 48, 64))
    frame.save(out, encoding, save_all=True, append_images=[frame.rotate(90)])
    return out.getvalue()


def with_exif(encoding: str, **options: object) -> bytes:
    """An image that is to be shown lying on its side."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(smooth_pixels(1, 48, 64)).save(out, encoding, exif=exif, **options)
    return out.getvalue()


def with_text(kind: bytes, content: bytes, count: int = 1) -> bytes:
    """A PNG with ``count`` chunks of text or a profile before its pixels, and as many behind them."""
    data = image_bytes(1, encoding="PNG")
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    before, after = data.index(b"IDAT") - 4, data.rindex(b"IEND") - 4
    return data[:before] + chunk * count + data[before:after] + chunk * count + data[after:]


def frame_changed(at: int, content: bytes) -> bytes:
    """A JPEG with other bytes in its frame header: 4 the bits, 5 the height, 7 the width (2 bytes each)."""
    data = jpeg()
    start = data.index(b"\xff\xc0")
    return data[: start + at] + content + data[start + at + len(content) :]


GOOD = {
    "lossless jpeg": (lambda: lossless_jpeg(smooth_pixels(1, 48, 64)), "jpg"),
    "png with 4 MB of compressed text": (lambda: with_text(b"zTXt", b"c\0\0" + zlib.compress(bytes(4 << 20))), "png"),
    "png with 12 MB of plain text": (lambda: with_text(b"tEXt", b"c\0" + b"x" * (12 << 20)), "png"),
    "png with 3000 texts": (lambda: with_text(b"tEXt", b"c\0hello", 3000), "png"),
    "png with a text bomb of utf-8": (
        lambda: with_text(b"iTXt", b"c\0\1\0\0\0" + zlib.compress(bytes(64 << 20), 9)),
        "png",
    ),
    "png with a profile bomb": (lambda: with_text(b"iCCP", b"c\0\0" + zlib.compress(bytes(8 << 20))), "png"),
    "jpeg with exif": (lambda: with_exif("JPEG"), "jpg"),
    "webp with exif": (lambda: with_exif("WEBP"), "webp"),
    "lossless webp": (lambda: image_bytes(1, encoding="WEBP", lossless=True), "webp"),
    "jpeg": (jpeg, "jpg"),
    "progressive": (lambda: image_bytes(1, progressive=True), "jpg"),
    "gray": (lambda: image_bytes(1, mode="L"), "jpg"),
    "cmyk": (lambda: image_bytes(1, mode="CMYK"), "jpg"),
    "png": (lambda: image_bytes(1, encoding="PNG"), "png"),
    "rgba": (lambda: image_bytes(1, mode="RGBA", encoding="PNG"), "png"),
    "palette": (lambda: image_bytes(1, mode="P", encoding="PNG"), "png"),
    "one bit": (lambda: image_bytes(1, mode="1", encoding="PNG"), "png"),
    "16 bit": (sixteen_bit_png, "png"),
    "webp": (lambda: image_bytes(1, encoding="WEBP"), "webp"),
    "animated webp": (lambda: animated("WEBP"), "webp"),
    "bmp": (lambda: image_bytes(1, encoding="BMP"), "bmp"),
    "tiff": (lambda: image_bytes(1, encoding="TIFF", compression="tiff_lzw"), "tiff"),
    "fax tiff": (lambda: image_bytes(1, mode="1", encoding="TIFF", compression="group4"), "tiff"),
    "ppm": (lambda: image_bytes(1, encoding="PPM"), "ppm"),
    "several frames (mpo)": (lambda: animated("MPO"), "jpg"),
    "junk behind the end": (lambda: jpeg() + b"junk" * 100, "jpg"),
}
BAD = {
    "12-bit jpeg": (lambda: frame_changed(4, b"\x0c"), "JPEG with 12 bits per sample"),
    "jpeg with DNL": (lambda: frame_changed(5, b"\0\0"), "(DNL marker)"),
    "jpeg-ls": (lambda: jpeg().replace(b"\xff\xc0", b"\xff\xf7"), "JPEG-LS"),
    "jpeg without a frame": (lambda: b"\xff\xd8\xff\xda\0\x08" + bytes(20), "no JPEG frame"),
    "jpeg 2000": (lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(64), "JPEG 2000 is not a supported format"),
    "jpeg 2000 codestream": (lambda: b"\xff\x4f\xff\x51" + bytes(64), "JPEG 2000"),
    "git-lfs": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a Git LFS pointer",
    ),
    "html": (lambda: b"\xef\xbb\xbf\n<!-- x --><!DOCTYPE html>\n<html>", "a web page (HTML)"),
    "svg": (lambda: b'<?xml version="1.0"?>\n<svg width="1">', "SVG is not a supported format"),
    "an error of an object store": (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "XML"),
    "heic": (lambda: b"\0\0\0\x18ftypheic" + bytes(64), "HEIC is not a supported format"),
    "mp4": (lambda: b"\0\0\0\x18ftypisom" + bytes(64), "MP4 or QuickTime video"),
    "dicom": (lambda: bytes(128) + b"DICM" + bytes(64), "DICOM"),
    "a hole of the disk": (lambda: bytes(5000), "zero bytes"),
    "a zip": (lambda: b"PK\x03\x04" + bytes(64), "ZIP is not a supported format"),
    "lossless webp with exif": (lambda: with_exif("WEBP", lossless=True), "lossless WebP with EXIF"),
    "turned tiff": (lambda: with_exif("TIFF"), "orientation"),
    "png without its end": (lambda: image_bytes(1, encoding="PNG")[:-12], "truncated"),
    "no bytes": (lambda: b"", "empty file"),
    "text": (lambda: b"<html>404 Not Found</html>", "not an image"),
    "gif": (lambda: image_bytes(1, encoding="GIF"), "GIF is not a supported format"),
    "avif": (lambda: b"\0\0\0\x20ftypavif" + bytes(64), "AVIF is not a supported format"),
    "truncated": (lambda: jpeg()[: len(jpeg()) // 2], "truncated"),
    "without its last byte": (lambda: jpeg()[:-2], "truncated"),
    "header only": (lambda: jpeg()[: jpeg().index(b"\xff\xda")], "truncated"),
    "truncated png": (lambda: image_bytes(1, encoding="PNG")[:-300], "truncated"),
    "cut inside the header": (lambda: jpeg()[:200], "truncated"),
    "zeros behind the magic": (lambda: jpeg()[:4] + bytes(2000), ""),
    "pfm": (lambda: image_bytes(1, mode="F", encoding="PPM"), "floating-point"),
    "float tiff": (lambda: image_bytes(1, mode="F", encoding="TIFF"), "TIFF with F pixels"),
    "gray and alpha tiff": (lambda: image_bytes(1, mode="LA", encoding="TIFF"), "TIFF with LA pixels"),
    "lzma tiff": (lambda: image_bytes(1, encoding="TIFF", compression="lzma"), "lzma"),
    "one bit tiff": (lambda: image_bytes(1, mode="1", encoding="TIFF"), "TIFF with 1 pixels"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_kinds_pass_with_their_true_format_and_size(kind: str) -> None:
    make, extension = GOOD[kind]
    image = inspect_image(make(), "full", LIMIT)
    assert (image.extension, image.height, image.width) == (extension, 48, 64)


@pytest.mark.parametrize("kind", BAD)
def test_bad_kinds_are_refused_with_a_reason(kind: str) -> None:
    make, reason = BAD[kind]
    with pytest.raises(BadImageError) as caught:
        inspect_image(make(), "full", LIMIT)
    assert reason in str(caught.value)
    assert str(caught.value)


def test_the_size_limit_is_checked_before_decoding() -> None:
    bomb = b"P5\n20000 20000\n255\n"  # its pixels are not even there
    with pytest.raises(BadImageError, match="--max-pixels 1000000"):
        inspect_image(bomb, "full", 1_000_000)


def test_a_side_must_fit_the_index() -> None:
    long = io.BytesIO()
    Image.new("L", (65_536, 1)).save(long, "PNG")
    with pytest.raises(BadImageError, match="65535"):
        inspect_image(long.getvalue(), "full", LIMIT)


def test_header_verification_reads_the_size_only() -> None:
    half = jpeg()[: len(jpeg()) // 2]
    for verify in ("header", "none"):
        image = inspect_image(half, verify, LIMIT)
        assert (image.height, image.width) == (48, 64)


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = inspect_image(image_bytes(1, 48, 64, exif=exif.tobytes()), "full", LIMIT)
    assert (image.height, image.width) == (48, 64)


def test_shrinking_keeps_the_ratio_and_the_look() -> None:
    original = image_bytes(3, 400, 600, quality=95)
    small = Image.open(io.BytesIO(shrink_image(original, 100, 90, LIMIT) or b""))
    assert small.size == (150, 100)
    expected = Image.open(io.BytesIO(original)).resize((150, 100), Image.Resampling.BICUBIC)
    lossless = shrink_image(lossless_jpeg(smooth_pixels(3, 400, 600)), 100, 90, LIMIT)
    assert Image.open(io.BytesIO(lossless or b"")).size == (150, 100)
    assert np.abs(np.asarray(small, float) - np.asarray(expected, float)).mean() < 3
    assert shrink_image(image_bytes(3, 100, 600), 100, 90, LIMIT) is None


def test_dali_decodes_every_kind_that_passes() -> None:
    """An image that passes here must not stop a batch later. (16-bit images differ: PIL clips, DALI scales.)"""
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def, types

    encoded = {kind: make() for kind, (make, _) in GOOD.items()}

    @pipeline_def(batch_size=len(encoded), num_threads=1, device_id=None)
    def decode() -> object:
        data = fn.external_source(source=lambda _: [np.frombuffer(d, np.uint8) for d in encoded.values()], batch=True)
        return fn.decoders.image(data, output_type=types.RGB, adjust_orientation=False)

    pipeline = decode()
    pipeline.build()
    (pixels,) = pipeline.run()
    for i, (kind, data) in enumerate(encoded.items()):
        expected = np.asarray(Image.open(io.BytesIO(without_text(data))).convert("RGB"), int)
        assert np.asarray(pixels[i]).shape == expected.shape, kind
        if kind != "16 bit":
            assert np.abs(np.asarray(pixels[i]) - expected).max() <= 1, kind


def damaged(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data)), rng.randrange(1, 400)
    match rng.randrange(4):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        case _:
            return data[:at] + rng.choice([b"\xff\xd9", b"\xff\xda", b"\xff\xd3", b"\xff\xc4\0\5"]) + data[at:]


def refused(judge: Callable[[], object]) -> bool:
    try:
        judge()
    except (BadImageError, OSError, SyntaxError):
        return True
    return False


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}, {"mode": "L"}], ids=str
)
def test_jpegs_read_at_an_eighth_are_judged_as_at_full_size(options: dict[str, object]) -> None:
    rng, data = random.Random(0), image_bytes(1, 96, 128, **options)
    verdicts = []
    for _ in range(200):
        bytes_ = damaged(data, rng)
        by_header = refused(lambda: inspect_image(bytes_, "header", LIMIT))  # noqa: B023  # now
        at_full_size = refused(lambda: Image.open(io.BytesIO(bytes_), formats=["JPEG"]).load())  # noqa: B023
        verdicts.append(by_header or at_full_size)
        assert refused(lambda: inspect_image(bytes_, "full", LIMIT)) == verdicts[-1]  # noqa: B023
    assert 20 < sum(verdicts) < 180


def test_text_and_lossless_coding_change_no_pixel() -> None:
    """In the torchvision back end too, which decodes with PIL."""
    pixels = smooth_pixels(1, 48, 64)
    assert (decode(lossless_jpeg(pixels)).permute(1, 2, 0).numpy() == pixels).all()
    for kind in ("png with 4 MB of compressed text", "png with 3000 texts", "png with a profile bomb"):
        assert (decode(GOOD[kind][0]()).permute(1, 2, 0).numpy() == pixels).all()


@pytest.mark.parametrize("transparency", [b"\x00\x80\xff", 1, b""])
def test_what_the_source_said_of_transparency_does_not_stop_the_rewriting(transparency: bytes | int) -> None:
    image = Image.new("RGB", (29, 1), (10, 200, 30))
    image.info["transparency"] = transparency
    written = Image.open(io.BytesIO(image_file._png(image)))
    assert (written.mode, written.getpixel((3, 0))) == ("RGB", (10, 200, 30))
    palette = Image.new("P", (29, 1), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=transparency)
    again = Image.open(io.BytesIO(image_file.lossless_image(out.getvalue(), 1 << 20)))
    assert again.convert("RGB").getpixel((3, 0)) == (10, 200, 30)
