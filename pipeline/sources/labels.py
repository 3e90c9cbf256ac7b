"""Labels of a source: from class folders, from a label file, from ImageNet's devkit; class lists of other datasets.

``open_source`` calls these functions on a ``Listing`` without labels and gets one with labels and class names.
"""

from __future__ import annotations

import re
import shlex
import tarfile
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from pipeline.common.errors import UserError
from pipeline.dataset.format import read_dataset_file
from pipeline.sources.listing import Listing, Rejected, select
from pipeline.sources.matlab import read_struct_array

_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def label_by_file(listing: Listing, file: Path, classes: tuple[str, ...] = ()) -> Listing:
    """Labels from ``file``: ImageNet's devkit, a class a line in the order of the sorted names, or `name class` lines.

    Classes are numbered in sorted order, or in the order of ``classes`` where that is given. Raises UserError if the
    file does not fit the images.
    """
    if not file.is_file():
        raise UserError(f"--labels {file}: no such file; give auto, folders, none, or a file of labels")
    if tarfile.is_tarfile(file):
        words = _in_order(listing, _devkit_classes(file), file)
    else:
        lines = [line for line in file.read_text(errors="surrogateescape").splitlines() if line.strip()]
        rows = [re.split(r"[,\s]+", line.strip()) for line in lines]
        one_column = all(len(row) == 1 for row in rows)
        words = _in_order(listing, [row[0] for row in rows], file) if one_column else _by_name(listing, rows, file)
    _refuse_ilsvrc_numbers(listing, words, file)
    return _number(listing, words, classes, file)


def _in_order(listing: Listing, words: list[str], file: Path) -> list[str]:
    if len(words) != len(listing):
        raise UserError(
            f"{file} has {len(words)} labels for {len(listing)} images: a file without names needs one line for each "
            "image, in the order of their sorted names"
        )
    return words


def _by_name(listing: Listing, rows: list[list[str]], file: Path) -> list[str]:
    labels = {row[0]: row[1] for row in rows if len(row) > 1}
    words = []
    for index in range(len(listing)):
        name = PurePosixPath(listing.name(index))
        word = next((labels[k] for k in (str(name), name.name, name.stem) if k in labels), None)
        if word is None:
            raise UserError(f"{file} has no label for {str(name)!r}: give one line `name label` for each image")
        words.append(word)
    return words


def _refuse_ilsvrc_numbers(listing: Listing, words: list[str], file: Path) -> None:
    """Raise UserError for ILSVRC's own class numbers 1 to 1000: they are not in the order of the WordNet ids."""
    if PurePosixPath(listing.name(0)).name.startswith("ILSVRC2012_val_") and all(word.isdecimal() for word in words):
        raise UserError(
            f"{file} numbers ImageNet's classes as the devkit does, which is not the order of the training folders: "
            "give the devkit itself (--labels ILSVRC2012_devkit_t12.tar.gz), or a file with a WordNet id on each line"
        )


def _number(listing: Listing, words: list[str], classes: tuple[str, ...], file: Path) -> Listing:
    numeric = all(word.isdecimal() for word in words)
    if not classes:
        classes = tuple(sorted(set(words), key=int if numeric else None))
    number = {name: i for i, name in enumerate(classes)}
    if numeric and not set(words) <= set(number):
        number = {str(i): i for i in range(len(classes))}  # numbers into the class list
    if unknown := sorted(set(words) - set(number)):
        raise UserError(
            f"{file} has the class {unknown[0]!r}, which is not one of the {len(classes)} classes of --classes-from"
        )
    return replace(listing, labels=np.array([number[word] for word in words], np.int32), classes=classes)


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


def _devkit_classes(file: Path) -> list[str]:
    """WordNet ids of the 50,000 validation images, from ILSVRC2012_devkit_t12.tar.gz, read without unpacking it."""
    truth = synsets = None
    with tarfile.open(file) as tar:
        for member in tar:
            base = PurePosixPath(member.name).name
            if base in (_TRUTH, "meta.mat") and member.isreg():
                content = tar.extractfile(member)
                assert content is not None
                if base == _TRUTH:
                    truth = content.read().split()
                else:
                    synsets = read_struct_array(content.read(), "synsets")
    if truth is None or synsets is None:
        raise UserError(f"{file} is not ImageNet's devkit: it has no {_TRUTH} or no meta.mat")
    wordnet = {_first(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets}
    return [wordnet[int(number)] for number in truth]


def _first(value: str | tuple[float, ...] | None) -> int:
    if not isinstance(value, tuple) or len(value) != 1:
        raise UserError("ImageNet's devkit is damaged: an ILSVRC2012_ID in meta.mat is not one number")
    return int(value[0])


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
    names = [listing.name(i) for i in range(len(listing))]
    tops = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    classes = sorted(set(tops) - {""})
    if mode == "auto":
        if not classes or (set(tops) == set(classes[:1]) and all(name.count("/") == 1 for name in names)):
            return listing
        _check_classes(classes, tops, names, source)
    elif not classes:
        raise UserError(f"--labels folders, but {source} has no sub-folders with images: use --labels none")
    if "" in tops:
        outside = tuple(
            Rejected(n, "outside of the class folders") for n, top in zip(names, tops, strict=True) if not top
        )
        listing = select(listing, np.array([top != "" for top in tops]), outside)
        tops = [top for top in tops if top]
    number = {name: i for i, name in enumerate(classes)}
    return replace(listing, labels=np.array([number[top] for top in tops], np.int32), classes=tuple(classes))


def _check_classes(classes: list[str], tops: list[str], names: list[str], source: str) -> None:
    outside = tops.count("")
    if outside:
        raise UserError(
            f"{source} has {outside} images outside of class folders (the first: {names[tops.index('')]!r}) and "
            f"{len(names) - outside} inside: say --labels none to take all without labels, or --labels folders to "
            "leave out those outside"
        )
    if len(classes) == 1:
        raise UserError(
            f"all images of {source} lie below one folder, {classes[0]!r}, with further folders inside: choose it "
            f"with --subtree {classes[0]} to get labels from the folders inside, or say --labels none"
        )
    splits = split_kinds(classes)
    if len(splits) == len(classes) or len(set(splits.values())) > 1:
        raise UserError(
            f"{source} holds the folders {', '.join(splits)}, which look like splits, not classes: "
            f"choose one with --subtree {shlex.quote(next(iter(splits)))}, or say --labels folders or --labels none"
        )
