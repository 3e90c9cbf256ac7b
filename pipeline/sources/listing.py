"""The table of a source's images: names, byte ranges and labels as flat arrays.

A source fills a ``ListingBuilder``; the ``Listing`` is saved once and memory-mapped by every worker process. 14 million
images take about 1 GB this way; as Python objects they would take several times as much in each process.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise, repeat
from pathlib import Path

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, map_array, read_object, write_json
from pipeline.sources.columns import Column
from pipeline.sources.image_file import IMAGE_SUFFIXES

UNKNOWN_LENGTH = -1
_COLUMNS = ("names", "name_starts", "offsets", "lengths", "labels")
_VERSIONS = "versions"  # a column of remote sources


NO_IMAGE_NAME = "not an image file"
SYSTEM_FOLDER = "in a folder of the system or of a device, not of images"
MOST_BYTES = 1 << 30  # of one encoded image: it is read into memory as a whole
# Windows, macOS, Linux, Synology, QNAP; other folders of this kind are hidden ones
SYSTEM_NAMES = (
    r"\$recycle\.bin|recycler|system volume information|__macosx|lost\+found|@eadir|#recycle|@recycle|@__thumb"
)
_SYSTEM_FOLDERS = re.compile(rf"(?:^|/)(?:{SYSTEM_NAMES})/", re.IGNORECASE)


def is_system_folder(name: str) -> bool:
    """Whether a folder of this name holds thumbnails, deleted files or the like."""
    return re.fullmatch(SYSTEM_NAMES, name, re.IGNORECASE) is not None


def suffix(name: str) -> str:
    """The ending of the last component of ``name`` in small letters, without its dot; "" if it has none."""
    stem, _, ending = name.rpartition("/")[2].rpartition(".")
    return ending.lower() if stem else ""


def plain_name(name: str) -> str:
    """A member's name without leading slash, "." and ".." components; used for display and labels, never as a path."""
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))


def inside(name: str, subtree: str) -> str | None:
    """The plain name of an archive's member relative to folder ``subtree``; None if it is elsewhere or hidden."""
    name, below = plain_name(name), plain_name(subtree)
    if below:
        if not name.startswith(f"{below}/"):
            return None
        name = name[len(below) + 1 :]
    return None if name.startswith(".") or "/." in name else name


def kinds_of(rejected: Iterable[Rejected]) -> str:
    """Entries that are not named like images, counted by ending: "412 .heic, 3 .mp4"; "" if there are none."""
    counts = Counter(suffix(entry.name) for entry in rejected if entry.reason == NO_IMAGE_NAME)
    kinds = sorted(counts.items(), key=lambda kind: (-kind[1], kind[0]))
    shown = [f"{count:,} {f'.{ending}' if ending else 'without an ending'}" for ending, count in kinds[:_KINDS_SHOWN]]
    return ", ".join(shown) + (f" and {len(kinds) - _KINDS_SHOWN} other kinds" if len(kinds) > _KINDS_SHOWN else "")


_KINDS_SHOWN = 8


@dataclass(frozen=True)
class Rejected:
    """An image that was refused: its name in the source and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The images of one source, sorted by name. Row i is image i; arrays have n rows, ``name_starts`` n + 1."""

    names: np.ndarray  # uint8: all names one after the other, as bytes of the file system
    name_starts: np.ndarray  # int64
    offsets: np.ndarray  # int64, bytes: where the image starts in its container; 0 in a folder
    lengths: np.ndarray  # int64, bytes; UNKNOWN_LENGTH if it is only known after reading
    labels: np.ndarray  # int32; -1 = none
    classes: tuple[str, ...]
    rejected: tuple[Rejected, ...]
    versions: np.ndarray | None = None  # uint64, of remote files: what changes when the file does; 0 if unknown

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Name of image ``index`` within the source; bytes that are not UTF-8 are surrogate-escaped."""
        start, stop = self.name_starts[index : index + 2]
        return bytes(self.names[start:stop]).decode("utf-8", "surrogateescape")

    def version(self, index: int) -> int:
        """What changes when the file of image ``index`` does; 0 if unknown."""
        return 0 if self.versions is None else int(self.versions[index])

    def fingerprint(self) -> str:
        """sha256 over names, lengths, labels and classes. A changed file of the same length goes unnoticed."""
        digest = hashlib.sha256()
        for column in (self.names, self.name_starts, self.lengths, self.labels):
            for first in range(0, len(column), _AT_ONCE):
                digest.update(np.ascontiguousarray(column[first : first + _AT_ONCE]).data)
        digest.update(json.dumps([self.classes, [[r.name, r.reason] for r in self.rejected]]).encode())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write the columns into ``folder``, each atomically; meta.json last."""
        folder.mkdir(parents=True, exist_ok=True)
        for column in (*_COLUMNS, *((_VERSIONS,) if self.versions is not None else ())):
            with atomic_file(folder / f"{column}.npy") as file:
                np.save(file, getattr(self, column))
        rejected = [[r.name, r.reason] for r in self.rejected]
        write_json(folder / "meta.json", {"classes": self.classes, "rejected": rejected})

    @classmethod
    def load(cls, folder: Path) -> Listing:
        """Map a saved listing. Raises OSError if it does not exist, and ValueError if it is damaged."""
        meta = read_object(folder / "meta.json")
        there = (*_COLUMNS, *((_VERSIONS,) if (folder / f"{_VERSIONS}.npy").exists() else ()))
        maps = {c: map_array(folder / f"{c}.npy") for c in there}
        columns = {c: column.view(np.ndarray) for c, column in maps.items()}  # memmap itself is slow to index
        rejected = tuple(Rejected(name, reason) for name, reason in meta["rejected"])
        return cls(**columns, classes=tuple(meta["classes"]), rejected=rejected)


class ListingBuilder:
    """Collects images in any order; ``build`` sorts them by name, so that a folder and a tar of it agree.

    Its columns grow on the disk. Where names come in order, as those of folders and buckets do, memory stays flat.
    """

    def __init__(self, source: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> None:
        """``source``: as the user wrote it, for messages; ``suffixes``: those of images."""
        self.source, self._suffixes = source, suffixes
        self._endings = tuple(f".{ending}" for ending in sorted(suffixes))  # others may differ in capitals alone
        self.rejected: list[Rejected] = []
        self._names, self._ends = Column(np.uint8), Column(np.int64)  # each name ends at a byte of all names
        self._offsets, self._lengths = Column(np.int64), Column(np.int64)
        self._labels = Column(np.int32)  # only for sources that know them; else empty
        self._versions = Column(np.uint64)  # likewise
        self._in_order, self._last = True, b""

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, name: str, offset: int, length: int, label: int | None = None, version: int | None = None) -> None:
        """Add one entry; a name without an image's extension goes to ``rejected``."""
        if suffix(name) not in self._suffixes:
            self.reject(name, NO_IMAGE_NAME)
            return
        if _SYSTEM_FOLDERS.search(name):
            self.reject(name, SYSTEM_FOLDER)
            return
        if length > MOST_BYTES:
            self.reject(name, f"larger than {MOST_BYTES >> 20:,} MiB")
            return
        self._append([name.encode("utf-8", "surrogateescape")])
        self._offsets.extend([offset])
        self._lengths.extend([length])
        if label is not None:
            self._labels.extend([label])
        if version is not None:
            self._versions.extend([version])

    def add_files(self, names: Sequence[str], lengths: Sequence[int], versions: Sequence[int] = ()) -> None:
        """``add`` of many files that begin at byte 0, at a fraction of its cost where nothing is to be rejected."""
        plain = all(name.endswith(self._endings) for name in names) and max(lengths, default=0) <= MOST_BYTES
        if not plain or _SYSTEM_FOLDERS.search("/".join(names)) is not None:
            for name, length, version in zip(names, lengths, versions or repeat(None, len(names)), strict=True):
                self.add(name, 0, length, version=version)
            return
        self._append([name.encode("utf-8", "surrogateescape") for name in names])
        self._offsets.extend(np.zeros(len(names), np.int64))
        self._lengths.extend(lengths)
        self._versions.extend(versions)

    def _append(self, names: list[bytes]) -> None:
        if not names:
            return
        if self._in_order:
            follows = len(self) == 0 or self._last < names[0]
            self._in_order = follows and all(map(operator.lt, names, islice(names, 1, None)))
            self._last = names[-1]
        start = len(self._names)
        self._names.extend(b"".join(names))
        self._ends.extend(start + np.cumsum(np.fromiter(map(len, names), np.int64, len(names))))

    def extend(self, other: ListingBuilder) -> None:
        """Add all that ``other`` has collected behind this one's; ``other`` must not be used afterwards."""
        self.rejected += other.rejected
        if len(other) == 0:
            return
        names, ends = other._names.finish(), other._ends.finish()
        self._in_order = self._in_order and other._in_order and (len(self) == 0 or self._last < bytes(names[: ends[0]]))
        start, self._last = len(self._names), other._last
        for first in range(0, len(names), _AT_ONCE):
            self._names.extend(names[first : first + _AT_ONCE])
        for first in range(0, len(ends), _AT_ONCE):
            self._ends.extend(start + ends[first : first + _AT_ONCE])
        for mine, more in (
            (self._offsets, other._offsets),
            (self._lengths, other._lengths),
            (self._labels, other._labels),
            (self._versions, other._versions),
        ):
            values = more.finish()
            for first in range(0, len(values), _AT_ONCE):
                mine.extend(values[first : first + _AT_ONCE])

    def reject(self, name: str, reason: str) -> None:
        """Record an entry that is not used, with the reason."""
        self.rejected.append(Rejected(name, reason))

    def build(self, classes: Sequence[str] = ()) -> Listing:
        """Sort by name. Raises UserError if there is no image at all."""
        if not len(self):
            raise UserError(
                f"no images in {self.source}{self._seen()}. Check the path, --subtree, and that they are named as "
                "images are: --help lists the endings"
            )
        starts = Column(np.int64)
        starts.extend([0])
        ends = self._ends.finish()
        for first in range(0, len(ends), _AT_ONCE):
            starts.extend(ends[first : first + _AT_ONCE])
        names = self._names.finish()
        listing = Listing(
            names=names,
            name_starts=starts.finish(),
            offsets=self._offsets.finish(),
            lengths=self._lengths.finish(),
            labels=self._labels.finish() if len(self._labels) else no_labels(len(ends)),
            classes=tuple(classes),
            rejected=(),
            versions=self._versions.finish() if len(self._versions) else None,
        )
        if not self._in_order:
            listing = rows_of(listing, np.array(self._sorted_unique(listing), np.int64))
        return replace(listing, rejected=tuple(sorted(self.rejected, key=lambda r: (r.name, r.reason))))

    def _seen(self) -> str:
        if not self.rejected:
            return ""
        kinds = f" ({text})" if (text := kinds_of(self.rejected)) else ""
        first = self.rejected[0]
        return f"; {len(self.rejected)} other entries{kinds} were seen, the first: {first.name!r}, {first.reason}"

    def _sorted_unique(self, listing: Listing) -> list[int]:
        """Rows sorted by name. A later entry of the same name replaces the earlier one, as when a tar is unpacked."""
        starts = listing.name_starts.tolist()
        names = [bytes(listing.names[start:end]) for start, end in pairwise(starts)]
        order = sorted(range(len(names)), key=names.__getitem__)
        kept = []
        for position, row in enumerate(order):
            later = order[position + 1] if position + 1 < len(order) else None
            if later is not None and names[later] == names[row]:
                name = names[row].decode("utf-8", "surrogateescape")
                self.reject(name, "replaced by a later entry of the same name")
            else:
                kept.append(row)
        return kept


def no_labels(count: int) -> np.ndarray:
    """Int32[count] of -1, which takes no memory."""
    return np.broadcast_to(np.int32(-1), count)


_AT_ONCE = 1 << 20  # values in memory at a time


def select(listing: Listing, mask: np.ndarray, rejected: tuple[Rejected, ...]) -> Listing:
    """The rows where ``mask`` (bool[n]) is true, with ``rejected`` added for the others."""
    rows = np.flatnonzero(mask)
    if len(rows) == 0:
        raise UserError("no image is left after choosing: check --subtree and --labels")
    everything = sorted((*listing.rejected, *rejected), key=lambda r: (r.name, r.reason))
    return replace(rows_of(listing, rows), rejected=tuple(everything))


def rows_of(listing: Listing, rows: np.ndarray) -> Listing:
    """The images ``rows`` (int64[m]) in this order, as a listing in memory."""
    starts, ends = listing.name_starts[rows], listing.name_starts[rows + 1]
    names = [bytes(listing.names[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    new_starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(ends - starts, out=new_starts[1:])
    return replace(
        listing,
        names=np.frombuffer(b"".join(names), np.uint8),
        name_starts=new_starts,
        offsets=listing.offsets[rows],
        lengths=listing.lengths[rows],
        labels=listing.labels[rows],
        versions=None if listing.versions is None else listing.versions[rows],
    )
