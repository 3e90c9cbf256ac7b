"""Read Hugging Face style parquet files: a column of encoded images and, optionally, a label column.

Parquet has no cheap random access, so all images are copied once into one temporary file beside the shards. Schemas and
labels of all files are read and checked first, so that a mistake is reported within seconds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.system import progress
from pipeline.sources.class_names import check_class_number, number_words
from pipeline.sources.file_kinds import is_other_image
from pipeline.sources.image_file import BadImageError, inspect_image
from pipeline.sources.listing import Listing, ListingBuilder
from pipeline.sources.parquet_layout import absent_pieces
from pipeline.sources.readers import ContainerReader, Source, Spool, mark_spooled, spool_state, spooled
from pipeline.sources.remote_path import RemotePath, SourcePath, open_file

_LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target", "category", "class_name", "label_name")
_IMAGE_NAMES = ("image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
_NOT_IMAGES = ("audio", "video", "mask", "segmentation", "depth", "annotation", "embedding")  # parts of columns' names
_ROWS_AT_ONCE = 64  # 64 photos of 110 KB are 7 MB
_LABELS_AT_ONCE = 1 << 16  # rows
_IMAGES_TRIED = 8  # rows of a column that are looked at to see whether it holds images


@dataclass(frozen=True)
class ParquetColumns:
    """The choices of the user; None: by the schema."""

    labels: bool  # False: the files' own labels are not read
    label: str | None  # --label-column
    image: str | None  # --image-column


def open_parquet(
    path: SourcePath, files: Sequence[SourcePath], columns: ParquetColumns, spool: Spool, quiet: bool
) -> Source:
    """Copy all images of ``files`` into one file in the folder of ``spool``, unless an earlier run did.

    In a bucket it is one for each of ``files``, since an object is of limited size.

    Raises UserError if pyarrow is missing, a file is damaged, columns differ, or there is no image column.
    """
    container, saved = spool.folder / "images.bin", spool.folder / "spooled-listing"
    table = _ParquetTable(files, columns)
    state = spool_state(files, table.image_column, table.label_column or "")
    if spooled(spool.folder, state) and container.exists():
        return table.source(Listing.load(saved), ContainerReader((container,)))
    local = spool.fits(sum(file.stat().st_size for file in files), f"copying the images of {path}")
    where = spool.folder.name if local or spool.bucket is None else spool.bucket.place
    labels, classes = table.read_labels()
    builder = ListingBuilder(str(path))
    text = f"copying images of {path.name} once into {where} (removed when the dataset is complete)"
    parts = [range(len(files))] if local else [range(number, number + 1) for number in range(len(files))]
    paths, starts, rows = [], [0], iter(labels.tolist())
    with progress(quiet, total=table.rows, unit=" images", desc=text) as bar:
        for part in parts:
            opened, place = spool.file(container.name if local else f"images-{part.start:06d}.bin", local)
            with opened as out:
                for name, data in table.images(part):
                    label = next(rows)
                    if data is None:
                        builder.reject(name, "no bytes in the parquet file")
                    else:
                        builder.add(name, starts[-1] + out.tell(), len(data), label)
                        out.write(data)
                    bar.update(1)
                starts.append(starts[-1] + out.tell())
            paths.append(place)
    listing = builder.build(classes)
    if local:
        listing.save(saved)
        mark_spooled(spool.folder, state)
    return table.source(listing, ContainerReader(tuple(paths), tuple(starts[:-1])))


class _ParquetTable:
    """The rows of several parquet files with the same columns."""

    def __init__(self, files: Sequence[SourcePath], columns: ParquetColumns) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise UserError("parquet files need pyarrow: pip install 'siamstream[parquet]'") from None
        self._types, self._open = pyarrow.types, pyarrow.parquet.ParquetFile
        # What pyarrow raises for damaged files, the last two from its conversion to Python.
        self._damaged = (pyarrow.ArrowException, OSError, MemoryError, ValueError, OverflowError)
        self._files = files
        self._names = _unique_stems(files)
        schemas = [self._schema(file) for file in files]
        self.rows = sum(rows for _, rows in schemas)
        self._schemas = [schema for schema, _ in schemas]
        self._features = _features(self._schemas[0])
        self.image_column, image_note = self._choose_image(columns.image)
        self.label_column = self._choose_label(columns.label) if columns.labels else None
        self._notes = [image_note] if image_note else []
        self._notes += [f"files of the source are missing: {pieces}" for pieces in absent_pieces(files)]
        for file, schema in zip(files[1:], self._schemas[1:], strict=True):
            self._compare(file, schema)

    def source(self, listing: Listing, copy: ContainerReader) -> Source:
        """The source of which ``copy`` reads the images."""
        return Source(
            listing,
            copy,
            labels_from=f"the column {self.label_column}" if listing.classes else None,
            has_folders=False,
            notes=tuple(self._notes),
        )

    def read_labels(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """(int32[rows], class names); -1 = none. Raises UserError, with the row, for what is no class."""
        if self.label_column is None:
            return np.full(self.rows, -1, np.int32), ()
        names = _class_names(self._features, self.label_column)
        labels = np.full(self.rows, -1, np.int32)
        words: dict[str, list[int]] = {}  # rows of each
        row = 0
        for file in self._files:
            for in_file, value in enumerate(self._column(file, self.label_column)):
                label = self._label(file, in_file, value, names)
                if isinstance(label, str):
                    words.setdefault(label, []).append(row)
                else:
                    labels[row] = label
                row += 1
        if words:
            classes = number_words(list(words), f"column {self.label_column}")
            for number, word in enumerate(classes):
                labels[words[word]] = number
            return labels, classes
        count = int(labels.max(initial=-1)) + 1
        return labels, names if names and count else tuple(str(i) for i in range(count))

    def images(self, numbers: range) -> Iterator[tuple[str, bytes | None]]:
        """(name, bytes or None) row by row, of the files ``numbers``."""
        for file, stem in ((self._files[number], self._names[number]) for number in numbers):
            for row, value in enumerate(self._column(file, self.image_column, _ROWS_AT_ONCE)):
                data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
                base = PurePosixPath(path if isinstance(path, str) and path else "image").name
                if not base.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")):
                    base += ".jpg"  # only a name: the bytes decide what it is
                yield f"{stem}/{row:09d}_{base}", data if isinstance(data, bytes) else None

    def _column(self, file: SourcePath, column: str, rows_at_once: int = _LABELS_AT_ONCE) -> Iterator[Any]:
        row = 0
        try:
            with open_file(file) as opened, self._open(opened) as parquet:
                for batch in parquet.iter_batches(batch_size=rows_at_once, columns=[column]):
                    for value in batch.column(batch.schema.names.index(column)).to_pylist():
                        yield value
                        row += 1
        except self._damaged as error:
            raise UserError(f"{file} is damaged at row {row} ({_first_line(error)}): fetch it again") from error

    def _schema(self, file: SourcePath) -> tuple[Any, int]:
        try:
            with open_file(file) as opened, self._open(opened) as parquet:
                return parquet.schema_arrow, parquet.metadata.num_rows
        except self._damaged as error:
            raise UserError(f"cannot read the parquet file {file} ({_first_line(error)}): fetch it again") from error

    def _compare(self, file: SourcePath, schema: Any) -> None:
        """Raise UserError unless ``file`` has the chosen columns, of the same types, with the same class names."""
        for column, remedy in ((self.image_column, ""), (self.label_column, ", or say --labels none")):
            if column is None:
                continue
            first = self._kind(self._schemas[0].field(column).type)
            index = schema.get_field_index(column)
            if index < 0 or self._kind(schema.field(index).type) != first:
                has = "no such column" if index < 0 else f"one of type {schema.field(index).type}"
                raise UserError(
                    f"{self._files[0].name} has a column {column} of {first} and {file.name} has {has}: files of one "
                    f"dataset have the same columns; choose files with --subtree, a prefix of the names{remedy}"
                )
        if self.label_column is not None:
            names, others = (_class_names(f, self.label_column) for f in (self._features, _features(schema)))
            if names != others:
                raise UserError(
                    f"{self._files[0].name} and {file.name} name other classes in column {self.label_column}: choose "
                    "files with --subtree, a prefix of the names, or say --labels none"
                )

    def _kind(self, data_type: Any) -> str:
        """What a column's type means here: "images", "numbers", "words", or the type itself."""
        types = self._types
        if types.is_dictionary(data_type):
            return self._kind(data_type.value_type)
        if types.is_struct(data_type):
            index = data_type.get_field_index("bytes")
            return "images" if index >= 0 and self._kind(data_type.field(index).type) == "images" else str(data_type)
        if types.is_binary(data_type) or types.is_large_binary(data_type) or types.is_fixed_size_binary(data_type):
            return "images"
        if types.is_string(data_type) or types.is_large_string(data_type):
            return "words"
        if str(data_type) in ("string_view", "binary_view"):
            return "words" if str(data_type) == "string_view" else "images"
        if types.is_boolean(data_type) or types.is_integer(data_type):
            return "numbers"
        return "numbers" if types.is_floating(data_type) or types.is_decimal(data_type) else str(data_type)

    def _choose_image(self, wanted: str | None) -> tuple[str, str | None]:
        """(image column, a note if others might be meant as well)."""
        schema = self._schemas[0]
        found = [f.name for f in schema if self._kind(f.type) == "images"]
        columns = ", ".join(f"{f.name} ({f.type})"[:80] for f in schema)
        if wanted is not None:
            if wanted not in found:
                raise UserError(f"--image-column {wanted}: no column of image bytes; the columns are {columns}")
            return wanted, None
        if len(found) != len(set(found)):
            raise UserError(f"{self._files[0]} has several columns of one name: {columns}")
        if not found:
            raise UserError(f"no image column of bytes among the columns {columns}; paths and URLs are not fetched")
        ranked = sorted(found, key=lambda name: (*self._doubt(name), found.index(name)))
        name = ranked[0] if len(ranked) == 1 else next(filter(self._holds_images, ranked), ranked[0])
        others = ", ".join(other for other in found if other != name)
        return name, f"images are taken from the column {name}, not from {others} (--image-column)" if others else None

    def _doubt(self, name: str) -> tuple[int, int]:
        """How unlikely a column of bytes is to hold the images: by its feature, then by its name."""
        kind = _feature_type(self._features, name)
        lower = name.lower()
        odd = kind in ("Audio", "Video") or any(part in lower for part in _NOT_IMAGES)
        rank = _IMAGE_NAMES.index(lower) if lower in _IMAGE_NAMES else len(_IMAGE_NAMES)
        return (2 if odd else 0 if kind == "Image" else 1), rank

    def _holds_images(self, column: str) -> bool:
        """Whether one of the first rows holds an image, or something that at least looks like one."""
        tried = 0
        for file in self._files:
            for value in self._column(file, column, _IMAGES_TRIED):
                data = value.get("bytes") if isinstance(value, dict) else value
                if isinstance(data, bytes) and data:
                    if _looks_like_image(data):
                        return True
                    tried += 1
                    if tried == _IMAGES_TRIED:
                        return False
        return False

    def _choose_label(self, wanted: str | None) -> str | None:
        schema = self._schemas[0]
        if wanted is not None:
            if schema.get_field_index(wanted) < 0:
                raise UserError(
                    f"--label-column {wanted}: there is no such column; there are {', '.join(schema.names)}"
                )
            self._check_label(wanted)
            return wanted
        declared = [f.name for f in schema if _feature_type(self._features, f.name) == "ClassLabel"]
        by_name = [f.name for name in _LABEL_NAMES for f in schema if f.name.lower() == name]
        if len(declared) > 1 and not set(declared) & set(by_name):
            raise UserError(
                f"the columns {', '.join(declared)} are all class labels: choose one with --label-column, or say "
                "--labels none"
            )
        for name in (*(name for name in by_name if name in declared), *declared, *by_name):
            self._check_label(name)
            return name
        return None

    def _check_label(self, name: str) -> None:
        kind = self._kind(self._schemas[0].field(name).type)
        if kind not in ("numbers", "words"):
            raise UserError(
                f"the column {name} holds {kind}, not one class for each image: choose another with --label-column, or "
                "say --labels none"
            )

    def _label(self, file: SourcePath, row: int, value: Any, names: tuple[str, ...]) -> int | str:
        """A class number, -1 for none, or a word. Raises UserError for any other value."""
        where = f"row {row} of {file}"
        match value:
            case None:
                return -1
            case str() if value.strip():
                return value
            case float() if math.isnan(value):
                return -1
            case bool() | int() | float() | Decimal() if math.isfinite(value) and value == int(value) and value >= -1:
                check_class_number(int(value), self.rows, names, f"{where}, column {self.label_column}")
                return int(value)
        raise UserError(
            f"{where} has the label {value!r} in column {self.label_column}, which is no class: choose another column "
            "with --label-column, or say --labels none"
        )


def _looks_like_image(data: bytes) -> bool:
    try:
        inspect_image(data, "header", max_pixels=1 << 62)
    except BadImageError:
        return data.startswith(b"\xff\xd8") or is_other_image(data)
    return True


def _unique_stems(files: Sequence[SourcePath]) -> list[str]:
    """What the files are called in the names of their images: their stems, with folders where stems are not unique."""
    stems = [file.stem for file in files]
    if len(set(stems)) == len(stems):
        return stems
    paths = [file.inner if isinstance(file, RemotePath) else str(file) for file in files]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [PurePosixPath(os.path.relpath(path, common or ".")).with_suffix("").as_posix() for path in paths]


def _features(schema: Any) -> dict[str, Any]:
    """The features that the datasets library stores in the schema's metadata; {} without."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}  # the metadata is optional: types and names of columns then decide
    return features if isinstance(features, dict) else {}


def _feature_type(features: dict[str, Any], column: str) -> str | None:
    feature = features.get(column)
    kind = feature.get("_type") if isinstance(feature, dict) else None
    return kind if isinstance(kind, str) else None


def _class_names(features: dict[str, Any], column: str) -> tuple[str, ...]:
    feature = features.get(column)
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
