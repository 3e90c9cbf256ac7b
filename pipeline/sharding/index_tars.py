"""Make a dataset of existing WebDataset tars (wds:PATTERN): the tars are indexed in place and never rewritten.

Refused images stay in their tar but get no row in samples.npy, so training does not read them.
"""

from __future__ import annotations

import glob
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from braceexpand import braceexpand

from pipeline.common.errors import UserError
from pipeline.dataset.format import file_sha256
from pipeline.dataset.shard_tar import Component, split_key
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.write_shard import Job, ShardParts, Tick
from pipeline.sources.image_file import IMAGE_SUFFIXES, BadImageError, inspect_image
from pipeline.sources.listing import Rejected
from pipeline.sources.tar_members import Member, scan_tar

_UNUSED = {"limit": None, "shorter_side": None, "subtree": "", "labels": ("auto", "none")}
_LABEL_BYTES = 32  # longer than any number; a longer .cls file is refused unread


def open_tars(pattern: str, options: ShardingOptions) -> list[Path]:
    """The tars of wds:PATTERN: braces are expanded ({000000..000146}), then * and ?, sorted within each brace.

    Raises UserError for a missing tar, no tar at all, or options that would need the tars to be rewritten.
    """
    for name, fine in _UNUSED.items():
        value = getattr(options, name)
        if value not in (fine if isinstance(fine, tuple) else (fine,)):
            raise UserError(
                f"--{name.replace('_', '-')} {value} does not go with wds:, since tars are only indexed: leave it out"
            )
    try:
        expanded = list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"wds:{pattern}: the braces do not match; write {{000000..000146}}") from None
    tars: list[Path] = []
    for one in expanded:
        found = sorted(glob.glob(one)) if glob.has_magic(one) else [one]
        tars += [Path(os.path.abspath(name)) for name in found]
    missing = [tar for tar in tars if not tar.is_file()]
    if missing or not tars:
        raise UserError(f"wds:{pattern}: {f'{missing[0]} is missing' if missing else 'no such tar'}; check the pattern")
    return list(dict.fromkeys(tars))


def listing_fingerprint(tars: list[Path]) -> str:
    """sha256 over the tars' names and lengths."""
    return hashlib.sha256("".join(f"{t.name}\0{t.stat().st_size}\n" for t in tars).encode()).hexdigest()


@dataclass
class IndexJob(Job):
    """Index existing tars; shard i is tar i."""

    out: Path
    tars: list[Path]
    options: ShardingOptions

    def __len__(self) -> int:
        """Number of tars."""
        return len(self.tars)

    def images(self, numbers: list[int]) -> None:
        """Unknown before the tars are read."""
        return None

    def build(self, number: int, tick: Tick) -> None:
        """Check the images of one tar and write its index."""
        tar = self.tars[number]
        parts = ShardParts([], [], [])
        with open(tar, "rb") as file:
            for key, members in tar_samples(tar, parts.rejected):
                length = 0
                try:
                    image, row = self._sample(file.fileno(), members)
                    parts.rows.append(row)
                    parts.samples.append(components(members))
                    length = image.length
                except BadImageError as error:
                    parts.rejected.append(Rejected(f"{tar.name}/{key}", str(error)))
                tick(1, length)
        size, sha256 = tar.stat().st_size, file_sha256(tar)
        self.finish(number, self._place(tar), size, sha256, parts, self.index_name(number))

    def index_name(self, number: int) -> str:
        """Name of the index of tar ``number`` in OUT."""
        return f"index-{number:06d}.idx"

    def _sample(self, handle: int, members: list[Member]) -> tuple[Member, tuple[int, ...]]:
        """(the image's member, its row). Raises BadImageError."""
        member = image_member(members)
        if member is None:
            raise BadImageError("no image among its members")
        data = os.pread(handle, member.length, member.offset)
        image = inspect_image(data, self.options.verify, self.options.max_pixels)
        label = -1 if self.options.labels == "none" else read_label(handle, members)
        row = (0, member.offset, len(data), label, image.height, image.width, zlib.crc32(data))
        return member, row

    def _place(self, tar: Path) -> str:
        """Path of the tar: relative if it lies below OUT, so that the folder can be moved."""
        out, there = (Path(os.path.abspath(path)) for path in (self.out, tar))
        return there.relative_to(out).as_posix() if there.is_relative_to(out) else str(there)


def tar_samples(tar: Path, rejected: list[Rejected]) -> Iterator[tuple[str, list[Member]]]:
    """(key, members) of consecutive members with one key, as WebDataset groups them; others go to ``rejected``."""

    def usable() -> Iterator[Member]:
        for member in scan_tar(tar):
            if member.refusal is not None:
                rejected.append(Rejected(f"{tar.name}/{member.name}", member.refusal))
            elif split_key(member.name)[0].rpartition("/")[2]:  # empty for a hidden file
                yield member

    for key, members in groupby(usable(), key=lambda member: split_key(member.name)[0]):
        yield key, list(members)


def image_member(members: list[Member]) -> Member | None:
    """The member of a sample that is its image: the first with an image's extension."""
    return next((m for m in members if split_key(m.name)[1].rpartition(".")[2].lower() in IMAGE_SUFFIXES), None)


def components(members: list[Member]) -> list[Component]:
    """The members of a sample in the form of DALI's index."""
    return [Component(split_key(m.name)[1], m.offset, m.length, m.name) for m in members]


def read_label(handle: int, members: list[Member]) -> int:
    """The class number in a sample's .cls member; -1 without one. Raises BadImageError if it is no number."""
    member = next((m for m in members if split_key(m.name)[1].lower() == "cls"), None)
    if member is None:
        return -1
    text = os.pread(handle, min(member.length, _LABEL_BYTES), member.offset).strip()
    if not text.isdigit() or member.length > _LABEL_BYTES or int(text) >= 2**31:
        raise BadImageError("its .cls file is not a class number")
    return int(text)
