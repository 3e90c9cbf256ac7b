"""The table of a source's images: names, byte ranges and labels as flat arrays.

A source fills a ``ListingBuilder``; the ``Listing`` is saved once and memory-mapped by every worker process. 14 million
images take about 1 GB this way; as Python objects they would take several times as much in each process.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file, write_json
from pipeline.sources.image_file import IMAGE_SUFFIXES

UNKNOWN_LENGTH = -1
_COLUMNS = ("names", "name_starts", "offsets", "lengths", "labels")
_VERSIONS = "versions"  # a column of remote sources


NO_IMAGE_NAME = "not an image file"
SYSTEM_FOLDER = "in a folder of the system or of a device, not of images"
MOST_BYTES = 1 << 30  # of one encoded image: it is read into memory as a whole
# Windows, macOS, Linux, Synology, QNAP; other folders of this kind are hidden ones
_SYSTEM_NAMES = (
    r"\$recycle\.bin|recycler|system volume information|__macosx|lost\+found|@eadir|#recycle|@recycle|@__thumb"
)
_SYSTEM_FOLDERS = re.compile(rf"(?:^|/)(?:{_SYSTEM_NAMES})/", re.IGNORECASE)


def is_system_folder(name: str) -> bool:
    """Whether a folder of this name holds thumbnails, deleted files or the like."""
    return re.fullmatch(_SYSTEM_NAMES, name, re.IGNORECASE) is not None


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
            digest.update(np.ascontiguousarray(column).data)
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
        """Map a saved listing. Raises OSError if it does not exist."""
        meta = json.loads((folder / "meta.json").read_text())
        there = (*_COLUMNS, *((_VERSIONS,) if (folder / f"{_VERSIONS}.npy").exists() else ()))
        maps = {c: np.load(folder / f"{c}.npy", mmap_mode="r", allow_pickle=False) for c in there}
        columns = {c: column.view(np.ndarray) for c, column in maps.items()}  # memmap itself is slow to index
        rejected = tuple(Rejected(name, reason) for name, reason in meta["rejected"])
        return cls(**columns, classes=tuple(meta["classes"]), rejected=rejected)


@dataclass
class ListingBuilder:
    """Collects images in any order; ``build`` sorts them by name, so that a folder and a tar of it agree."""

    source: str  # as the user wrote it, for messages
    names: list[bytes] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # only for sources that know them; else empty
    versions: list[int] = field(default_factory=list)  # likewise
    rejected: list[Rejected] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, offset: int, length: int, label: int | None = None, version: int | None = None) -> None:
        """Add one entry; a name without an image's extension goes to ``rejected``."""
        if suffix(name) not in IMAGE_SUFFIXES:
            self.reject(name, NO_IMAGE_NAME)
            return
        if _SYSTEM_FOLDERS.search(name):
            self.reject(name, SYSTEM_FOLDER)
            return
        if length > MOST_BYTES:
            self.reject(name, f"larger than {MOST_BYTES >> 20:,} MiB")
            return
        self.names.append(name.encode("utf-8", "surrogateescape"))
        self.offsets.append(offset)
        self.lengths.append(length)
        if label is not None:
            self.labels.append(label)
        if version is not None:
            self.versions.append(version)

    def reject(self, name: str, reason: str) -> None:
        """Record an entry that is not used, with the reason."""
        self.rejected.append(Rejected(name, reason))

    def build(self, classes: Sequence[str] = ()) -> Listing:
        """Sort by name. Raises UserError if there is no image at all."""
        if not self.names:
            raise UserError(
                f"no images in {self.source}{self._seen()}. Check the path, --subtree, and that they are named as "
                "images are: --help lists the endings"
            )
        order = self._sorted_unique()
        names = [self.names[i] for i in order]
        starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum([len(name) for name in names], out=starts[1:])
        rows = np.array(order, np.int64)
        labels = np.array(self.labels, np.int32)[rows] if self.labels else np.full(len(order), -1, np.int32)
        return Listing(
            names=np.frombuffer(b"".join(names), np.uint8),
            name_starts=starts,
            offsets=np.array(self.offsets, np.int64)[rows],
            lengths=np.array(self.lengths, np.int64)[rows],
            labels=labels,
            classes=tuple(classes),
            rejected=tuple(sorted(self.rejected, key=lambda r: (r.name, r.reason))),
            versions=np.array(self.versions, np.uint64)[rows] if self.versions else None,
        )

    def _seen(self) -> str:
        if not self.rejected:
            return ""
        kinds = f" ({text})" if (text := kinds_of(self.rejected)) else ""
        first = self.rejected[0]
        return f"; {len(self.rejected)} other entries{kinds} were seen, the first: {first.name!r}, {first.reason}"

    def _sorted_unique(self) -> list[int]:
        """Rows sorted by name. A later entry of the same name replaces the earlier one, as when a tar is unpacked."""
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        kept = []
        for position, row in enumerate(order):
            later = order[position + 1] if position + 1 < len(order) else None
            if later is not None and self.names[later] == self.names[row]:
                name = self.names[row].decode("utf-8", "surrogateescape")
                self.reject(name, "replaced by a later entry of the same name")
            else:
                kept.append(row)
        return kept


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
