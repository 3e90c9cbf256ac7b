"""Number the classes of a source: by words in sorted order, or by the numbers that its labels already are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from decimal import Decimal
from itertools import pairwise

from pipeline.common.errors import UserError

MANY_CLASSES = 100_000  # more class numbers than this need as many images; the largest sets in use have 21,841 classes
_NUMBER = re.compile(r"[+-]?(\d{1,15}(\.\d{0,9})?|\.\d{1,9})")


def check_class_number(label: int, images: int, names: tuple[str, ...], where: str) -> None:
    """Raise UserError if class number ``label`` is no index of ``names`` or, without names, far above the images."""
    if names and label >= len(names):
        raise UserError(f"{where}: the label {label:,} is none of the {len(names)} named classes; say --labels none")
    if label >= max(MANY_CLASSES, images):
        raise UserError(
            f"{where}: the label {label:,} as a class number would make {label + 1:,} classes for {images:,} images; "
            "choose another column with --label-column, give a file with --labels FILE, or say --labels none"
        )


def is_number(word: str) -> bool:
    """Whether a class is written as a number."""
    return _NUMBER.fullmatch(word) is not None


def number_words(words: Iterable[str], where: str) -> tuple[str, ...]:
    """The classes in the order of their numbers: numeric if all are numbers, else sorted by Unicode.

    Raises UserError if two words are the same number, or -1 stands among numbers from 0 on, where it may mean "none".
    """
    classes = sorted(set(words))
    if not all(map(is_number, classes)):
        return tuple(classes)
    classes.sort(key=Decimal)
    for one, other in pairwise(classes):
        if Decimal(one) == Decimal(other):
            raise UserError(f"{where} has the classes {one!r} and {other!r}, which are one number: write it in one way")
    if Decimal(classes[0]) == -1 and len(classes) > 1 and Decimal(classes[1]) == 0:
        raise UserError(
            f"{where} has the class {classes[0]} beside {classes[1]}: leave images without a class out of it"
        )
    return tuple(classes)


def mixed_classes(word: str, numbered: str) -> str:
    """The message that samples have both words and numbers as classes; ``numbered``: a sample with a number."""
    return (
        f"the class is a word in some samples, such as {word!r}, and a number in others, such as {numbered}: write one "
        "kind into all of them, or say --labels none"
    )
