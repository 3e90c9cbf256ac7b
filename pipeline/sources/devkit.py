"""Read the labels of ImageNet's validation images from ILSVRC2012_devkit_t12.tar.gz, without unpacking it.

The devkit numbers classes from 1 to 1000 in an order of its own; meta.mat translates the numbers to WordNet ids, the
names of the training folders.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.common.files import open_regular
from pipeline.sources.matlab import read_struct_array
from pipeline.sources.tar_members import is_plain_tar, members_within

_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_LARGEST = 256 << 20  # bytes of the unpacked archive; the true one has 4 MB
_GZIP = b"\x1f\x8b"


def is_devkit(file: Path) -> bool:
    """Whether ``file`` is a tar, plain or compressed by gzip, and not a text."""
    with open(open_regular(file), "rb") as opened:
        return opened.read(2) == _GZIP or is_plain_tar(file)


def devkit_classes(file: Path, images: int) -> list[str]:
    """The WordNet ids of ``images`` validation images in the order of their names.

    Raises UserError if the archive is damaged, is another one, or has another number of labels.
    """
    found = _contents(file)
    if len(found) < 2:
        raise UserError(f"{file} is not ImageNet's devkit: it has no {_TRUTH} or no {_META}")
    truth, synsets = found[_TRUTH].split(), read_struct_array(found[_META], "synsets")
    if len(truth) != images:
        raise UserError(f"{file} has {len(truth)} labels for {images} images: SOURCE must hold all validation images")
    try:
        wordnet = {_number(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        return [wordnet[int(number)] for number in truth]
    except (KeyError, ValueError, OverflowError) as error:
        raise UserError(f"ImageNet's devkit {file} is damaged ({error}): fetch it again") from None


def _contents(file: Path) -> dict[str, bytes]:
    """The two members that matter, by their base names."""
    with open(open_regular(file), "rb") as packed, tempfile.TemporaryFile() as plain:
        if packed.read(2) == _GZIP:
            packed.seek(0)
            inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)  # 16: of gzip
            try:
                plain.write(inflater.decompress(packed.read(_LARGEST), _LARGEST))
            except zlib.error as error:
                raise UserError(f"{file} is damaged or cut off ({error}): fetch it again") from None
            if not inflater.eof:
                raise UserError(f"{file} is cut off, or not ImageNet's devkit: fetch it again")
        else:
            packed.seek(0)
            plain.write(packed.read(_LARGEST))
        plain.flush()
        handle = plain.fileno()
        members = {
            member.name.rpartition("/")[2]: member
            for member in members_within(handle, 0, os.fstat(handle).st_size, str(file))
            if member.refusal is None
        }
        return {
            name: os.pread(handle, members[name].length, members[name].offset)
            for name in (_TRUTH, _META)
            if name in members
        }


def _number(value: str | tuple[float, ...] | None) -> int:
    if not isinstance(value, tuple) or len(value) != 1:
        raise ValueError(f"an ILSVRC2012_ID in {_META} is not one number")
    return int(value[0])
