"""Owns where images come from: every source becomes a ``Listing`` plus a ``Reader`` with cheap random access.

Random access is what lets a global shuffle cost no memory: shards are cut from a permutation of the listing, and each
worker reads only the images of its own shard. Sources without it (compressed tars, parquet) are unpacked once, into
one temporary file beside the shards.

To add a source, write a ``Reader`` and an ``open_...`` function that lists the images. One that is named KIND:REST is
an entry of ``KINDS``, any other a case of ``_open_path``; tests/test_sources.py says what every source has to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.common.errors import UserError
from pipeline.sharding.options import ShardingOptions
from pipeline.sources.labels import adopt_classes, dataset_classes, label_by_file, label_by_folder
from pipeline.sources.listing import Listing
from pipeline.sources.parquet import parquet_files, spool_parquet
from pipeline.sources.readers import WDS, ContainerReader, Source, open_folder
from pipeline.sources.synthetic import open_synthetic
from pipeline.sources.tar import compression, is_plain_tar, list_tar, unpack_tar

KINDS: dict[str, Callable[[str, ShardingOptions], Source]] = {"synthetic": open_synthetic}  # KIND:REST gets REST


def source_title(source: str) -> str:
    """SOURCE as dataset.json records it: without folders, so that it is the same on every machine."""
    kind, colon, rest = source.partition(":")
    if colon and (kind in KINDS or source.startswith(WDS)):
        return f"{kind}:{os.path.basename(rest)}"
    return Path(source).resolve().name


def open_source(source: str, options: ShardingOptions, spool: Path, *, quiet: bool = True) -> Source:
    """List the images of SOURCE with their labels.

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
