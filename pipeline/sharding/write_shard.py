"""Build one shard: selected images in; a tar, its DALI index and its rows of samples.npy out.

The bytes depend only on the listing, the order and the options: modification times, users and modes in the tar are
fixed, so equal images give equal bytes on every machine and with any number of workers.
"""

from __future__ import annotations

import errno
import io
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.files import map_array
from pipeline.dataset.format import PARTIAL_DIR, SAMPLE_DTYPE, Shard
from pipeline.dataset.names import encode_names
from pipeline.dataset.out_folder import LocalOut, OutFolder, RemoteOut, write_json
from pipeline.dataset.shard_tar import BLOCK, Component, ShardTar, write_index
from pipeline.sampling.order import sharding_order
from pipeline.sharding.decode_service import Decoders, OwnDecoders
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.prepare_image import PreparedImage, prepare_image
from pipeline.sources.channels import ChannelSums
from pipeline.sources.image_file import BadImageError
from pipeline.sources.listing import UNKNOWN_LENGTH, Listing, Rejected, rows_of
from pipeline.sources.readers import Reader

Tick = Callable[[int, int], None]  # (images, bytes) done since the last call; may raise to stop the work
_READS_AHEAD = 16  # remote images that a worker has requested at a time
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]+")
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
    sums: ChannelSums | None = None  # of --channels


class Job(ABC):
    """A dataset being made: numbered shards that can be built in any order by any process."""

    out: Path  # on a disk; of a bucket, a folder of this machine for the time of the work
    remote: RemoteOut | None = None  # OUT if it is a bucket
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

    def sources(self) -> list[Path]:
        """Files and folders that a machine must have in order to build shards."""
        return []

    def only(self, number: int) -> Job:
        """This job for a worker that builds shard ``number`` and no other: small, since it goes over a network."""
        return self

    @abstractmethod
    def build(self, number: int, tick: Tick) -> None:
        """Build shard ``number`` and write its marker. Raises OSError, UserError, and the exceptions of ``tick``."""

    @property
    def store(self) -> OutFolder:
        """The folder that the dataset is written to."""
        return self.remote or LocalOut(self.out)

    def has_marker(self, number: int) -> bool:
        """Whether shard ``number`` was finished, its tar not being looked at."""
        return self.store.has(f"{_DONE}/{_stem(number)}.json")

    def done(self, number: int) -> dict[str, Any] | None:
        """The record of a finished shard; None if unfinished.

        {"shard": Shard, "rejected": [[name, reason]], "reencoded": [[name, reason]]}
        """
        return next(self.records([number]))

    def records(self, numbers: Sequence[int]) -> Iterator[dict[str, Any] | None]:
        """``done`` of each of ``numbers``, in order. One listing of a bucket serves all of them."""
        sizes = self.store.sizes() if len(numbers) else {}
        markers = self.store.sizes(_DONE) if len(numbers) else {}
        there = [number for number in numbers if f"{_stem(number)}.json" in markers]
        read = zip(there, self.store.read_many(f"{_DONE}/{_stem(number)}.json" for number in there), strict=True)
        found = next(read, None)
        for number in numbers:
            if found is None or found[0] != number:
                yield None
                continue
            yield self._record(number, found[1], sizes)
            found = next(read, None)

    def _record(self, number: int, marker: bytes | None, sizes: dict[str, int]) -> dict[str, Any] | None:
        try:
            record = json.loads(marker or b"")
            shard = Shard(**record["shard"])
            if shard.samples == 0 or self.is_whole(number, shard, sizes):
                return record
        except (ValueError, KeyError, TypeError):
            pass  # unfinished, or damaged by a crash of the machine: build it again
        return None

    def is_whole(self, number: int, shard: Shard, sizes: dict[str, int]) -> bool:
        """Whether the tar of shard ``number`` has the recorded length; ``sizes``: of the files in OUT."""
        return sizes.get(shard.name) == shard.bytes

    def all_rows(self, numbers: Iterable[int]) -> Iterator[np.ndarray]:
        """Rows of samples.npy for finished shards: SAMPLE_DTYPE[samples], field ``shard`` not yet set."""
        for data in self.store.read_many(f"{_DONE}/{_stem(number)}.npy" for number in numbers):
            yield np.load(io.BytesIO(data or b""), allow_pickle=False)

    def encoded_names(self, numbers: Iterable[int]) -> Iterator[bytes]:
        """The names of finished shards, as ``pipeline.dataset.names`` encodes them."""
        for data in self.store.read_many(f"{_DONE}/{_stem(number)}.names" for number in numbers):
            yield data or b""

    def finish(self, number: int, tar: str, size: int, sha256: str, parts: ShardParts, index: str) -> None:
        """Write the sidecar files of a finished tar; the marker is written last."""
        if parts.rows:
            with self.store.writer(index) as file:
                write_index(file, parts.samples)
        stem = f"{_DONE}/{_stem(number)}"
        with self.store.writer(f"{stem}.npy") as file:
            np.save(file, np.array(parts.rows, SAMPLE_DTYPE))
        with self.store.writer(f"{stem}.names") as file:
            file.write(encode_names(parts.names))
        shard = Shard(tar, index, len(parts.rows), size, sha256)
        lists = {"rejected": parts.rejected, "reencoded": parts.reencoded}
        named = {kind: [[entry.name, entry.reason] for entry in entries] for kind, entries in lists.items()}
        words = {"words": list(parts.words), "numbered": parts.numbered} if parts.words or parts.numbered else {}
        sums = {} if parts.sums is None else {"sums": asdict(parts.sums)}
        write_json(self.store, f"{stem}.json", {"shard": asdict(shard), **named, **words, **sums})


_DONE = f"{PARTIAL_DIR}/done"


def _stem(number: int) -> str:
    return f"shard-{number:06d}"


@dataclass(frozen=True)
class ComputedOrder:
    """The image numbers at positions 0 .. count - 1, of ``images``: computed where they are asked for."""

    images: int
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        """Int64[n] of a slice."""
        return sharding_order(self.images, self.seed, np.arange(*part.indices(self.count)))


@dataclass(frozen=True)
class ShardRows:
    """The images of one shard: their numbers in the source, and the rows of the listing in the same order."""

    numbers: list[int]
    listing: Listing


@dataclass
class WriteJob(Job):
    """The images of a source, permuted and divided into shards of ``options.samples_per_shard``.

    Every worker of this machine maps the listing and the order from OUT/.partial instead of receiving a copy; one of
    another machine gets the rows of its shard.
    """

    out: Path
    reader: Reader
    options: ShardingOptions
    work: Path | None = None  # where listing and order are; None: in OUT
    rows: ShardRows | None = None  # all that this job knows of the source

    @cached_property
    def listing(self) -> Listing:
        return Listing.load(self._work / "listing")

    @property
    def _work(self) -> Path:
        return self.work or self.out / PARTIAL_DIR

    @cached_property
    def order(self) -> np.ndarray | ComputedOrder:
        """Int64[n]: image numbers in the order of writing."""
        count = len(self.listing)
        if self.options.shuffle == "permutation":
            return ComputedOrder(count, min(count, self.options.limit or count), self.options.seed)
        return map_array(self._work / "order.npy")

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
        return sum(_room(self.listing.lengths[self._chosen(n)]) for n in numbers)

    def build(self, number: int, tick: Tick) -> None:
        """Read, check and write the images of one shard."""
        name = f"{_stem(number)}.tar"
        with self.store.large(name) as file:
            tar = ShardTar(file)
            parts = self._write(tar, number, tick)
            sha256 = tar.end()
        if not parts.rows:
            self.store.remove([name])
        self.finish(number, name, tar.size, sha256, parts, f"{_stem(number)}.idx")

    def _chosen(self, number: int) -> np.ndarray:
        """Int64[n]: the images of a shard."""
        first = number * self.options.samples_per_shard
        return self.order[first : first + self.options.samples_per_shard]

    def sources(self) -> list[Path]:
        """SOURCE, unless it is behind a URL."""
        places = getattr(self.reader, "paths", None) or [getattr(self.reader, "root", None)]
        return [place for place in places if isinstance(place, Path)]

    def only(self, number: int) -> WriteJob:
        """This job with the rows of shard ``number``: 2048 of them are 0.2 MB."""
        chosen = self._chosen(number)
        listing = replace(rows_of(self.listing, chosen), rejected=(), classes=())
        job = replace(self, rows=ShardRows(chosen.tolist(), listing))
        job.remote, job.decoders = self.remote, self.decoders
        return job

    def __getstate__(self) -> dict[str, Any]:
        """Without the mapped arrays, of which a pickle would hold a copy."""
        return {name: value for name, value in self.__dict__.items() if name not in ("listing", "order")}

    def _write(self, tar: ShardTar, number: int, tick: Tick) -> ShardParts:
        parts = ShardParts([], [], [])
        if self.rows is None:
            numbers = rows = self._chosen(number).tolist()
            listing = self.listing
        else:
            numbers, listing = self.rows.numbers, self.rows.listing
            rows = list(range(len(numbers)))
        for image_number, (row, read) in zip(numbers, _reads(self.reader, listing, rows), strict=True):
            length, name = 0, listing.name(row)
            try:
                image = prepare_image(read(), self.options, self.decoders)
                length = len(image.data)
                self._add(tar, sample_key(image_number, name), name, int(listing.labels[row]), image, parts)
            except BadImageError as error:
                parts.rejected.append(Rejected(name, str(error)))
            tick(1, length)
        return parts

    def _add(self, tar: ShardTar, key: str, name: str, label: int, image: PreparedImage, parts: ShardParts) -> None:
        members = {image.extension: image.data}
        if label >= 0:
            members["cls"] = str(label).encode()
        components = tar.add(key, members)
        offset = next(c.offset for c in components if c.extension == image.extension)
        parts.rows.append((0, offset, len(image.data), label, image.height, image.width, zlib.crc32(image.data)))
        parts.samples.append(components)
        parts.names.append(name)
        if image.sums is not None and parts.sums is not None:
            parts.sums.add(image.sums)
        else:
            parts.sums = image.sums
        if image.change is not None:
            parts.reencoded.append(Rejected(name, image.change))


def _room(lengths: np.ndarray) -> int:
    return int((np.maximum(lengths, 0) + 2 * BLOCK).sum())


def _reads(reader: Reader, listing: Listing, indices: list[int]) -> Iterator[tuple[int, Callable[[], bytes]]]:
    """(number of an image, a function that gives its bytes or raises as ``read_image``); remote ones are read ahead."""
    if not getattr(reader, "is_remote", False):
        for index in indices:
            yield index, partial(read_image, reader, listing, index)
        return
    with ThreadPoolExecutor(_READS_AHEAD) as pool:
        todo, running = iter(indices), deque[tuple[int, Future[bytes]]]()
        try:
            while True:
                for index in islice(todo, _READS_AHEAD - len(running)):
                    running.append((index, pool.submit(read_image, reader, listing, index)))
                if not running:
                    return
                index, future = running.popleft()
                yield index, future.result
        finally:
            for _, future in running:
                future.cancel()


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
    base = name.rpartition("/")[2]
    dot = base.rfind(".")
    return _NOT_IN_KEYS.sub("_", base[:dot] if 0 < dot < len(base) - 1 else base)[:_KEY_STEM]
