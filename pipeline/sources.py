"""Owns where pictures come from: every source becomes a ``Listing`` plus a ``Reader`` with cheap random access.

Random access is what lets a global shuffle cost no memory: shards are cut from a permutation of the listing, and each
worker reads only the pictures of its own shard. Sources without it (compressed tars, parquet) are unpacked once, into
one temporary file beside the shards.

To add a source, write a ``Reader`` and an ``open_...`` function that lists the pictures. One that is named KIND:REST is
an entry of ``KINDS``, any other a case of ``_open_path``; tests/test_sources.py says what every source has to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.disk import progress
from pipeline.errors import UserError
from pipeline.label_file import adopt_classes, dataset_classes, label_by_file
from pipeline.listing import UNKNOWN_LENGTH, Listing, ListingBuilder, label_by_folder
from pipeline.options import ShardingOptions
from pipeline.parquet import parquet_files, spool_parquet
from pipeline.synthetic import SyntheticPictures
from pipeline.tar_source import compression, is_plain_tar, list_tar, unpack_tar

WDS = "wds:"  # SOURCE: tars made by others, which are no listing: pipeline/foreign.py indexes them where they lie


class Reader(Protocol):
    """Reads pictures of a listing. Small and picklable: every worker process gets a copy."""

    def read(self, listing: Listing, index: int) -> bytes:
        """The encoded bytes of picture ``index``. Raises OSError."""


@dataclass(frozen=True)
class Source:
    """Pictures in a fixed order (sorted by name), not yet shuffled."""

    listing: Listing
    reader: Reader


@dataclass(frozen=True)
class FolderReader:
    """Pictures as files below ``root``."""

    root: Path

    def read(self, listing: Listing, index: int) -> bytes:
        """One file's bytes. Raises OSError."""
        with open(os.path.join(self.root, listing.name(index)), "rb", buffering=0) as file:
            return file.read()


@dataclass(frozen=True)
class ContainerReader:
    """Pictures as byte ranges of one file."""

    path: Path

    @cached_property
    def _handle(self) -> int:
        return os.open(self.path, os.O_RDONLY)

    def read(self, listing: Listing, index: int) -> bytes:
        """One byte range. Raises OSError."""
        return os.pread(self._handle, int(listing.lengths[index]), int(listing.offsets[index]))

    def __getstate__(self) -> dict[str, Path]:
        """Only the path travels to another process, never an open handle."""
        return {"path": self.path}


@dataclass(frozen=True)
class SyntheticReader:
    """Pictures drawn on demand, a pure function of (seed, index)."""

    count: int
    seed: int

    def read(self, listing: Listing, index: int) -> bytes:
        """Draw and encode one picture."""
        return self._pictures.encode(index)

    @cached_property
    def _pictures(self) -> SyntheticPictures:
        return SyntheticPictures(self.count, self.seed)


def open_folder(root: Path, subtree: str, quiet: bool) -> Source:
    """List a folder of pictures, in sorted order; hidden files are left out, links are followed once."""
    top = root / subtree
    if not top.is_dir():
        raise UserError(f"{top} is not a folder: check SOURCE and --subtree")
    builder = ListingBuilder(str(top))
    try:
        with progress(quiet, unit=" files", desc=f"listing {top}") as bar:
            for path, length in _walk(top, "", (), builder):
                builder.add(path, 0, length)
                bar.update(1)
    except PermissionError as error:
        raise UserError(f"cannot list {error.filename}: permission denied; change its permissions") from error
    return Source(builder.build(), FolderReader(top))


def _walk(
    folder: Path, prefix: str, above: tuple[tuple[int, int], ...], builder: ListingBuilder
) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every file below ``folder``. ``above`` identifies the folders on the way, against loops."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        builder.reject(prefix.rstrip("/"), "a link to a folder above it")
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = prefix + entry.name
            try:
                if entry.is_dir():
                    yield from _walk(folder / entry.name, f"{name}/", (*above, identity), builder)
                elif entry.is_file():
                    yield name, entry.stat().st_size
                else:
                    builder.reject(name, "a broken link" if entry.is_symlink() else "neither a file nor a folder")
            except FileNotFoundError:
                builder.reject(name, "vanished while the folder was listed")


def open_synthetic(count_text: str, options: ShardingOptions) -> Source:
    """``synthetic:N``: N pictures drawn by numpy from the seed, with labels."""
    if options.subtree:
        raise UserError(f"--subtree {options.subtree} does not go with synthetic:N, which has no folders: leave it out")
    if not count_text.isdecimal() or int(count_text) < 1:
        raise UserError(f"synthetic:{count_text}: the number of pictures must be a whole number of at least 1")
    count = int(count_text)
    pictures = SyntheticPictures(count, options.seed)
    names = [f"synthetic-{i:09d}.jpg".encode() for i in range(count)]
    listing = Listing(
        names=np.frombuffer(b"".join(names), np.uint8),
        name_starts=np.arange(count + 1, dtype=np.int64) * len(names[0]),
        offsets=np.zeros(count, np.int64),
        lengths=np.full(count, UNKNOWN_LENGTH, np.int64),
        labels=np.array([pictures.label(i) for i in range(count)], np.int32),
        classes=tuple(pictures.classes),
        rejected=(),
    )
    return Source(listing, SyntheticReader(count, options.seed))


KINDS: dict[str, Callable[[str, ShardingOptions], Source]] = {"synthetic": open_synthetic}  # KIND:REST gets REST


def source_title(source: str) -> str:
    """SOURCE as dataset.json records it: without folders, so that it is the same on every machine."""
    kind, colon, rest = source.partition(":")
    if colon and (kind in KINDS or source.startswith(WDS)):
        return f"{kind}:{os.path.basename(rest)}"
    return Path(source).resolve().name


def open_source(source: str, options: ShardingOptions, spool: Path, *, quiet: bool = True) -> Source:
    """List the pictures of SOURCE with their labels.

    ``spool`` is a folder for the one temporary copy of a source without random access. Raises UserError if SOURCE is
    missing, damaged, empty, or of no known kind.
    """
    kind, _, rest = source.partition(":")
    if kind in KINDS:
        opened = KINDS[kind](rest, options)
    else:
        path = Path(source)
        if not path.exists():
            raise UserError(
                f"SOURCE {source} does not exist: give a folder, a tar, parquet files, synthetic:N or wds:PATTERN"
            )
        opened = _open_path(path, options, spool, quiet)
    return replace(opened, listing=_with_labels(opened.listing, source, options))


def _open_path(path: Path, options: ShardingOptions, spool: Path, quiet: bool) -> Source:
    if parquet_files(path, options.subtree):
        container, listing = spool_parquet(path, options.subtree, options.labels, spool, quiet)
        return Source(listing, ContainerReader(container))
    if path.is_dir():
        return open_folder(path, options.subtree, quiet)
    container = path if compression(path) is None else unpack_tar(path, spool, quiet)
    if not is_plain_tar(container):
        raise UserError(
            f"SOURCE {path} is neither a tar (plain, gz, bz2, xz) nor a parquet file: unpack it, or convert it"
        )
    return Source(list_tar(container, options.subtree, quiet), ContainerReader(container))


def _with_labels(listing: Listing, source: str, options: ShardingOptions) -> Listing:
    """Labels and classes as --labels and --classes-from want them."""
    if options.labels == "none":
        return replace(listing, labels=np.full(len(listing), -1, np.int32), classes=())
    known = () if options.classes_from is None else dataset_classes(options.classes_from)
    if options.labels not in ("auto", "folders"):
        return label_by_file(listing, Path(options.labels), known)
    if not listing.classes:  # parquet and synthetic sources bring theirs
        listing = label_by_folder(listing, source, "auto" if options.labels == "auto" else "folders")
    return listing if options.classes_from is None else adopt_classes(listing, options.classes_from)
