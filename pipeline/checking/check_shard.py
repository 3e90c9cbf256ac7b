"""Check one shard: its tar against dataset.json, DALI's index, samples.npy and the images' checksums."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.common.errors import UserError, require
from pipeline.common.files import open_regular, read_regular
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.dataset.format import file_sha256
from pipeline.dataset.names import NAMES_FILE, Names
from pipeline.dataset.shard_tar import Component, index_bytes
from pipeline.sharding.decode_service import Decoders
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.prepare_image import find_fault
from pipeline.sharding.write_shard import key_stem
from pipeline.sources.channels import inspect_channels
from pipeline.sources.image_file import BadImageError, inspect_image
from pipeline.sources.listing import Rejected
from pipeline.sources.tar_members import Member
from pipeline.sources.wds_samples import SampleRules, components, image_member, read_label, tar_samples

EXAMPLES = 5  # cases of each kind of damage listed in a report; the rest is counted
Decode = Literal["sampled", "full", "none"]


@dataclass(frozen=True)
class CheckOptions:
    """Options of a check. Raises UserError for values outside their range."""

    decode: Decode = "sampled"
    """Images to decode. full: all, and those other than JPEGs of 1 or 3 components with every back end that is
    installed. sampled: some of each shard, always the same ones. none: read headers only."""
    decode_per_shard: int = 32
    """Images of a shard that --decode sampled decodes, evenly spread."""
    workers: int = 0
    """Threads that read and decode; 0 = one per CPU core."""

    def __post_init__(self) -> None:
        require("--decode-per-shard", self.decode_per_shard, self.decode_per_shard >= 1, "must be at least 1")
        require("--workers", self.workers, self.workers >= 0, "must be at least 1, or 0 for one per CPU core")


@dataclass(frozen=True)
class Damage:
    """One kind of damage to one file."""

    where: str  # the file
    kind: str
    count: int  # cases
    examples: tuple[str, ...]  # the first EXAMPLES of them

    def __str__(self) -> str:
        more = f", and {self.count - len(self.examples):,} more" if self.count > len(self.examples) > 0 else ""
        return f"{self.where}: {self.kind}" + (f": {'; '.join(self.examples)}{more}" if self.examples else "")


class Findings:
    """The damage found so far in one file: cases counted by kind, a few of each listed."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str = "") -> None:
        """Count a case; list ``example`` if fewer than EXAMPLES are listed."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        examples = self._examples.setdefault(kind, [])
        if example and len(examples) < EXAMPLES:
            examples.append(example)

    def damage(self) -> list[Damage]:
        return [Damage(self._where, kind, n, tuple(self._examples[kind])) for kind, n in self._counts.items()]


@dataclass(frozen=True)
class _TarSample:
    """One sample of a tar that has an image."""

    key: str
    name: str  # of the image's member
    length: int  # bytes of the image
    label: int | str  # -1: none; a text: why its .cls member is no label
    components: list[Component]


@dataclass(frozen=True)
class ShardFindings:
    """Result of checking one shard."""

    damage: list[Damage]
    decoded: int  # images


@dataclass(frozen=True)
class Records:
    """The records of all shards, as far as they can be read."""

    dataset: ShardSet  # its ``samples`` may be empty or those of another dataset
    first_row: np.ndarray  # int64[shards + 1]: rows first_row[n] to first_row[n + 1] are shard n's
    names: Names | None  # of the samples; None if there are none or they cannot be read
    decoders: Decoders  # for --decode full
    rejected: frozenset[str]  # names in rejected.jsonl; empty unless tars of others were indexed
    foreign: bool  # indexed tars of others; refused images are still in them

    @property
    def options(self) -> ShardingOptions:
        """The sharding options that decide the contents of a row."""
        return recorded_options(self.dataset.info["recipe"])

    @cached_property
    def rules(self) -> SampleRules:
        """How the image and the label of a sample were chosen."""
        recipe, options = self.dataset.info["recipe"], self.options
        image_ext = options.wds_image_ext if self.dataset.channels == 3 else "npy"
        rules = SampleRules.of(options.labels, image_ext, options.wds_label_key)
        return replace(rules, plainest="wds_image_ext" in recipe)  # earlier versions took the first image

    @cached_property
    def class_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.dataset.classes)}


def recorded_options(recipe: dict[str, Any]) -> ShardingOptions:
    """Options for reading the tars again, from a dataset's recipe: whether labels were read, and the pixel limit."""
    max_pixels = recipe.get("max_pixels")
    limit = max_pixels if isinstance(max_pixels, int) and max_pixels > 0 else ShardingOptions.max_pixels
    image_ext, label_key = (
        value if isinstance(value, str) else None for value in map(recipe.get, ("wds_image_ext", "wds_label_key"))
    )
    return ShardingOptions(
        max_pixels=limit,
        labels="none" if recipe.get("labels") == "none" else "auto",
        wds_image_ext=image_ext,
        wds_label_key=label_key,
        # rows of 16-bit images are there already; datasets of earlier versions took all of them
        sixteen_bit="auto" if recipe.get("sixteen_bit") == "auto" else "full-range",
    )


def check_shard(records: Records, number: int, options: CheckOptions) -> ShardFindings:
    """Check shard ``number``. An unreadable file is a finding, not an exception."""
    dataset, shard = records.dataset, records.dataset.shards[number]
    tar = dataset.shard_path(number)
    in_tar, in_rows = Findings(shard.name), Findings(f"samples.npy, rows of {shard.name}")
    in_index, in_names = Findings(shard.index), Findings(f"{NAMES_FILE}, rows of {shard.name}")
    decoded = 0
    try:
        samples, whole = _scan(tar, records, in_tar)
        _compare_with_record(tar, shard.bytes, shard.sha256, in_tar)
        rows = range(int(records.first_row[number]), int(records.first_row[number + 1]))
        if len(rows):
            decoded = _check_rows(records, number, rows, samples, whole, options, in_tar, in_rows)
        if whole:
            _check_unlisted(records, number, rows, samples, in_rows)
            _check_index(records, number, rows, samples, in_index)
            _check_names(records, number, rows, samples, in_names)
    except OSError as error:
        in_tar.add(f"cannot be read: {error.strerror}")
    found = (in_tar, in_rows, in_index, in_names)
    return ShardFindings([one for each in found for one in each.damage()], decoded)


def _scan(tar: Path, records: Records, found: Findings) -> tuple[dict[int, _TarSample], bool]:
    """(the tar's samples by the offset of their image, whether the tar could be read to its end)."""
    samples: dict[int, _TarSample] = {}
    strange: list[Rejected] = []
    with open(open_regular(tar), "rb") as file:
        try:
            for key, members in tar_samples(tar, strange):
                image = image_member(members, records.rules)
                if image is not None:
                    label = _label(file.fileno(), members, image, records)
                    samples[image.offset] = _TarSample(key, image.name, image.length, label, components(members))
        except UserError as error:
            found.add("is no whole tar", str(error))
            return samples, False
    if not records.foreign:
        for entry in strange:
            found.add("holds what the sharder never writes", f"{entry.name} ({entry.reason})")
    return samples, True


def _label(handle: int, members: list[Member], image: Member, records: Records) -> int | str:
    """The class number that a sample's members give it, or why they give it none."""
    try:
        label = read_label(handle, members, image, records.rules)
    except BadImageError as error:
        return str(error)
    if isinstance(label, str):
        return records.class_numbers.get(label, f"its class {label!r} is none of the dataset's")
    return label


def _compare_with_record(tar: Path, size: int, sha256: str, found: Findings) -> None:
    actual = tar.stat().st_size
    if actual != size:
        found.add("has another length than recorded", f"{actual:,} bytes instead of {size:,}")
    elif file_sha256(tar) != sha256:
        found.add("has changed since it was written: its sha256 is not the one recorded")


def _check_rows(
    records: Records,
    number: int,
    rows: range,
    samples: dict[int, _TarSample],
    whole: bool,
    options: CheckOptions,
    in_tar: Findings,
    in_rows: Findings,
) -> int:
    """Compare each row with the tar; returns the number of decoded images."""
    to_decode = decoded_rows(rows, options)
    for sample_id in rows:
        row = records.dataset.samples[sample_id]
        if int(row["shard"]) != number:
            in_rows.add("name another shard", f"row {sample_id} says {row['shard']} instead of {number}")
            continue
        sample = samples.get(int(row["offset"]))
        if sample is None:
            if whole:
                in_rows.add("point where no image begins", f"row {sample_id}, byte {row['offset']}")
                continue
        else:
            _compare_row(sample_id, row, sample, records.dataset.classes, in_rows)
        _check_image(records, sample_id, options.decode if sample_id in to_decode else "none", in_tar, in_rows)
    return len(to_decode)


def decoded_rows(rows: range, options: CheckOptions) -> frozenset[int]:
    """Rows of a shard whose images are decoded: all, none, or evenly spread ones."""
    if options.decode == "none":
        return frozenset()
    if options.decode == "full" or len(rows) <= options.decode_per_shard:
        return frozenset(rows)
    spread = np.linspace(rows.start, rows.stop - 1, options.decode_per_shard)
    return frozenset(spread.round().astype(int).tolist())


def _compare_row(sample_id: int, row: np.void, sample: _TarSample, classes: tuple[str, ...], found: Findings) -> None:
    label = int(row["label"])
    who = f"row {sample_id} ({sample.key})"
    if int(row["length"]) != sample.length:
        found.add("have another length than the tar", f"{who}: {row['length']} bytes instead of {sample.length}")
    if isinstance(sample.label, str):
        found.add("belong to samples without a usable label", f"{who}: {sample.label}")
    elif label != sample.label:
        found.add("have another label than the tar", f"{who}: {label} instead of {sample.label}")
    if not -1 <= label < len(classes):
        found.add("have a label that is no class", f"{who}: {label}, with {len(classes)} classes")


def _check_image(records: Records, sample_id: int, decode: Decode, in_tar: Findings, in_rows: Findings) -> None:
    dataset = records.dataset
    try:
        data = dataset.read(sample_id)
        if dataset.channels != 3:
            image, fault = inspect_channels(data, dataset.channels, records.options.max_pixels), None
        else:
            image = inspect_image(data, "header" if decode == "none" else "full", records.options.max_pixels)
            fault = find_fault(data, image, "full" if decode == "full" else "header", records.decoders)
    except BadSampleError as error:
        in_tar.add("has images that are not what was written", f"row {sample_id} ({error.key}): {error.reason}")
        return
    except BadImageError as error:
        key = dataset.bad_sample(sample_id, "").key
        in_tar.add("has images that cannot be used", f"row {sample_id} ({key}): {error}")
        return
    if fault is not None:
        key = dataset.bad_sample(sample_id, "").key
        in_tar.add("has images that back ends do not decode alike", f"row {sample_id} ({key}): {fault}")
    recorded = tuple(dataset.sizes([sample_id])[0].tolist())
    if recorded != (image.height, image.width):
        is_ = f"{image.height} x {image.width}"
        in_rows.add("have another size than the image", f"row {sample_id}: {recorded[0]} x {recorded[1]}, it is {is_}")


def _check_unlisted(
    records: Records, number: int, rows: range, samples: dict[int, _TarSample], found: Findings
) -> None:
    if len(rows) == 0:
        return
    tar = records.dataset.shard_path(number).name
    listed = set(records.dataset.samples["offset"][rows.start : rows.stop].tolist())
    for offset, sample in samples.items():
        if offset not in listed and f"{tar}/{sample.key}" not in records.rejected:
            found.add("leave out images of the tar", sample.key)


def _check_names(records: Records, number: int, rows: range, samples: dict[int, _TarSample], found: Findings) -> None:
    """Compare the samples' names with their keys in the tar, of indexed tars with the members' names."""
    if records.names is None or len(records.names) < rows.stop:
        return
    tar = records.dataset.shard_path(number).name
    for sample_id in rows:
        sample = samples.get(int(records.dataset.samples[sample_id]["offset"]))
        if sample is None:
            continue  # reported with the rows
        name = records.names[sample_id]
        fits = name == f"{tar}/{sample.name}" if records.foreign else key_stem(name) == sample.key.partition("_")[2]
        if not fits:
            found.add("belong to other samples", f"row {sample_id}: {name!r} for key {sample.key}")


def _check_index(records: Records, number: int, rows: range, samples: dict[int, _TarSample], found: Findings) -> None:
    """Compare DALI's index with the tar, line by line."""
    chosen = samples
    if records.foreign and len(rows):
        listed = set(records.dataset.samples["offset"][rows.start : rows.stop].tolist())
        chosen = {offset: sample for offset, sample in samples.items() if offset in listed}
    expected = index_bytes(sample.components for sample in chosen.values())
    try:
        content = read_regular(records.dataset.index_path(number))
    except FileNotFoundError:
        found.add("is missing")
        return
    except OSError as error:
        found.add(f"cannot be read: {error.strerror}")
        return
    if content == expected:
        return
    pairs = zip(content.splitlines(), expected.splitlines(), strict=False)
    line = next((n for n, (one, other) in enumerate(pairs, 1) if one != other), None)
    found.add("is not the index of its tar", "it is cut off or too long" if line is None else f"first in line {line}")
