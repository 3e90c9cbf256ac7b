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
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.locations import WDS, Url, expanded, is_url, location
from pipeline.common.secrets import conceal, reveal
from pipeline.dataset.format import DATASET_FILE
from pipeline.sources.file_kinds import describe_unknown
from pipeline.sources.image_file import IMAGE_SUFFIXES
from pipeline.sources.labels import adopt_classes, dataset_classes, label_by_file, label_by_folder
from pipeline.sources.listing import NO_IMAGE_NAME, Listing, ListingBuilder, Rejected, no_labels, plain_name, suffix
from pipeline.sources.parquet import ParquetColumns, open_parquet
from pipeline.sources.parquet_layout import choose_files, is_parquet, parquet_files
from pipeline.sources.readers import ContainerReader, FolderReader, RemoteFolderReader, Source, Spool, list_folder
from pipeline.sources.remote_listing import entries, list_remote_folder
from pipeline.sources.remote_path import RemotePath, SourcePath, known, open_file
from pipeline.sources.synthetic import open_synthetic
from pipeline.sources.tar import compression, list_class_tars, list_tar, unpack_tar
from pipeline.sources.tar_members import is_plain_tar
from pipeline.sources.zip_archive import is_zip, open_zip

_OpenParquet = Callable[[SourcePath, Sequence[SourcePath]], Source]  # (SOURCE, files that may belong to the dataset)

# KIND:REST is opened by KINDS[KIND](REST, subtree, seed).
KINDS: dict[str, Callable[[str, str, int], Source]] = {"synthetic": open_synthetic}

_PACKED = re.compile(r"\.(tgz|tbz2?|txz|zip|tar\.\w+)$", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*?)(\d+)\.tar", re.IGNORECASE)


def source_title(source: str) -> str:
    """SOURCE as dataset.json records it: the base name, which is the same on every machine."""
    kind, colon, rest = source.partition(":")
    if colon and (kind in KINDS or source.startswith(WDS)):
        path = rest.partition("?")[0] if "://" in rest else rest  # a query may be a signature
        return f"{kind}:{os.path.basename(path)}"
    if is_url(source):
        return RemotePath.of(Url(reveal(source))).name
    return Path(source).resolve().name


def open_source(
    source: str,
    spool: Path | Spool,
    *,
    subtree: str = "",
    labels: str = "auto",
    label_column: str | None = None,
    image_column: str | None = None,
    split: str | None = None,
    classes_from: Path | None = None,
    seed: int = 0,
    quiet: bool = True,
    channels: bool = False,
) -> Source:
    """List the images of SOURCE with their labels. ``channels``: of a folder, with .npy files among them.

    ``spool`` is the place for the temporary copy of a source without random access. ``subtree``, ``labels``,
    ``classes_from`` and ``seed`` are the options of make_shards.py with these names; only synthetic images use
    ``seed``. Raises UserError if SOURCE is missing, damaged, empty, or of no known kind.
    """
    source, copies = expanded(source), spool if isinstance(spool, Spool) else Spool(spool)
    if channels:
        top = Path(source) / subtree
        if not top.is_dir():
            raise UserError(f"--channels takes a folder of images as SOURCE, and {conceal(str(top))} is none")
        builder = list_folder(top, quiet, IMAGE_SUFFIXES | {"npy"})
        found = Source(builder.build(), FolderReader(top))
        return _with_labels(found, source, labels, label_column, classes_from)
    kind, _, rest = source.partition(":")
    if kind in KINDS:
        opened = KINDS[kind](rest, subtree, seed)
    else:
        place = location(source)
        path: SourcePath = RemotePath.of(place) if isinstance(place, Url) else Path(source)
        if not path.exists():
            raise UserError(
                f"SOURCE {conceal(source)} does not exist: give a folder, tar, zip, parquet files, a URL of one of "
                "these, synthetic:N or wds:PATTERN"
            )
        columns = ParquetColumns(labels in ("auto", "folders"), label_column, image_column)

        def open_files(root: SourcePath, files: Sequence[SourcePath]) -> Source:
            return open_parquet(root, choose_files(root, files, subtree, split), columns, copies, quiet)

        opened = _open_path(path, subtree, labels, copies, open_files, quiet)
    return _with_labels(opened, conceal(source), labels, label_column, classes_from)


def _open_path(
    path: SourcePath, subtree: str, labels: str, spool: Spool, open_parquet: _OpenParquet, quiet: bool
) -> Source:
    if isinstance(path, RemotePath) and path.is_dir():
        return _open_remote_folder(RemotePath("", path.url), subtree, labels, open_parquet, quiet)
    parquet: Sequence[SourcePath]
    if isinstance(path, RemotePath):
        parquet = [path] if is_parquet(path) else []
    else:
        parquet = parquet_files(path, subtree)
    if parquet:
        return open_parquet(path, parquet)
    if isinstance(path, Path) and path.is_dir():
        return _open_folder(path, subtree, labels, open_parquet, quiet)
    if not path.is_file():
        raise UserError(f"SOURCE {path} is a pipe, socket or device: give a folder or a file")
    if is_zip(path):
        return _told_of_webdataset(open_zip(path, subtree, quiet), path)
    container = known(path) if compression(path) is None else unpack_tar(path, spool, quiet)
    if not is_plain_tar(container):
        with open_file(container) as file:
            kind = describe_unknown(file.read(4096))
        raise UserError(
            f"SOURCE {path} is neither a tar (plain, gz, bz2, xz), nor a zip, nor a parquet file ({kind}): unpack "
            "or convert it; for a single image give its folder"
        )
    return _told_of_webdataset(Source(list_tar(container, subtree, quiet), ContainerReader((container,))), path)


def _open_folder(root: Path, subtree: str, labels: str, open_parquet: _OpenParquet, quiet: bool) -> Source:
    """The images of a folder; where it holds tars instead of images, those in the tars, each tar being a class."""
    top = root / subtree
    if not top.is_dir():
        parts = plain_name(subtree).split("/")
        inside = ["/".join(parts[:count]) + ".tar" for count in range(1, len(parts) + 1)]
        tars = [tar for tar in inside if (root / tar).is_file()]
        if not tars:
            raise UserError(f"{top} is not a folder: check SOURCE and --subtree")
        return _open_class_tars(root, tars[:1], subtree, labels, quiet)
    builder = list_folder(top, quiet)
    if (found := _open_other(root, top, builder, labels, open_parquet, quiet)) is not None:
        return found
    return Source(builder.build(), FolderReader(top))


def _open_remote_folder(root: RemotePath, subtree: str, labels: str, open_parquet: _OpenParquet, quiet: bool) -> Source:
    """As ``_open_folder``; a bucket is listed once, from which follows what it holds."""
    below, top = plain_name(subtree), root / plain_name(subtree)
    builder = list_remote_folder(top, quiet)
    if below and not len(builder) and not builder.rejected:
        return _open_remote_subtree(root, subtree, labels, open_parquet, quiet)
    parquet = [top / entry.name for entry in builder.rejected if _is_parquet_of(below, entry)]
    if parquet:
        return open_parquet(root, sorted(parquet))
    if (found := _open_other(root, top, builder, labels, open_parquet, quiet)) is not None:
        return found
    return Source(builder.build(), RemoteFolderReader(top))


def _is_parquet_of(below: str, entry: Rejected) -> bool:
    """Whether it is a parquet file directly in SOURCE or in its data/, as ``parquet_files`` takes them."""
    folder = "/".join(filter(None, (below, entry.name))).rpartition("/")[0]
    return entry.reason == NO_IMAGE_NAME and suffix(entry.name) == "parquet" and folder in ("", "data")


def _open_remote_subtree(
    root: RemotePath, subtree: str, labels: str, open_parquet: _OpenParquet, quiet: bool
) -> Source:
    """--subtree that names no folder: the beginning of the names of parquet files, or a folder inside a tar."""
    parts = plain_name(subtree).split("/")
    folder = root / "/".join(parts[:-1])
    for name, status in entries(folder):
        path = RemotePath((folder / name).inner, root.root, status)
        if path.suffix.lower() == ".parquet" and path.inner.startswith(subtree):
            names = sorted(n for n, _ in entries(folder) if n.endswith(".parquet") and "/" not in n)
            files = [folder / n for n in names]
            return open_parquet(root, [file for file in files if file.inner.startswith(subtree)])
    inside = ["/".join(parts[:count]) + ".tar" for count in range(1, len(parts) + 1)]
    tars = [tar for tar in inside if (root / tar).is_file()]
    if not tars:
        raise UserError(f"{root / plain_name(subtree)} is not a folder: check SOURCE and --subtree")
    return _open_class_tars(root, tars[:1], subtree, labels, quiet)


def _open_other(
    root: Path | RemotePath,
    top: Path | RemotePath,
    builder: ListingBuilder,
    labels: str,
    open_parquet: _OpenParquet,
    quiet: bool,
) -> Source | None:
    """What a folder without images holds: tars, each of which is a class, or parquet files; None: neither."""
    others = [entry.name for entry in builder.rejected if entry.reason == NO_IMAGE_NAME]
    tars = [name for name in others if suffix(name) == "tar"]
    if tars and len(tars) >= len(builder):
        if len(builder):
            raise UserError(
                f"{top} holds {len(tars)} tars beside {len(builder)} images, so either may be meant: move one "
                "kind to a folder of its own"
            )
        return _open_class_tars(top, tars, "", labels, quiet)
    packed = [name for name in others if _PACKED.search(name)]
    if packed and not len(builder):
        raise UserError(
            f"{top} holds no images but {len(packed)} archives, the first {packed[0]!r}: give one of them as SOURCE, "
            "or decompress them to plain tars, each of which then counts as a class"
        )
    parquet = [top / name for name in others if suffix(name) == "parquet"]
    return open_parquet(root, sorted(parquet)) if parquet and not len(builder) else None


def _open_class_tars(root: Path | RemotePath, tars: list[str], subtree: str, labels: str, quiet: bool) -> Source:
    if (root / DATASET_FILE).exists() and any(name.startswith("shard-") for name in tars):
        raise UserError(f"SOURCE {root} is a dataset that make_shards.py wrote: it can be used as it is, with --data")
    listing, paths = list_class_tars(root, tars, subtree, quiet)
    if labels == "auto" and (_is_webdataset(listing) or _are_numbered(tars)):
        raise UserError(
            f"the {len(tars)} tars in {root} look like WebDataset shards, not like one tar for each class: index them "
            f"with SOURCE 'wds:{root}/*.tar', or say --labels folders to make each tar a class, or --labels none"
        )
    starts = np.cumsum([0, *(path.stat().st_size for path in paths)])[:-1]
    return Source(listing, ContainerReader(tuple(paths), tuple(starts.tolist())))


def _told_of_webdataset(source: Source, path: SourcePath) -> Source:
    if not _is_webdataset(source.listing):
        return source
    note = (
        f"{path.name} has .cls or .json files beside its images, which were not read: SOURCE wds:{path} takes labels "
        "from them"
    )
    return replace(source, notes=(*source.notes, note))


def _is_webdataset(listing: Listing) -> bool:
    """Whether there are labels as WebDataset stores them: KEY.cls or KEY.json beside KEY.jpg."""
    others = [entry.name for entry in listing.rejected if entry.reason == NO_IMAGE_NAME]
    keys = {name.rpartition(".")[0] for name in others if suffix(name) in ("cls", "json")}
    return bool(keys) and any(listing.name(index).rpartition(".")[0] in keys for index in range(len(listing)))


def _are_numbered(tars: list[str]) -> bool:
    """Whether the tars are numbered in sequence with leading zeros, as shards are and classes are not."""
    matches = [_NUMBERED.fullmatch(tar) for tar in sorted(tars)]
    if len(tars) < 2 or not all(matches):
        return False
    numbers = [(match[1], len(match[2]), int(match[2])) for match in matches if match is not None]
    first = numbers[0]
    return first[1] > 1 and numbers == [(*first[:2], first[2] + step) for step in range(len(tars))] and first[2] < 2


def _with_labels(
    opened: Source, source: str, labels: str, label_column: str | None, classes_from: Path | None
) -> Source:
    """Apply --labels, --label-column and --classes-from."""
    listing = opened.listing
    if label_column is not None and (labels == "none" or (labels in ("auto", "folders") and opened.has_folders)):
        raise UserError(
            f"--label-column {label_column} names a column of parquet files or of a file of labels, neither of which "
            "gives the labels here: leave it out, or give --labels FILE"
        )
    if labels == "none":
        return replace(opened, listing=replace(listing, labels=no_labels(len(listing)), classes=()))
    known = () if classes_from is None else dataset_classes(classes_from)
    if labels not in ("auto", "folders"):
        notes: list[str] = []
        labelled = label_by_file(listing, Path(expanded(labels)), known, label_column, notes)
        return replace(
            opened,
            listing=labelled,
            labels_from=f"the file {Path(labels).name}",
            notes=(*opened.notes, *notes),
        )
    if opened.labels_from is None and opened.has_folders:
        listing = label_by_folder(listing, source, "auto" if labels == "auto" else "folders")
        opened = replace(opened, labels_from="folders" if listing.classes else None)
    elif labels == "folders" and opened.labels_from is None:
        raise UserError(f"--labels folders, but {source} has no folders and no labels of its own: use --labels none")
    if classes_from is not None:
        listing = adopt_classes(listing, classes_from)
    return replace(opened, listing=listing)
