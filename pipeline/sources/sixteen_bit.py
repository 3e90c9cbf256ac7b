"""Convert images of more than 8 bits a sample to 8 bits, by the rule of ``--sixteen-bit``.

Back ends disagree on such images: PIL clips, shifts or scales them by format, DALI scales by the type's full range, and
either way data of 12 bits in a 16-bit file keep 16 gray levels. Sharding therefore converts them once, by an explicit
rule that dataset.json records, and stores 8-bit PNGs: every back end, on CPU and GPU, then reads the same bytes.
"""

from __future__ import annotations

import io
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from pipeline.common.png import without_text

SixteenBitRule = Literal["auto", "refuse", "full-range", "min-max", "window"]
_BITS_PER_SAMPLE, _PHOTOMETRIC, _PLANAR = 258, 262, 284  # tags of TIFF 6.0
_WHITE_IS_ZERO = 0
_TWELVE_BITS = "I;12"  # PIL's raw mode of 12-bit TIFFs, which it does not scale
# The byte order of a raw mode, and the one with which PIL, which keeps the high byte, gives the low byte of a sample.
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_PNM_TOKEN = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*([^\s#]+)")


class SixteenBitError(Exception):
    """The pixels cannot be converted; the message is the reason for rejected.jsonl."""


@dataclass(frozen=True)
class DeepPixels:
    """Decoded pixels of more than 8 bits a sample."""

    values: NDArray[np.uint16]  # [h, w] or [h, w, 3]
    top: int  # the largest value that the format allows: 65535, 4095, or the maxval of a PGM


def is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether an opened image has more than 8 bits a sample. Reads the header only."""
    match image.format:
        case "PNG":
            return data[12:16] == b"IHDR" and data[24] > 8  # the bit depth
        case "TIFF":
            assert isinstance(image, TiffImageFile)
            return max(image.tag_v2.get(_BITS_PER_SAMPLE, (1,))) > 8
        case "PPM":
            return pnm_maxval(data) > 255
        case _:
            return False


def pnm_maxval(data: bytes) -> int:
    """The maxval of a PGM or PPM; 1 for a PBM, which has none."""
    if data[1:2] in b"14":
        return 1
    at, tokens = 2, list[bytes]()
    while len(tokens) < 3 and (token := _PNM_TOKEN.match(data, at)) is not None:
        tokens.append(token[1])
        at = token.end()
    return int(tokens[2]) if len(tokens) == 3 and tokens[2].isdigit() else 1


def read_deep(data: bytes) -> DeepPixels:
    """Decode all bits of an image for which ``is_deep`` holds. Raises SixteenBitError, or what PIL raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(without_text(data)))
        image.load()
        if image.mode == "I" and image.format == "PPM":  # PIL scales to 65535; undone exactly, as maxval is smaller
            top = pnm_maxval(data)
            return DeepPixels(np.rint(np.asarray(image) * (top / 65535)).astype(np.uint16), top)
        if image.mode.startswith("I;16"):
            return _gray(data, np.asarray(image).astype(np.uint16))
        if image.format == "PPM":
            return _ppm(data, image)
        return DeepPixels(_colour(data, image), 65535)


def _ppm(data: bytes, image: Image.Image) -> DeepPixels:
    if not data.startswith(b"P6"):
        raise SixteenBitError("PPM as text with 16 bits a colour is not supported")
    top = pnm_maxval(data)
    samples = image.height * image.width * 3
    start = Image.open(io.BytesIO(data)).tile[0].offset
    values = np.frombuffer(data, ">u2", samples, start).reshape(image.height, image.width, 3)
    return DeepPixels(np.minimum(values.astype(np.uint16), top), top)


def _gray(data: bytes, values: NDArray[np.uint16]) -> DeepPixels:
    header = Image.open(io.BytesIO(without_text(data)))
    top = 65535
    if isinstance(header, TiffImageFile):
        top = 4095 if _raw_mode(header) == _TWELVE_BITS else 65535
        if header.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # PIL inverts such images of 8 bits only
            values = np.uint16(top) - values
    return DeepPixels(values, top)


def _colour(data: bytes, high: Image.Image) -> NDArray[np.uint16]:
    """Colours, or gray with alpha, without the alpha. PIL keeps one byte a sample, so the image is decoded twice."""
    low = Image.open(io.BytesIO(without_text(data)))
    if isinstance(low, TiffImageFile) and low.tag_v2.get(_PLANAR, 1) != 1:
        raise SixteenBitError("TIFF with 16 bits a colour in separate planes is not supported")
    raw = _raw_mode(low)
    if raw == "LA;16B":  # as many bytes as RGBA of 8 bits: R is the high byte of L, G the low one
        low.tile = [tile._replace(args="RGBA") for tile in low.tile]
        both = np.asarray(low)
        return both[..., 0].astype(np.uint16) << 8 | both[..., 1]
    layout, _, order = raw.partition(";16")
    if layout not in ("RGB", "RGBA", "RGBX") or order not in _SWAPPED:
        raise SixteenBitError(f"{high.format} with 16-bit pixels of the kind {raw} is not supported")
    swapped = f"{layout};16{_SWAPPED[order]}"
    low.tile = [
        tile._replace(args=(swapped, *tile.args[1:]) if isinstance(tile.args, tuple) else swapped) for tile in low.tile
    ]
    low.load()
    return np.asarray(high)[..., :3].astype(np.uint16) << 8 | np.asarray(low)[..., :3]


def _raw_mode(image: ImageFile) -> str:
    """How the samples lie in the file, as PIL's decoders name it."""
    args = image.tile[0].args
    return str(args[0] if isinstance(args, tuple) else args)


def eight_bits(pixels: DeepPixels, rule: SixteenBitRule, window: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Map values linearly to 0 .. 255: those from 0 to ``top``, from the smallest to the largest, or in ``window``.

    Values outside are clipped. Raises SixteenBitError where the rule refuses the image: ``refuse`` does always,
    ``auto`` if the values span less than half of the range, which would leave fewer than 128 of 256 levels.
    """
    if rule == "refuse":
        raise SixteenBitError("more than 8 bits a sample: --sixteen-bit refuse")
    lowest, highest = int(pixels.values.min()), int(pixels.values.max())
    match rule:
        case "auto":
            _check_span(highest - lowest, pixels.top)
            low, high = 0, pixels.top
        case "full-range":
            low, high = 0, pixels.top
        case "min-max":
            low, high = lowest, max(highest, lowest + 1)
        case "window":
            assert window is not None
            low, high = window
    table = np.clip((np.arange(highest + 1, dtype=np.float64) - low) * (255 / (high - low)), 0, 255)
    return np.rint(table).astype(np.uint8)[pixels.values]


def _check_span(span: int, top: int) -> None:
    if 2 * span < top:
        fewer = 1 << span.bit_length()  # a power of two: the summary groups by reason
        raise SixteenBitError(
            f"more than 8 bits a sample, whose values span fewer than {fewer} of {top + 1}, less than half: choose "
            "--sixteen-bit full-range, min-max, or window LO HI"
        )
