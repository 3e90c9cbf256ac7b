"""Build one shard: selected images in; a tar, its DALI index and its rows of samples.npy out.

The bytes depend only on the listing, the order and the options: modification times, users and modes in the tar are
fixed, so equal images give equal bytes on every machine and with any number of workers.
"""

from __future__ import annotations

import errno
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, write_json
from pipeline.dataset.format import PARTIAL_DIR, SAMPLE_DTYPE, Shard
from pipeline.dataset.names import encode_names
from pipeline.dataset.shard_tar import BLOCK, Component, ShardTar, write_index
from pipeline.sharding.decode_service import Decoders, OwnDecoders
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.prepare_image import PreparedImage, prepare_image
from pipeline.sources.image_file import BadImageError
from pipeline.sources.listing import UNKNOWN_LENGTH, Listing, Rejected
from pipeline.sources.readers import Reader

Tick = Callable[[int, int], None]  # (images, bytes) done since the last call; may raise to stop the work
_KEY_STEM = 60  # characters of the original name in a key; a member's name then always fits a plain tar header


@dataclass
class ShardParts:
    """Contents of a finished tar in the tar's order: rows (SAMPLE_DTYPE), lines of the index, refused images."""

    rows: list[tuple[int, ...]]
    samples: list[list[Component]]
    rejected: list[Rejected]
    words: dict[str, int] = field(default_factory=dict)  # classes that are words, and the labels of the rows for them
    numbered: str = ""  # a sample whose class is a number, for people
    names: list[str] = field(default_factory=list)  # of each row: the image's path in the source
    reencoded: list[Rejected] = field(default_factory=list)  # images that were re-encoded, and why


class Job(ABC):
    """A dataset being made: numbered shards that can be built in any order by any process."""

    out: Path
    decoders: Decoders | None = OwnDecoders()  # worker processes set theirs; None: compare nothing

    @abstractmethod
    def __len__(self) -> int:
        """Number of shards."""

    @abstractmethod
    def images(self, numbers: list[int]) -> int | None:
        """Number of images to read for shards ``numbers``; None if unknown before the work."""

    def room(self, numbers: list[int]) -> int:
        """Estimated bytes that shards ``numbers`` will take on the disk of OUT; 0 if none or unknown."""
        return 0

    @abstractmethod
    def build(self, number: int, tick: Tick) -> None:
        """Build shard ``number`` and write its marker. Raises OSError, UserError, and the exceptions of ``tick``."""

    def done(self, number: int) -> dict[str, Any] | None:
        """The record of a finished shard; None if unfinished.

        {"shard": Shard, "rejected": [[name, reason]], "reencoded": [[name, reason]]}
        """
        try:
            record = json.loads(self._marker(number).read_text())
            shard = Shard(**record["shard"])
            if shard.samples == 0 or (self.out / shard.name).stat().st_size == shard.bytes:
                return record
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # unfinished, or damaged by a crash of the machine: build it again
        return None

    def rows(self, number: int) -> np.ndarray:
        """Rows of samples.npy for finished shard ``number``: SAMPLE_DTYPE[samples], field ``shard`` not yet set."""
        return np.load(self._marker(number).with_suffix(".npy"), allow_pickle=False)

    def names_file(self, number: int) -> Path:
        """The names of finished shard ``number``, as ``pipeline.dataset.names`` encodes them."""
        return self._marker(number).with_suffix(".names")

    def finish(self, number: int, tar: str, size: int, sha256: str, parts: ShardParts, index: str) -> None:
        """Write the sidecar files of a finished tar; the marker is written last."""
        if parts.rows:
            write_index(self.out / index, parts.samples, self.out / PARTIAL_DIR)
        self._marker(number).parent.mkdir(exist_ok=True)
        with atomic_file(self._marker(number).with_suffix(".npy")) as file:
            np.save(file, np.array(parts.rows, SAMPLE_DTYPE))
        with atomic_file(self.names_file(number)) as file:
            file.write(encode_names(parts.names))
        shard = Shard(tar, index, len(parts.rows), size, sha256)
        lists = {"rejected": parts.rejected, "reencoded": parts.reencoded}
        named = {kind: [[entry.name, entry.reason] for entry in entries] for kind, entries in lists.items()}
        words = {"words": list(parts.words), "numbered": parts.numbered} if parts.words or parts.numbered else {}
        write_json(self._marker(number), {"shard": asdict(shard), **named, **words})

    def _marker(self, number: int) -> Path:
        return self.out / PARTIAL_DIR / "done" / f"shard-{number:06d}.json"


@dataclass
class WriteJob(Job):
    """The images of a source, permuted and divided into shards of ``options.samples_per_shard``.

    Every worker maps the listing and the order from OUT/.partial instead of receiving a copy.
    """

    out: Path
    reader: Reader
    options: ShardingOptions

    @cached_property
    def listing(self) -> Listing:
        return Listing.load(self.out / PARTIAL_DIR / "listing")

    @cached_property
    def order(self) -> np.ndarray:
        """Int64[n]: image numbers in the order of writing."""
        return np.load(self.out / PARTIAL_DIR / "order.npy", mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return -(-len(self.order) // self.options.samples_per_shard)

    def images(self, numbers: list[int]) -> int:
        """Number of images of shards ``numbers``, including those that will be refused."""
        per_shard = self.options.samples_per_shard
        return sum(min(per_shard, len(self.order) - n * per_shard) for n in numbers)

    def room(self, numbers: list[int]) -> int:
        """Bytes of the images and their tar headers."""
        if self.options.shorter_side is not None:
            return 0
        per_shard = self.options.samples_per_shard
        return sum(_room(self.listing.lengths[self.order[n * per_shard : (n + 1) * per_shard]]) for n in numbers)

    def build(self, number: int, tick: Tick) -> None:
        """Read, check and write the images of one shard."""
        first = number * self.options.samples_per_shard
        chosen = self.order[first : first + self.options.samples_per_shard]
        path = self.out / f"shard-{number:06d}.tar"
        with atomic_file(path, self.out / PARTIAL_DIR) as file:
            tar = ShardTar(file)
            parts = self._write(tar, chosen, tick)
            sha256 = tar.end()
        if not parts.rows:
            path.unlink()
        self.finish(number, path.name, tar.size, sha256, parts, path.with_suffix(".idx").name)

    def _write(self, tar: ShardTar, chosen: np.ndarray, tick: Tick) -> ShardParts:
        parts = ShardParts([], [], [])
        for index in chosen.tolist():
            length, name = 0, self.listing.name(index)
            try:
                image = prepare_image(read_image(self.reader, self.listing, index), self.options, self.decoders)
                length = len(image.data)
                self._add(tar, index, name, image, parts)
            except BadImageError as error:
                parts.rejected.append(Rejected(name, str(error)))
            tick(1, length)
        return parts

    def _add(self, tar: ShardTar, index: int, name: str, image: PreparedImage, parts: ShardParts) -> None:
        members = {image.extension: image.data}
        if (label := int(self.listing.labels[index])) >= 0:
            members["cls"] = str(label).encode()
        components = tar.add(sample_key(index, name), members)
        offset = next(c.offset for c in components if c.extension == image.extension)
        parts.rows.append((0, offset, len(image.data), label, image.height, image.width, zlib.crc32(image.data)))
        parts.samples.append(components)
        parts.names.append(name)
        if image.change is not None:
            parts.reencoded.append(Rejected(name, image.change))


def _room(lengths: np.ndarray) -> int:
    return int((np.maximum(lengths, 0) + 2 * BLOCK).sum())


def read_image(reader: Reader, listing: Listing, index: int) -> bytes:
    """The bytes of image ``index``.

    Raises BadImageError for missing permissions, UserError if the source fails or has changed: an unmounted disk must
    stop the run instead of refusing thousands of images.
    """
    name, expected = listing.name(index), int(listing.lengths[index])
    try:
        data = reader.read(listing, index)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise BadImageError("cannot be read: permission denied") from None
        raise UserError(
            f"cannot read {name!r} of the source: {error.strerror}; restore the source, then run the same command again"
        ) from error
    if expected != UNKNOWN_LENGTH and len(data) != expected:
        raise UserError(
            f"{name!r} of the source had {expected} bytes and has {len(data)} now: it changes while it is read; "
            "wait until it is final, then run again with --overwrite"
        )
    return data


def sample_key(index: int, name: str) -> str:
    """A unique key of plain characters: the image's number in the source and its name without dots and slashes."""
    return f"{index:09d}_{key_stem(name)}"


def key_stem(name: str) -> str:
    """What a key says of the image's name: all of the key after its first underscore."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", PurePosixPath(name).stem)[:_KEY_STEM]
