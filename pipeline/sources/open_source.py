"""Open a SOURCE of make_shards.py: every source becomes a ``Listing`` plus a ``Reader`` with random access.

Random access makes the global shuffle free of memory: shards are cut from a permutation of the listing, and each worker
reads only the images of its own shard. Sources without random access (compressed tars, parquet) are copied once into
one temporary file beside the shards.

To add a source, write a ``Reader`` and an ``open_...`` function that lists the images. A source named KIND:REST becomes
an entry of ``KINDS``, any other a case of ``_open_path``; tests/pipeline/sources/test_sources.py checks what every
source must do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.common.errors import UserError
from pipeline.sources.labels import adopt_classes, dataset_classes, label_by_file, label_by_folder
from pipeline.sources.listing import Listing
from pipeline.sources.parquet import parquet_files, spool_parquet
from pipeline.sources.readers import WDS, ContainerReader, Source, open_folder
from pipeline.sources.synthetic import open_synthetic
from pipeline.sources.tar import compression, is_plain_tar, list_tar, unpack_tar

# KIND:REST is opened by KINDS[KIND](REST, subtree, seed).
KINDS: dict[str, Callable[[str, str, int], Source]] = {"synthetic": open_synthetic}


def source_title(source: str) -> str:
    """SOURCE as dataset.json records it: the base name, which is the same on every machine."""
    kind, colon, rest = source.partition(":")
    if colon and (kind in KINDS or source.startswith(WDS)):
        return f"{kind}:{os.path.basename(rest)}"
    return Path(source).resolve().name


def open_source(
    source: str,
    spool: Path,
    *,
    subtree: str = "",
    labels: str = "auto",
    classes_from: Path | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> Source:
    """List the images of SOURCE with their labels.

    ``spool`` is a folder for the temporary copy of a source without random access. ``subtree``, ``labels``,
    ``classes_from`` and ``seed`` are the options of make_shards.py with these names; only synthetic images use
    ``seed``. Raises UserError if SOURCE is missing, damaged, empty, or of no known kind.
    """
    kind, _, rest = source.partition(":")
    if kind in KINDS:
        opened = KINDS[kind](rest, subtree, seed)
    else:
        path = Path(source)
        if not path.exists():
            raise UserError(
                f"SOURCE {source} does not exist: give a folder, a tar, parquet files, synthetic:N or wds:PATTERN"
            )
        opened = _open_path(path, subtree, labels, spool, quiet)
    return replace(opened, listing=_with_labels(opened.listing, source, labels, classes_from))


def _open_path(path: Path, subtree: str, labels: str, spool: Path, quiet: bool) -> Source:
    if parquet_files(path, subtree):
        container, listing = spool_parquet(path, subtree, labels, spool, quiet)
        return Source(listing, ContainerReader(container))
    if path.is_dir():
        return open_folder(path, subtree, quiet)
    container = path if compression(path) is None else unpack_tar(path, spool, quiet)
    if not is_plain_tar(container):
        raise UserError(
            f"SOURCE {path} is neither a tar (plain, gz, bz2, xz) nor a parquet file: unpack it, or convert it"
        )
    return Source(list_tar(container, subtree, quiet), ContainerReader(container))


def _with_labels(listing: Listing, source: str, labels: str, classes_from: Path | None) -> Listing:
    """Apply --labels and --classes-from."""
    if labels == "none":
        return replace(listing, labels=np.full(len(listing), -1, np.int32), classes=())
    known = () if classes_from is None else dataset_classes(classes_from)
    if labels not in ("auto", "folders"):
        return label_by_file(listing, Path(labels), known)
    if not listing.classes:  # parquet and synthetic sources have their own
        listing = label_by_folder(listing, source, "auto" if labels == "auto" else "folders")
    return listing if classes_from is None else adopt_classes(listing, classes_from)
