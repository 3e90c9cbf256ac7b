"""Read Hugging Face style parquet files: a column of encoded images and, optionally, a label column.

Parquet has no cheap random access, so all images are copied once into one temporary file beside the shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.files import atomic_file
from pipeline.common.system import progress
from pipeline.sources.image_file import IMAGE_SUFFIXES
from pipeline.sources.listing import Listing, ListingBuilder
from pipeline.sources.readers import check_room, mark_spooled, spool_state, spooled

_LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class")
_ROWS_AT_ONCE = 64  # 64 photos of 110 KB are 7 MB


def parquet_files(path: Path, subtree: str) -> list[Path]:
    """The parquet files of SOURCE: the file itself, or those in a folder whose path begins with ``subtree``."""
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
    return [file for file in files if file.relative_to(path).as_posix().startswith(subtree)]


def spool_parquet(path: Path, subtree: str, labels: str, spool: Path, quiet: bool) -> tuple[Path, Listing]:
    """Copy all images into one file in folder ``spool``, unless an earlier run did: (that file, its listing).

    Raises UserError if pyarrow is missing, a file is damaged, or there is no image column.
    """
    container, saved = spool / "images.bin", spool / "spooled-listing"
    files = parquet_files(path, subtree)
    state = spool_state(files, "unlabelled" if labels == "none" else "labelled")
    if spooled(spool, state) and container.exists():
        return container, Listing.load(saved)
    if len(splits := {file.name.split("-")[0] for file in files}) > 1 and not subtree:
        raise UserError(
            f"{path} holds parquet files of {', '.join(sorted(splits))}: choose with --subtree, a prefix of the names"
        )
    check_room(spool, sum(file.stat().st_size for file in files), f"copying the images of {path}")
    reader = _ParquetReader(files, labels)
    builder = ListingBuilder(str(path))
    text = f"copying images of {path.name} once into {spool.name} (removed when the dataset is complete)"
    with atomic_file(container) as out, progress(quiet, total=reader.rows, unit=" images", desc=text) as bar:
        for name, data, label in reader.images():
            _copy(out, builder, name, data, label)
            bar.update(1)
    listing = reader.named(builder.build())
    listing.save(saved)
    mark_spooled(spool, state)
    return container, listing


def _copy(out: IO[bytes], builder: ListingBuilder, name: str, data: bytes | None, label: Any) -> None:
    if data is None:
        builder.reject(name, "no bytes in the parquet file")
        return
    builder.add(name, out.tell(), len(data), -1 if label is None else label)
    out.write(data)


class _ParquetReader:
    """Rows of several parquet files with one schema."""

    def __init__(self, files: list[Path], labels: str) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError("parquet files need pyarrow: pip install 'siamstream[parquet]'") from None
        try:
            self._files = [(file, pyarrow.parquet.ParquetFile(file)) for file in files]
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"cannot read the parquet files of {files[0].parent}: {error}") from error
        self._damaged = pyarrow.ArrowException
        self.rows = sum(parquet.metadata.num_rows for _, parquet in self._files)
        schema = self._files[0][1].schema_arrow
        self._image_column = _image_column(schema, pyarrow.types)
        self._label = None if labels == "none" else _label_column(schema, pyarrow.types)
        self._names = _class_names(schema, self._label)
        self._words: dict[str, int] = {}  # label words in the order seen, for a column of strings

    def images(self) -> Iterator[tuple[str, bytes | None, int | None]]:
        """(name, bytes or None, label number or None) row by row."""
        columns = [self._image_column, *([self._label] if self._label else [])]
        for file, parquet in self._files:
            row = 0
            try:
                for batch in parquet.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                    for entry in batch.to_pylist():
                        yield self._row_image(file, row, entry)
                        row += 1
            except (self._damaged, OSError) as error:
                raise UserError(f"{file} is damaged at row {row} ({error}): fetch it again") from error

    def _row_image(self, file: Path, row: int, entry: dict[str, Any]) -> tuple[str, bytes | None, int | None]:
        image, label = entry[self._image_column], entry[self._label] if self._label else None
        data, original = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
        stem = PurePosixPath(original or "image").name
        if PurePosixPath(stem).suffix[1:].lower() not in IMAGE_SUFFIXES:
            stem += ".jpg"  # only a name: the bytes decide what it is
        if isinstance(label, str):
            label = self._words.setdefault(label, len(self._words))
        return f"{file.stem}/{row:09d}_{stem}", data, label

    def named(self, listing: Listing) -> Listing:
        """The listing with class names: from the file's metadata, the sorted words, or the numbers."""
        labels = np.maximum(listing.labels, -1)
        if self._words:
            words = sorted(self._words)
            number = np.array([words.index(word) for word in self._words] + [-1], np.int32)
            return replace(listing, labels=number[labels], classes=tuple(words))
        count = int(labels.max()) + 1
        names = self._names if len(self._names) >= count else tuple(str(i) for i in range(count))
        return replace(listing, labels=labels, classes=names if count else ())


def _image_column(schema: Any, types: Any) -> str:
    for field in schema:
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            return field.name
    for field in schema:
        if types.is_binary(field.type) or types.is_large_binary(field.type):
            return field.name
    raise UserError(f"no image column of bytes among the columns {', '.join(schema.names)}")


def _label_column(schema: Any, types: Any) -> str | None:
    def fits(kind: Any) -> bool:
        return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)

    return next((name for name in _LABEL_NAMES if name in schema.names and fits(schema.field(name).type)), None)


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """Class names from the schema's metadata, where the datasets library stores them; () without."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return ()  # the metadata is optional: numbers then serve as names
