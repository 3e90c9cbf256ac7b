"""Make a dataset of existing WebDataset tars (wds:PATTERN): the tars are indexed in place and never rewritten.

Refused images stay in their tar but get no row in samples.npy, so training does not read them.
"""

from __future__ import annotations

import glob
import hashlib
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from pipeline.common.errors import UserError
from pipeline.common.files import open_regular
from pipeline.common.secrets import conceal
from pipeline.dataset.format import Shard, file_sha256
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.prepare_image import inspect_in_place
from pipeline.sharding.write_shard import Job, ShardParts, Tick
from pipeline.sources.class_names import mixed_classes
from pipeline.sources.image_file import BadImageError
from pipeline.sources.listing import MOST_BYTES, Rejected
from pipeline.sources.tar_members import Member
from pipeline.sources.wds_samples import (
    SampleRules,
    components,
    image_member,
    other_images,
    read_label,
    tar_samples,
)

_WDS_ONLY = ("wds_image_ext", "wds_label_key")
_UNUSED = {
    "limit": None,
    "shorter_side": None,
    "subtree": "",
    "labels": ("auto", "none"),
    "label_column": None,
    "image_column": None,
    "sixteen_bit": ("auto", "full-range", "refuse"),
    "reencode": False,
}


def check_options(options: ShardingOptions) -> None:
    """Raise UserError for options that would need the tars to be rewritten."""
    for name, fine in _UNUSED.items():
        value = getattr(options, name)
        if value not in (fine if isinstance(fine, tuple) else (fine,)):
            raise UserError(
                f"--{name.replace('_', '-')} {value} does not go with wds:, since tars are only indexed: leave it out"
            )


def expand_braces(pattern: str) -> list[str]:
    """PATTERN of wds:PATTERN with braces expanded ({000000..000146}). Raises UserError if they do not match."""
    try:
        return list(braceexpand(pattern))
    except ValueError:
        raise UserError(f"wds:{conceal(pattern)}: the braces do not match; write {{000000..000146}}") from None


def open_tars(pattern: str) -> list[Path]:
    """The tars of wds:PATTERN: braces are expanded, then * and ?, sorted within each brace.

    Raises UserError for a missing tar, or no tar at all.
    """
    tars: list[Path] = []
    for one in expand_braces(pattern):
        found = sorted(glob.glob(one)) if glob.has_magic(one) else [one]
        tars += [Path(os.path.abspath(name)) for name in found]
    missing = [tar for tar in tars if not tar.is_file()]
    if missing or not tars:
        raise UserError(f"wds:{pattern}: {f'{missing[0]} is missing' if missing else 'no such tar'}; check the pattern")
    return list(dict.fromkeys(tars))


def refuse_wds_options(options: ShardingOptions) -> None:
    """Raise UserError for options that only wds: uses."""
    for name in _WDS_ONLY:
        if (value := getattr(options, name)) is not None:
            raise UserError(
                f"--{name.replace('_', '-')} {value} is for SOURCE wds:PATTERN, whose tars hold samples: leave it out"
            )


def labels_from(options: ShardingOptions) -> str:
    """What the labels of indexed tars are from, for people."""
    return "their .cls files" if options.wds_label_key is None else f"{options.wds_label_key} in their .json files"


def listing_fingerprint(tars: list[Path], sizes: list[int]) -> str:
    """sha256 over the tars' names and lengths."""
    entries = (f"{tar.name}\0{size}\n" for tar, size in zip(tars, sizes, strict=True))
    return hashlib.sha256("".join(entries).encode()).hexdigest()


@dataclass
class IndexJob(Job):
    """Index existing tars; shard i is tar i."""

    out: Path
    tars: list[Path]
    options: ShardingOptions

    def __len__(self) -> int:
        return len(self.tars)

    @property
    def rules(self) -> SampleRules:
        """How images and labels of samples are chosen."""
        return SampleRules.of(self.options.labels, self.options.wds_image_ext, self.options.wds_label_key)

    def images(self, numbers: list[int]) -> None:
        """Unknown before the tars are read."""
        return None

    def build(self, number: int, tick: Tick) -> None:
        """Check the images of one tar and write its index."""
        parts = ShardParts([], [], [])
        with self.tar(number) as tar, open(open_regular(tar), "rb") as file:
            for key, members in tar_samples(tar, parts.rejected):
                length = 0
                try:
                    image, row = self._sample(file.fileno(), f"{tar.name}/{key}", members, parts)
                    parts.rows.append(row)
                    parts.samples.append(components(members))
                    parts.names.append(f"{tar.name}/{image.name}")
                    parts.rejected += other_images(members, image, tar.name)
                    length = image.length
                except BadImageError as error:
                    parts.rejected.append(Rejected(f"{tar.name}/{key}", str(error)))
                tick(1, length)
            size, sha256 = tar.stat().st_size, file_sha256(tar)
        self.finish(number, self.place(number), size, sha256, parts, self.index_name(number))

    def is_whole(self, number: int, shard: Shard, sizes: dict[str, int]) -> bool:
        """Whether the tar has the length that it had when it was indexed."""
        try:
            return (self.out / shard.name).stat().st_size == shard.bytes
        except FileNotFoundError:
            return False

    @contextmanager
    def tar(self, number: int) -> Iterator[Path]:
        """Tar ``number`` as a file of this machine."""
        yield self.tars[number]

    def index_name(self, number: int) -> str:
        """Name of the index of tar ``number`` in OUT."""
        return f"index-{number:06d}.idx"

    def _sample(
        self, handle: int, name: str, members: list[Member], parts: ShardParts
    ) -> tuple[Member, tuple[int, ...]]:
        """(the image's member, its row). A class that is a word is numbered by its place in ``parts.words``.

        Raises BadImageError.
        """
        member = image_member(members, self.rules)
        if member is None:
            wanted = "image" if not self.rules.image_extensions else " or ".join(self.rules.image_extensions)
            raise BadImageError(f"no {wanted} among its members")
        if member.length > MOST_BYTES:
            raise BadImageError(f"larger than {MOST_BYTES >> 20:,} MiB")
        data = os.pread(handle, member.length, member.offset)
        image = inspect_in_place(data, self.options, self.decoders)
        label = read_label(handle, members, member, self.rules)
        row = (0, member.offset, len(data), _number(label, name, parts), image.height, image.width, zlib.crc32(data))
        return member, row

    def place(self, number: int) -> str:
        """Path of the tar: relative if it lies below OUT, so that the folder can be moved."""
        out, there = (Path(os.path.abspath(path)) for path in (self.out, self.tars[number]))
        return there.relative_to(out).as_posix() if there.is_relative_to(out) else str(there)


def _number(label: int | str, name: str, parts: ShardParts) -> int:
    """The label for the row of sample ``name``. Raises UserError if classes are both words and numbers."""
    if isinstance(label, str):
        if parts.numbered:
            raise UserError(mixed_classes(label, parts.numbered))
        return parts.words.setdefault(label, len(parts.words))
    if label >= 0 and not parts.numbered:
        parts.numbered = f"{label} of {name}"
        if parts.words:
            raise UserError(mixed_classes(next(iter(parts.words)), parts.numbered))
    return label
