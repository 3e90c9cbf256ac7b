"""The format of a dataset on disk: dataset.json and the rows of samples.npy, read and compared with each other.

DIR/dataset.json       written last: a folder without it is not a dataset
DIR/shard-000000.tar   plain WebDataset: KEY.cls (if labelled), KEY.jpg (png, webp, bmp, tiff, ppm; npy of --channels)
DIR/shard-000000.idx   DALI's wds2idx v1.2 index of that tar
DIR/samples.npy        SAMPLE_DTYPE[num_samples]; the sample id is the row
DIR/names.bin, .npy    the path of each sample in the source: names.py; datasets of earlier versions have none
DIR/rejected.jsonl     {"name", "reason"} of every image that was refused
DIR/reencoded.jsonl    {"name", "reason"} of every image whose pixels, not bytes, were kept; only where there are any
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.files import check_regular, map_array, open_regular, read_regular

FORMAT_VERSION = 1
DATASET_FILE, SAMPLES_FILE, REJECTED_FILE, PARTIAL_DIR = "dataset.json", "samples.npy", "rejected.jsonl", ".partial"
REENCODED_FILE = "reencoded.jsonl"
SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),  # bytes from the start of the tar to the image
        ("length", "<u4"),  # bytes
        ("label", "<i4"),  # -1 = none
        ("height", "<u2"),  # pixels as stored; EXIF orientation is ignored
        ("width", "<u2"),
        ("checksum", "<u4"),  # zlib.crc32 of the image's bytes
    ]
)
HASHED_AT_OPEN = 64 << 20  # bytes; up to here (2.4 million samples) samples.npy is hashed before anything is read
_REMEDY = "run make_shards again with the same SOURCE and options: it goes on with what is missing"
REPLACE = "copy it again from where the dataset came from, or write the dataset again with --overwrite"


class DamagedError(UserError):
    """dataset.json is not as it was written."""


@dataclass(frozen=True)
class Shard:
    """One tar of a dataset, as dataset.json records it."""

    name: str  # path of the tar; relative to the dataset's folder unless absolute
    index: str  # DALI's index, in the dataset's folder
    samples: int
    bytes: int
    sha256: str


class Shards(Sequence[Shard]):
    """The shards of dataset.json, each made into an object when it is read: a million of them would take seconds."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return tuple(self[at] for at in range(*number.indices(len(self))))
        return Shard(**{name: self._entries[number][name] for name in _SHARD_TYPES})


def read_dataset_file(path: Path, *, check_files: bool = True) -> dict[str, Any]:
    """dataset.json of folder ``path``, checked. Raises UserError that names the fault and the remedy.

    ``check_files``: compare its counts and the sizes of the tars as well.
    """
    file = path / DATASET_FILE
    if path.is_file():
        raise UserError(f"no dataset at {path}: it is a file: give the folder that tools/make_shards.py wrote")
    if not path.is_dir():
        raise UserError(f"no dataset at {path}: the folder does not exist; write one with tools/make_shards.py")
    if not file.exists():
        if (path / PARTIAL_DIR).exists():
            raise UserError(f"the dataset at {path} is half-written: {_REMEDY}")
        raise UserError(f"{path} is no dataset: it has no {DATASET_FILE}; write one with tools/make_shards.py")
    try:
        info = parse_dataset_file(read_regular(file), str(file))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    if check_files:
        _check_files(path, info)
    return info


def parse_dataset_file(data: bytes, name: str) -> dict[str, Any]:
    """dataset.json from its bytes, checked alone; ``name`` is for messages. Raises DamagedError or UserError."""
    damaged = DamagedError(f"{name} is damaged: tools/check_shards.py --repair makes it again from the tars")
    try:
        info = json.loads(data)
        version = info["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{name} has format version {version}, this program reads {FORMAT_VERSION}: "
            "use the version of siamstream that wrote it, or write it again with --overwrite"
        )
    if not _has_types(info, _DATASET_TYPES) or not all(_has_types(shard, _SHARD_TYPES) for shard in info["shards"]):
        raise damaged
    if not isinstance(info.get("names", {}), dict) or not isinstance(info.get("reencoded", {}), dict):
        raise damaged
    if not re.match(r"[a-z][a-z0-9+.-]*://[^/]", str(info.get("tars_at", "s3://bucket"))):
        raise damaged
    if "pixels" in info and not _are_pixels(info["pixels"]):
        raise damaged
    if not all(isinstance(name, str) for name in info["classes"]):
        raise damaged
    if not all(_is_file_name(shard["index"]) for shard in info["shards"]):  # a repair writes there
        raise damaged
    return info


def _are_pixels(pixels: Any) -> bool:
    if not _has_types(pixels, {"channels": int, "mean": list, "std": list}):
        return False
    values = [*pixels["mean"], *pixels["std"]]
    lengths = {pixels["channels"], len(pixels["mean"]), len(pixels["std"])}
    return len(lengths) == 1 and bool(values) and all(isinstance(value, float) for value in values)


def check_counts(info: dict[str, Any], name: str) -> None:
    """Raise DamagedError unless the shards' samples add up; ``name`` of the file is for the message."""
    if sum(shard["samples"] for shard in info["shards"]) != info["num_samples"]:
        raise DamagedError(f"{name} is damaged: its shards do not add up to {info['num_samples']} samples")


_DATASET_TYPES: dict[str, Any] = {
    "source": str,
    "split": (str, type(None)),
    "seed": int,
    "recipe": dict,
    "num_samples": int,
    "rejected": dict,
    "classes": list,
    "has_labels": bool,
    "samples_sha256": str,
    "shards": list,
}
_SHARD_TYPES = {"name": str, "index": str, "samples": int, "bytes": int, "sha256": str}


def _has_types(value: Any, types: dict[str, Any]) -> bool:
    return isinstance(value, dict) and all(name in value and isinstance(value[name], types[name]) for name in types)


def _is_file_name(name: str) -> bool:
    return os.path.basename(name) == name and name not in ("", ".", "..")


def _check_files(path: Path, info: dict[str, Any]) -> None:
    check_counts(info, str(path / DATASET_FILE))
    for shard in info["shards"]:
        file = os.path.join(path, shard["name"])  # a million Path objects would take as long as the stat calls
        try:
            size = os.stat(file).st_size
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise UserError(f"shard {file} is missing or unreadable ({error}): {REPLACE}") from None
        if size != shard["bytes"]:
            raise UserError(f"shard {file} has {size} bytes instead of {shard['bytes']}: {REPLACE}")


def open_rows(file: Path, info: dict[str, Any], name: str) -> np.ndarray:
    """Map samples.npy, ``file``: SAMPLE_DTYPE[num_samples]. Raises UserError, with ``name``, if ``info`` differs.

    If it is ``too_large_to_hash``, row_check.py compares it in a thread.
    """
    broken = UserError(f"{name} is missing, damaged or belongs to another dataset: {REPLACE}")
    try:
        check_regular(file)
        if file.stat().st_size <= HASHED_AT_OPEN and file_sha256(file) != info["samples_sha256"]:
            raise broken
        samples = map_array(file)
    except (OSError, ValueError):
        raise broken from None
    if samples.dtype != SAMPLE_DTYPE or samples.shape != (info["num_samples"],):
        raise broken
    if too_large_to_hash(samples) and hasattr(mmap, "MADV_RANDOM"):
        # Rows are read at random: 4 KB from the disk for each instead of the 128 KB that the kernel reads ahead.
        samples._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    if not too_large_to_hash(samples) and samples["label"].max(initial=-1) >= len(info["classes"]):
        raise UserError(f"{name} has labels that are no class of {DATASET_FILE}, so one is damaged: {REPLACE}")
    return samples


def too_large_to_hash(samples: np.ndarray) -> bool:
    """Whether samples.npy takes too long to hash before anything is read."""
    return samples.nbytes > HASHED_AT_OPEN


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(open_regular(path), "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
