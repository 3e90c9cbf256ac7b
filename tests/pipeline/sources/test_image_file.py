"""Which bytes count as an image, with the kinds of bad input that real collections hold."""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.sources.image_file import BadImageError, inspect_image, shrink_image
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


GOOD = {
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
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int)
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
