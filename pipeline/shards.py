"""Owns one dataset on disk: its format, and reading pictures from it by sample id.

DIR/dataset.json       written last: without it the folder is no dataset
DIR/shard-000000.tar   plain WebDataset: KEY.cls (if labelled) and KEY.jpg (or png, webp, bmp, tiff, ppm)
DIR/shard-000000.idx   DALI's wds2idx v1.2 index of that tar
DIR/samples.npy        SAMPLE_DTYPE[num_samples]; the sample id is the row
DIR/rejected.jsonl     {"name", "reason"} of every picture that was refused
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import tarfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pipeline.errors import UserError
from pipeline.row_check import RowCheck

FORMAT_VERSION = 1
DATASET_FILE, SAMPLES_FILE, REJECTED_FILE, PARTIAL_DIR = "dataset.json", "samples.npy", "rejected.jsonl", ".partial"
SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),  # bytes from the start of the tar to the picture
        ("length", "<u4"),  # bytes
        ("label", "<i4"),  # -1 = none
        ("height", "<u2"),  # pixels as stored; EXIF orientation is ignored
        ("width", "<u2"),
        ("checksum", "<u4"),  # zlib.crc32 of the picture's bytes
    ]
)
OPEN_FILES = 512  # shards kept open at once, well below the usual limit of 1024 per process
_HASHED_AT_OPEN = 64 << 20  # bytes; up to here (2.4 million samples) samples.npy is hashed before anything is read
_REMEDY = "run make_shards again with the same SOURCE and options: it goes on with what is missing"
_SYSTEM_LIMITS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class BadSampleError(Exception):
    """One sample cannot be used. Training replaces it; the fields name it for the report."""

    def __init__(self, sample_id: int, shard: str, key: str, reason: str) -> None:
        """``shard`` is the tar's name, ``key`` the sample's key in it."""
        super().__init__(sample_id, shard, key, reason)
        self.sample_id, self.shard, self.key, self.reason = sample_id, shard, key, reason

    def __str__(self) -> str:
        """One line for people."""
        return f"sample {self.sample_id} (key {self.key} in {self.shard}): {self.reason}"


@dataclass(frozen=True)
class Shard:
    """One tar of a dataset, as dataset.json records it."""

    name: str  # path of the tar; relative to the dataset's folder unless absolute
    index: str  # DALI's index, in the dataset's folder
    samples: int
    bytes: int
    sha256: str


class _Shards(Sequence[Shard]):
    """The entries of dataset.json, made into objects when asked for: a million of them would take seconds."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return tuple(self[at] for at in range(*number.indices(len(self))))
        return Shard(**{name: self._entries[number][name] for name in _SHARD_TYPES})


class _OpenFile:
    """A file handle that closes when nobody uses it any more: a reader's own reference keeps it open while it reads."""

    def __init__(self, path: Path) -> None:
        self.handle = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            os.close(self.handle)


class ShardSet:
    """One complete dataset. Thread-safe; picklable (a copy opens the same folder again)."""

    def __init__(
        self,
        path: Path,
        info: dict[str, Any],
        samples: np.ndarray,
        verify_checksums: bool,
        row_check: RowCheck | None = None,
    ) -> None:
        """Use ``ShardSet.open``."""
        self.path = path
        self.info = info  # dataset.json
        self.samples = samples
        self._rows = samples.view(np.ndarray)  # the same memory; indexing a memmap object costs several times more
        self.verify_checksums = verify_checksums
        self._row_check = row_check  # None: nothing is left to be compared
        self.shards: Sequence[Shard] = _Shards(info["shards"])
        self.classes: tuple[str, ...] = tuple(info["classes"])
        self.num_samples: int = info["num_samples"]
        self.has_labels: bool = info["has_labels"]  # True: every sample has a label
        self.name: str = info["source"]
        self.split: str | None = info["split"]
        self.seed: int = info["seed"]  # of the shuffle when the shards were written
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path, *, verify_checksums: bool = True) -> ShardSet:
        """Open the dataset in folder ``path`` in well under a second: nothing is loaded, samples.npy is mapped.

        A large samples.npy is compared with its sha256 in a thread; what depends on that waits or is told.

        Raises UserError if it is missing, half-written, of another version, or its files' sizes disagree with
        dataset.json. ``verify_checksums``: compare each picture with its crc32 when it is read.
        """
        path = Path(path)
        info = read_dataset_file(path)
        samples = _open_samples(path, info)
        row_check = None
        if isinstance(samples, np.memmap) and samples.nbytes > _HASHED_AT_OPEN:
            file = path / SAMPLES_FILE
            row_check = RowCheck(file, samples, info["samples_sha256"], len(info["classes"]), _REPLACE)
        return cls(path, info, samples, verify_checksums, row_check)

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the path: the copy maps the same files."""
        return _reopen, (self.path, self.verify_checksums)

    def __len__(self) -> int:
        """Number of samples."""
        return self.num_samples

    def __repr__(self) -> str:
        """Path and size, for messages."""
        return f"ShardSet({str(self.path)!r}, {self.num_samples} samples in {len(self.shards)} shards)"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 that identifies the content (pictures, order, labels), wherever the files lie."""
        shards = [[s["samples"], s["bytes"], s["sha256"]] for s in self.info["shards"]]
        parts = [FORMAT_VERSION, self.num_samples, self.classes, self.info["samples_sha256"], shards]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def shard_samples(self) -> np.ndarray:
        """Int64[shards]: samples of each shard; sample ids count on from shard to shard."""
        return np.array([shard["samples"] for shard in self.info["shards"]], np.int64)

    def shards_of(self, ids: ArrayLike) -> np.ndarray:
        """Int64[n]: the shards that hold samples ``ids`` (int64[n])."""
        return self._rows[np.asarray(ids, np.int64)]["shard"].astype(np.int64)

    def sizes(self, ids: ArrayLike) -> np.ndarray:
        """Int32[n, 2]: height and width in pixels of samples ``ids`` (int64[n]), as stored."""
        rows = self._rows[np.asarray(ids, np.int64)]
        return np.stack([rows["height"], rows["width"]], axis=-1).astype(np.int32)

    def labels(self, ids: ArrayLike) -> np.ndarray:
        """Int32[n]: class numbers of samples ``ids`` (int64[n]); -1 = none. Waits as ``wait_until_verified`` does."""
        self.wait_until_verified()
        return self._rows[np.asarray(ids, np.int64)]["label"].astype(np.int32)

    def wait_until_verified(self) -> None:
        """Wait until samples.npy is known to be the recorded one. Raises UserError if it is not, or cannot be read."""
        if self._row_check is not None:
            self._row_check.wait()

    def shard_path(self, shard: int) -> Path:
        """Where the tar of shard ``shard`` lies."""
        return self.path / self.shards[shard].name

    def read(self, sample_id: int) -> bytes:
        """The encoded picture. Raises BadSampleError if it cannot be read or is not what was written.

        Raises UserError once samples.npy has turned out not to be the recorded one.
        """
        if self._row_check is not None:
            self._row_check.raise_if_wrong()
        row = self._rows[sample_id]
        shard, length = int(row["shard"]), int(row["length"])
        try:
            if int(row["offset"]) + length > self.shards[shard].bytes:
                raise self.bad_sample(sample_id, "samples.npy points beyond the end of the shard")
            if row["height"] == 0 or row["width"] == 0:
                raise self.bad_sample(sample_id, "samples.npy gives it no pixels")
            file = self._open_shard(shard)  # this reference keeps it open while other threads fill the cache
            data = os.pread(file.handle, length, int(row["offset"]))
        except OSError as error:
            if error.errno in _SYSTEM_LIMITS:  # this process' trouble, not the sample's
                raise
            raise self.bad_sample(sample_id, f"cannot be read: {error.strerror}") from error
        except IndexError:
            raise self.bad_sample(sample_id, f"samples.npy names shard {shard} of {len(self.shards)}") from None
        if len(data) != length:
            raise self.bad_sample(sample_id, f"the shard ends early: {len(data)} of {length} bytes")
        if self.verify_checksums and zlib.crc32(data) != int(row["checksum"]):
            raise self.bad_sample(sample_id, "checksum differs: the bytes have changed since the shard was written")
        return data

    def key(self, sample_id: int) -> str:
        """KEY of the sample, from the tar header before its bytes. Raises OSError or tarfile.TarError."""
        row = self._rows[sample_id]
        file = self._open_shard(int(row["shard"]))
        header = os.pread(file.handle, 512, int(row["offset"]) - 512)
        return split_key(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[0]

    def bad_sample(self, sample_id: int, reason: str) -> BadSampleError:
        """The error that names a sample for the report."""
        shard = int(self._rows[sample_id]["shard"])
        name = self.shards[shard].name if shard < len(self.shards) else f"shard {shard}"
        try:
            key = self.key(sample_id)
        except (OSError, IndexError, OverflowError, tarfile.TarError):
            key = "(unreadable)"
        return BadSampleError(int(sample_id), name, key, reason)

    def _open_shard(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                file = self._files[shard] = _OpenFile(self.shard_path(shard))
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(shard)
            return file


def _reopen(path: Path, verify_checksums: bool) -> ShardSet:
    return ShardSet.open(path, verify_checksums=verify_checksums)


def split_key(member: str) -> tuple[str, str]:
    """(key, extension) as WebDataset splits them: at the first dot of the base name."""
    folder, slash, base = member.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def read_dataset_file(path: Path, *, check_files: bool = True) -> dict[str, Any]:
    """dataset.json of folder ``path``, checked. Raises UserError naming what is wrong and what to do.

    ``check_files``: compare its counts and the sizes of the tars as well.
    """
    file = path / DATASET_FILE
    if not path.is_dir():
        raise UserError(f"no dataset at {path}: the folder does not exist; write one with tools/make_shards.py")
    if not file.exists():
        if (path / PARTIAL_DIR).exists():
            raise UserError(f"the dataset at {path} is half-written: {_REMEDY}")
        raise UserError(f"{path} is no dataset: it has no {DATASET_FILE}; write one with tools/make_shards.py")
    damaged = UserError(f"{file} is damaged: write the dataset again with --overwrite")
    try:
        info = json.loads(file.read_bytes())
        version = info["format_version"]
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {version}, this program reads {FORMAT_VERSION}: "
            "use the version of siamstream that wrote it, or write it again with --overwrite"
        )
    if not _has_types(info, _DATASET_TYPES) or not all(_has_types(shard, _SHARD_TYPES) for shard in info["shards"]):
        raise damaged
    if not all(isinstance(name, str) for name in info["classes"]):
        raise damaged
    if any(Path(shard["index"]).name != shard["index"] for shard in info["shards"]):  # a repair writes there
        raise damaged
    if check_files:
        _check_files(path, info)
    return info


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


def _check_files(path: Path, info: dict[str, Any]) -> None:
    if sum(shard["samples"] for shard in info["shards"]) != info["num_samples"]:
        raise UserError(f"{path / DATASET_FILE} is damaged: its shards do not add up to {info['num_samples']} samples")
    for shard in info["shards"]:
        file = os.path.join(path, shard["name"])  # a Path for each of a million shards would take as long as the look
        try:
            size = os.stat(file).st_size
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise UserError(f"shard {file} is missing or unreadable ({error}): {_REPLACE}") from None
        if size != shard["bytes"]:
            raise UserError(f"shard {file} has {size} bytes instead of {shard['bytes']}: {_REPLACE}")


_REPLACE = "copy it again from where the dataset came from, or write the dataset again with --overwrite"


def _open_samples(path: Path, info: dict[str, Any]) -> np.ndarray:
    file = path / SAMPLES_FILE
    broken = UserError(f"{file} is missing, damaged or belongs to another dataset: {_REPLACE}")
    try:
        if file.stat().st_size <= _HASHED_AT_OPEN and file_sha256(file) != info["samples_sha256"]:
            raise broken
        samples = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TokenError):  # what numpy raises for a damaged header
        raise broken from None
    if samples.dtype != SAMPLE_DTYPE or samples.shape != (info["num_samples"],):
        raise broken
    if samples.nbytes > _HASHED_AT_OPEN and hasattr(mmap, "MADV_RANDOM"):
        # Rows are read here and there: 4 KB from the disk for each instead of the 128 KB that the kernel reads ahead.
        samples._mmap.madvise(mmap.MADV_RANDOM)
    if samples.nbytes <= _HASHED_AT_OPEN and samples["label"].max(initial=-1) >= len(info["classes"]):
        raise UserError(f"{file} has labels that are no class of {path / DATASET_FILE}, so one is damaged: {_REPLACE}")
    return samples


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
