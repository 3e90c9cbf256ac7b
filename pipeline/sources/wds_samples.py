"""The samples of a WebDataset tar: members grouped by key, the image of each sample, and its label.

    img7.jpg  img7.cls  img7.json        one sample, key "img7": everything before the first dot of the base name

The format is WebDataset's (https://github.com/webdataset/webdataset). Used to index tars and to check datasets.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.dataset.shard_tar import Component, split_key
from pipeline.sources.image_file import IMAGE_SUFFIXES, BadImageError
from pipeline.sources.listing import Rejected, suffix
from pipeline.sources.tar_members import Member, scan_tar

_CLASS_BYTES = 256  # of a .cls file: longer ones are no class and refused unread
_JSON_BYTES = 1 << 20  # of a .json file
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|Infinity)")
_JPEG = frozenset({"jpg", "jpeg", "jpe", "jfif"})
_AUXILIARY = re.compile(r"mask|depth|seg|normal|flow|edge|canny|pose|thumb|label|alpha|disparity|annot", re.IGNORECASE)


@dataclass(frozen=True)
class SampleRules:
    """How the image and the label of a sample are chosen."""

    labels: bool = True  # False: there are none
    image_extensions: tuple[str, ...] = ()  # the first that a sample has; (): the plainest
    label_key: str | None = None  # of the .json member; None: the .cls member holds the label
    plainest: bool = True  # False: without image_extensions, the first image

    @classmethod
    def of(cls, labels: str, image_ext: str | None, label_key: str | None) -> SampleRules:
        """From --labels, --wds-image-ext (extensions separated by ; or ,) and --wds-label-key."""
        extensions = [part.strip().removeprefix(".").lower() for part in re.split("[;,]", image_ext or "")]
        return cls(labels != "none", tuple(filter(None, extensions)), label_key)


def tar_samples(tar: Path, rejected: list[Rejected]) -> Iterator[tuple[str, list[Member]]]:
    """(key, members) of each sample, in the order of their first members; links and the like go to ``rejected``.

    Members of a sample need not be adjacent. Raises UserError for a damaged tar, or if it holds a member twice.
    """
    samples: dict[str, list[Member]] = {}
    seen: set[str] = set()
    for member in scan_tar(tar):
        key = split_key(member.name)[0]
        if member.refusal is not None:
            rejected.append(Rejected(f"{tar.name}/{member.name}", member.refusal))
        elif key.rpartition("/")[2]:  # empty for a hidden file
            if member.name in seen:
                raise UserError(
                    f"the tar {tar} holds the member {member.name!r} twice, and which one is meant is unknown: write "
                    "the tar again without one of them"
                )
            seen.add(member.name)
            samples.setdefault(key, []).append(member)
    yield from samples.items()


def extension(member: Member) -> str:
    """The extension of a member, all after the first dot of its base name, in small letters."""
    return split_key(member.name)[1].lower()


def image_member(members: list[Member], rules: SampleRules = SampleRules()) -> Member | None:  # frozen
    """The member of a sample that is its image; None if there is none.

    Among several the plainest extension is preferred: ``jpg`` to ``depth.png``, then names that are not of masks and
    the like, then JPEG, then the first.
    """
    if rules.image_extensions:
        found = {extension(member): member for member in reversed(members)}
        return next((found[wanted] for wanted in rules.image_extensions if wanted in found), None)
    images = [member for member in members if suffix(f"x.{extension(member)}") in IMAGE_SUFFIXES]
    return min(images, key=_plainness if rules.plainest else lambda _: 0, default=None)


def _plainness(member: Member) -> tuple[int, bool, bool]:
    ending = extension(member)
    return ending.count("."), _AUXILIARY.search(ending) is not None, suffix(f"x.{ending}") not in _JPEG


def other_images(members: list[Member], image: Member, tar: str) -> list[Rejected]:
    """The entries of rejected.jsonl for images of a sample that were not taken."""
    others = [m for m in members if m is not image and suffix(f"x.{extension(m)}") in IMAGE_SUFFIXES]
    taken = extension(image)
    return [
        Rejected(
            f"{tar}/{member.name}",
            f"another image of its sample: {taken} was taken, not {extension(member)} (--wds-image-ext chooses; a key "
            "ends at the first dot)",
        )
        for member in others
    ]


def components(members: list[Member]) -> list[Component]:
    """The members of a sample in the form of DALI's index."""
    return [Component(split_key(m.name)[1], m.offset, m.length, m.name) for m in members]


def read_label(
    handle: int,
    members: list[Member],
    image: Member | None = None,
    rules: SampleRules = SampleRules(),  # frozen
) -> int | str:
    """The class of a sample: its number, a word, or -1 without one.

    A label beside ``left.jpg`` may be ``left.cls`` or ``cls``. Raises BadImageError if it is no class.
    """
    if not rules.labels:
        return -1
    kind = "cls" if rules.label_key is None else "json"
    stem = "" if image is None else extension(image).rpartition(".")[0]
    named = {extension(member): member for member in reversed(members)}
    member = named.get(f"{stem}.{kind}") or named.get(kind)
    if member is None:
        return -1
    limit = _CLASS_BYTES if rules.label_key is None else _JSON_BYTES
    if member.length > limit:
        raise BadImageError(f"its .{kind} file is larger than {limit:,} bytes, so it is no class")
    data = os.pread(handle, member.length, member.offset)
    if rules.label_key is None:
        return _class_of_text(data)
    return _class_of_json(data, rules.label_key)


def _class_of_text(data: bytes) -> int | str:
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        raise BadImageError("its .cls file is not UTF-8 text") from None
    if not text or not text.isprintable():
        raise BadImageError("its .cls file is empty" if not text else "its .cls file is not one line of text")
    return _class(text, ".cls file")


def _class_of_json(data: bytes, key: str) -> int | str:
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise BadImageError("its .json file is damaged") from None
    value = _at(value, key)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return -1
    if isinstance(value, (bool, int, float)):
        return _class(str(Decimal(value)), f".json file at {key}")
    if isinstance(value, str) and value.strip() and value.isprintable():
        return _class(value.strip(), f".json file at {key}")
    raise BadImageError(f"its .json file has no class at {key}, but {type(value).__name__}")


def _at(value: Any, key: str) -> Any:
    """``value[key]``, or, for a key with dots, the value in nested objects; None if there is none."""
    if isinstance(value, dict) and key in value:
        return value[key]
    first, dot, rest = key.partition(".")
    return _at(value[first], rest) if dot and isinstance(value, dict) and first in value else None


def _class(text: str, where: str) -> int | str:
    """A whole number from 0 on as int, -1 for "none"; any other text is a word."""
    if _NUMBER.fullmatch(text) is None:
        return text
    number = Decimal(text)
    if number != number.to_integral_value() or not -1 <= number < 2**31:
        raise BadImageError(f"its {where} is no class number")
    return int(number)
