"""Labels of a source: from class folders, from a file, or numbered as in another dataset.

``open_source`` calls these functions on a ``Listing`` without labels and gets one with labels and class names.
"""

from __future__ import annotations

import re
import shlex
import unicodedata
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.common.errors import UserError
from pipeline.dataset.format import read_dataset_file
from pipeline.sources.class_names import is_number, number_words
from pipeline.sources.columns import scratch
from pipeline.sources.devkit import devkit_classes, is_devkit
from pipeline.sources.label_file import ImageNames, read_label_file
from pipeline.sources.listing import Listing, Rejected, select


def label_by_file(
    listing: Listing,
    file: Path,
    classes: tuple[str, ...] = (),
    column: str | None = None,
    notes: list[str] | None = None,
) -> Listing:
    """Labels from ``file``: ImageNet's devkit, or whatever ``read_label_file`` reads; ``column``: as --label-column.

    Images that the file does not name get -1; remarks for the user are appended to ``notes``. Classes are numbered in
    sorted order (numbers: by value), or in the order of ``classes`` if that is given. Raises UserError if the file does
    not fit the images.
    """
    if not file.is_file():
        raise UserError(f"--labels {file}: no such file; give auto, folders, none, or a file of labels")
    if is_devkit(file):
        words: list[str | None] = list(devkit_classes(file, len(listing)))
        lines: dict[str, int] = {}
    else:
        found = read_label_file(file, ImageNames([listing.name(index) for index in range(len(listing))]), column)
        words, lines = found.words, found.lines
        if notes is not None:
            notes += found.notes
    _refuse_ilsvrc_numbers(listing, [word for word in words if word is not None], file)
    return _number(listing, words, classes, lines, file)


def _refuse_ilsvrc_numbers(listing: Listing, words: list[str], file: Path) -> None:
    """Raise UserError for ILSVRC's own class numbers 1 to 1000: they are not in the order of the WordNet ids."""
    if listing.name(0).rpartition("/")[2].startswith("ILSVRC2012_val_") and all(word.isdecimal() for word in words):
        raise UserError(
            f"{file} numbers ImageNet's classes as the devkit does, which is not the order of the training folders: "
            "give the devkit itself (--labels ILSVRC2012_devkit_t12.tar.gz), or a file with a WordNet id on each line"
        )


def _number(
    listing: Listing, words: list[str | None], known: tuple[str, ...], lines: dict[str, int], file: Path
) -> Listing:
    composed = [None if word is None else unicodedata.normalize("NFC", word) for word in words]
    used = {word for word in composed if word is not None}
    classes = known or number_words(used, str(file))
    number: dict[str, int] = {unicodedata.normalize("NFC", name): i for i, name in enumerate(classes)}
    if not used <= set(number) and all(map(is_number, used)):
        number = {
            word: int(Decimal(word)) for word in used if Decimal(word) in range(len(classes))
        }  # into the class list
    if unknown := sorted(used - set(number)):
        line = next((f", line {line}" for word, line in lines.items() if word == unknown[0]), "")
        raise UserError(
            f"{file}{line} has the class {unknown[0]!r}, which is not one of the {len(classes)} classes of "
            "--classes-from"
        )
    labels = np.array([-1 if word is None else number[word] for word in composed], np.int32)
    return replace(listing, labels=labels, classes=tuple(classes))


def adopt_classes(listing: Listing, dataset: Path) -> Listing:
    """The same labels, renumbered by the class list of another dataset.

    Raises UserError for a class that is missing there.
    """
    classes = dataset_classes(dataset)
    number = {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in listing.classes if name not in number]:
        raise UserError(f"class {unknown[0]!r} is not one of the {len(classes)} classes of {dataset} (--classes-from)")
    table = np.array([number[name] for name in listing.classes] + [-1], np.int32)
    return replace(listing, labels=table[listing.labels], classes=classes)


def dataset_classes(dataset: Path) -> tuple[str, ...]:
    """Class names of a dataset on disk. Raises UserError if the dataset has none."""
    classes = tuple(read_dataset_file(dataset)["classes"])
    if not classes:
        raise UserError(f"--classes-from {dataset}: that dataset has no classes")
    return classes


_SPLITS = {  # words by which folders are recognised as splits, and the kind of each
    **dict.fromkeys(("train", "training", "trn", "trainval", "trainvalid"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "devel", "development"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "eval", "evaluation", "holdout", "heldout", "pred"), "test"),
    **dict.fromkeys(("unlabeled", "unlabelled", "unsup", "unsupervised"), "unlabeled"),
}
_BESIDE_SPLITS = frozenset(
    {"set", "data", "dataset", "split", "images", "image", "img", "imgs", "extra", "all", "part"}
)


def split_kinds(folders: list[str]) -> dict[str, str]:
    """The folders named like splits (Training, test_set, val2014), each as "train", "val", "test" or "unlabeled".

    Words that all folders share do not count: seg_train beside seg_test.
    """
    words = {folder: set(re.findall(r"[A-Z]?[a-z]{2,}|[A-Z]{2,}", folder)) for folder in folders}
    plain = {f: {re.sub(r"(.)(data)?set$", r"\1", word.lower()) for word in found} for f, found in words.items()}
    common = set.intersection(*plain.values()) if len(folders) > 1 else set()
    kinds = {}
    for folder, found in plain.items():
        kind = {_SPLITS[word] for word in found if word in _SPLITS}
        if len(kind) == 1 and not found - set(_SPLITS) - _BESIDE_SPLITS - common:
            kinds[folder] = kind.pop()
    return kinds


def label_by_folder(listing: Listing, source: str, mode: Literal["auto", "folders"]) -> Listing:
    """Labels from the first component of each name; classes are the sorted components.

    ``auto``: flat images, or images that all lie directly in one folder, get no labels. Raises UserError where the
    folders are probably not classes: folders named like splits, one folder around all classes, or images beside
    folders. ``folders`` accepts the first two cases and rejects images outside of class folders.
    """
    tops = _tops(listing)
    classes = tops.classes
    if mode == "auto":
        if not classes or (len(classes) == 1 and tops.outside == 0 and tops.deepest == 1):
            return listing
        _check_classes(tops, listing, source)
    elif not classes:
        raise UserError(f"--labels folders, but {source} has no sub-folders with images: use --labels none")
    if tops.outside:
        inside = tops.labels >= 0
        outside = tuple(
            Rejected(listing.name(row), "outside of the class folders") for row in np.flatnonzero(~inside).tolist()
        )
        return replace(select(listing, inside, outside), labels=tops.labels[inside], classes=tuple(classes))
    return replace(listing, labels=tops.labels, classes=tuple(classes))


@dataclass(frozen=True)
class _Tops:
    """The first folders in the names of a listing."""

    classes: list[str]  # sorted
    labels: np.ndarray  # int32[n]: the place of each name's folder in classes; -1 for a name without one
    outside: int  # names without one
    first_outside: int  # the row of the first of them; -1: none
    deepest: int  # most folders in a name


def _tops(listing: Listing) -> _Tops:
    """Names are sorted, so that those of a folder follow each other: each is looked for by its first and last name."""
    labels, folders, deepest = _count_folders(listing)
    labels[:] = -1
    found: list[tuple[str, int, int]] = []  # folder, its first row, the row behind its last one
    row, first_outside, outside = 0, -1, 0
    while row < len(listing):
        following = _next_true(folders, row)
        if following > row and first_outside < 0:
            first_outside = row
        outside += following - row
        if following == len(listing):
            break
        top = listing.name(following).partition("/")[0]
        row = _behind_prefix(listing, f"{top}/".encode("utf-8", "surrogateescape"), following)
        found.append((top, following, row))
    classes = sorted(top for top, _, _ in found)
    number = {name: i for i, name in enumerate(classes)}
    for top, start, end in found:
        labels[start:end] = number[top]
    return _Tops(classes, labels, outside, first_outside, deepest)


def _count_folders(listing: Listing) -> tuple[np.ndarray, np.ndarray, int]:
    """(room for labels, bool[n]: names with a folder, most folders in a name)."""
    labels, folders, deepest = scratch(len(listing), np.int32), scratch(len(listing), np.bool_), 0
    for first in range(0, len(listing), _ROWS_AT_ONCE):
        starts = np.asarray(listing.name_starts[first : first + _ROWS_AT_ONCE + 1])
        slashes = np.flatnonzero(listing.names[starts[0] : starts[-1]] == ord("/")) + starts[0]
        counts = np.diff(np.searchsorted(slashes, starts))
        folders[first : first + len(counts)] = counts > 0
        deepest = max(deepest, int(counts.max(initial=0)))
    return labels, folders, deepest


def _next_true(values: np.ndarray, start: int) -> int:
    """The first place from ``start`` on where ``values`` is true; their number if there is none."""
    step = 1
    while start < len(values):
        piece = values[start : start + step]
        if piece.any():
            return start + int(piece.argmax())
        start, step = start + step, min(2 * step, _ROWS_AT_ONCE)
    return len(values)


def _behind_prefix(listing: Listing, prefix: bytes, start: int) -> int:
    """The first row behind ``start`` whose name does not begin with ``prefix``, by bisection."""

    def begins(row: int) -> bool:
        at = int(listing.name_starts[row])
        return (
            bytes(listing.names[at : at + len(prefix)]) == prefix and at + len(prefix) <= listing.name_starts[row + 1]
        )

    step, low = 1, start
    while low + step < len(listing) and begins(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, len(listing))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if begins(middle) else (low, middle)
    return high


_ROWS_AT_ONCE = 1 << 20


def _check_classes(tops: _Tops, listing: Listing, source: str) -> None:
    outside, classes = tops.outside, tops.classes
    if outside:
        raise UserError(
            f"{source} has {outside} images outside of class folders (the first: {listing.name(tops.first_outside)!r}) "
            f"and {len(listing) - outside} inside: say --labels none to take all without labels, or --labels folders "
            "to leave out those outside"
        )
    if len(classes) == 1:
        raise UserError(
            f"all images of {source} lie below one folder, {classes[0]!r}, with further folders inside: choose it "
            f"with --subtree {classes[0]} to get labels from the folders inside, or say --labels none"
        )
    splits = split_kinds(classes)
    if len(splits) == len(classes) or len(set(splits.values())) > 1:
        example = next((name for name, kind in splits.items() if kind == "train"), next(iter(splits)))
        raise UserError(
            f"{source} holds the folders {', '.join(splits)}, which look like splits, not classes: "
            f"choose one with --subtree {shlex.quote(example)}, or say --labels folders or --labels none"
        )
