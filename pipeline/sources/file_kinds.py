"""Name what a file is when it is not an image that the back ends decode: the reason in rejected.jsonl.

Used by ``inspect_image`` after PIL found no supported format. Only the first bytes are read.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Magic numbers at the start of a file: https://en.wikipedia.org/wiki/List_of_file_signatures
_IMAGE_FORMATS = (
    (b"GIF8", "GIF"),
    (b"8BPS", "Photoshop"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"BPG\xfb", "BPG"),
    (b"\0\0\x01\0", "ICO"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"PF\n", "PFM"),
    (b"Pf\n", "PFM"),
    (b"DDS ", "DDS"),
    (b"SIMPLE  =", "FITS"),
    (b"II+\0", "BigTIFF"),
    (b"MM\0+", "BigTIFF"),
    (b"<svg", "SVG"),
)
_OTHER_FORMATS = (
    (b"%PDF", "PDF"),
    (b"\x93NUMPY", "NumPy"),
    (b"\x89HDF\r\n", "HDF5"),
    (b"\x1aE\xdf\xa3", "Matroska or WebM video"),
    (b"\0\0\x01\xba", "MPEG video"),
    (b"fLaC", "FLAC audio"),
    (b"ID3", "MP3 audio"),
    (b"OggS", "Ogg"),
    (b"PAR1", "Parquet"),
    (b"PK\x03\x04", "ZIP"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"(\xb5/\xfd", "Zstandard"),
    (b"7z\xbc\xaf", "7-Zip"),
    (b"Rar!", "RAR"),
)
_RIFF = {b"AVI ": "AVI video", b"WAVE": "WAVE audio"}  # RIFF....KIND
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"hevc": "HEIC", b"mif1": "HEIF"}
_TEXTS = (
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (rb"/annex/objects/|(\.\./)*\.git/annex/objects/", "a git-annex pointer, not the file itself: run `git annex get`"),
    (rb"(<!--.*?-->\s*)*(<!doctype html|<html|<head|<body)", "a web page (HTML)"),
    (rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!doctype svg[^>]*>\s*)?<svg", "SVG"),
    (rb"<\?xml", "XML"),
)
_SNIFFED = 1024  # bytes in which a text is recognised
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # SOF0 .. SOF15 and JPEG-LS; not DHT, JPG, DAC
_SCAN = 0xDA
DAMAGED_SEGMENTS = "damaged header: its JPEG segments do not follow each other"
_NOT_PROGRESSIVE = frozenset({0xC0, 0xC1, 0xC3})


class JpegFrame(NamedTuple):
    """The frame header of a JPEG (ITU-T T.81, B.2.2)."""

    marker: int  # 0xC0 baseline, 0xC2 progressive, 0xC3 lossless, 0xF7 JPEG-LS
    bits: int  # per sample
    height: int  # pixels; 0: a DNL marker behind the first scan has it
    width: int  # pixels
    components: int
    first_scan: int  # components in the first scan; 0 if there is none

    @property
    def has_one_scan(self) -> bool:
        """Whether decoders stop behind the first scan: it holds all of every component."""
        return self.marker in _NOT_PROGRESSIVE and self.first_scan == self.components


def jpeg_header(data: bytes) -> tuple[JpegFrame | None, str | None]:
    """(the first frame header of a JPEG, the fault of its segments up to the first scan); None: there is none.

    Each segment must begin where the one before ends (ITU-T T.81, B.1.1). DALI requires it; PIL skips unknown bytes.
    tests/pipeline/sharding/test_hostile_input.py compares with DALI's decoder.
    """
    at, frame = 2, None  # after the start-of-image marker
    try:
        while data[at] == 0xFF:
            at += 1
            while (marker := data[at]) == 0xFF:  # any number of fill bytes
                at += 1
            length = data[at + 1] << 8 | data[at + 2]
            if marker == _SCAN:
                return frame and frame._replace(first_scan=data[at + 3]), None
            if marker == 0 or length < 2:  # the length includes its own two bytes
                break
            if frame is None and marker in _FRAMES:
                bits, *sides, components = data[at + 3 : at + 9]
                frame = JpegFrame(marker, bits, sides[0] << 8 | sides[1], sides[2] << 8 | sides[3], components, 0)
            at += 1 + length
    except (IndexError, ValueError):
        return frame, "truncated"
    return frame, DAMAGED_SEGMENTS


def describe_unknown(data: bytes) -> str:
    """The reason to refuse ``data``, which PIL did not open as one of the supported formats."""
    if data.startswith(b"\xff\xd8"):
        return _describe_jpeg(data)
    for magic, name in (*_IMAGE_FORMATS, *_OTHER_FORMATS):
        if data.startswith(magic):
            return f"{name} is not a supported format"
    if data[:4] == b"RIFF" and data[8:12] in _RIFF:
        return f"{_RIFF[data[8:12]]} is not a supported format"
    if data[4:8] == b"ftyp":
        return f"{_BRANDS.get(data[8:12], 'MP4 or QuickTime video')} is not a supported format"
    if data[128:132] == b"DICM":
        return "DICOM is not a supported format"
    text = data[:_SNIFFED].removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, name in _TEXTS:
        if re.match(pattern, text, re.IGNORECASE | re.DOTALL):
            return f"{name} is not a supported format" if name == "SVG" else f"not an image: {name}"
    if data and not any(data[:_SNIFFED]):
        return "not an image: it begins with zero bytes, as after a download or copy that was cut off"
    return "not an image: unknown or damaged format"


def is_other_image(data: bytes) -> bool:
    """Whether ``data`` is an image of a format that is not supported."""
    known = any(data.startswith(magic) for magic, _ in _IMAGE_FORMATS)
    return known or (data[4:8] == b"ftyp" and data[8:12] in _BRANDS)


def _describe_jpeg(data: bytes) -> str:
    frame, _ = jpeg_header(data)
    if frame is None:
        return "truncated" if b"\xff\xda" not in data else "damaged header: no JPEG frame before its scan"
    if frame.marker == 0xF7:
        return "JPEG-LS is not a supported format"
    if frame.bits != 8:
        return f"JPEG with {frame.bits} bits per sample is not supported"
    if frame.height == 0:
        return "JPEG without a height in its header (DNL marker) is not supported"
    return "not an image: unknown or damaged format"
