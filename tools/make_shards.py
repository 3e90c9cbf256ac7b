"""Write images as a dataset of WebDataset shards: checked, globally shuffled, the same bytes every time.

    python tools/make_shards.py ~/photos data/photos
    python tools/make_shards.py cifar10.tar.gz data/cifar10-train --subtree train --split train
    python tools/make_shards.py ILSVRC2012_img_train.tar data/imagenet-train
    python tools/make_shards.py ILSVRC2012_img_val.tar data/imagenet-val --labels ILSVRC2012_devkit_t12.tar.gz
    python tools/make_shards.py parquet-folder/ data/from-parquet --subtree data/train-
    python tools/make_shards.py synthetic:20000 data/synthetic
    python tools/make_shards.py s3://bucket/photos s3://bucket/photos-shards
    python tools/make_shards.py "wds:/data/laion/{00000..00099}.tar" data/laion-index

SOURCE is a folder of images (class sub-folders, or flat), a tar of one (also .tar.gz, .bz2, .xz), a folder or tar of
class tars, a zip, a parquet file or a folder of them, the URL of one of these (s3://, gs://, hf://, https://),
synthetic:N, or wds:PATTERN for WebDataset tars, which stay where they are and are only indexed. OUT may be s3:// or
gs://. Killed and started again it goes on with the shards that are missing. docs/formats.md lists every layout with
what becomes of it.

Images are JPEG, PNG, WebP, BMP, TIFF or PPM, and are recognised by their endings, in small or capital letters: .jpg
.jpeg .jpe .jfif .pjpeg .pjp .png .webp .bmp .tif .tiff .ppm .pgm .pbm .pnm
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.common.engine import EngineConfig
from pipeline.common.errors import exit_on_user_error
from pipeline.common.flags import group
from pipeline.common.locations import Location, PathText, Url
from pipeline.common.text import printable
from pipeline.dataset.format import REENCODED_FILE, REJECTED_FILE
from pipeline.sharding.make_dataset import Summary, make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sources.listing import NO_IMAGE_NAME, Rejected, kinds_of

CLASSES_SHOWN = 5


@dataclass(frozen=True)
class Command:
    """The command line: SOURCE, OUT and the options of sharding."""

    source: Annotated[PathText, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder of images, a tar, a zip, parquet files, a URL of one of these, synthetic:N or wds:PATTERN."""
    out: Annotated[Location, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the dataset, made if it is not there: on a disk, or s3:// or gs://."""
    sharding: Annotated[ShardingOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=ShardingOptions)
    engine: Annotated[EngineConfig, group("engine")] = field(default_factory=EngineConfig)


def main() -> None:
    """Parse the command line, write the dataset, say what was done."""
    arguments = window_as_flag(sys.argv[1:])
    command = tyro.cli(Command, args=arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        summary = make_dataset(command.source, command.out, command.sharding, engine=command.engine)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on with what is missing in {command.out}", file=sys.stderr)
        sys.exit(130)  # the shell's code for Ctrl-C
    print(describe(summary))
    if summary.held_out is not None:
        print(describe(summary.held_out))


def window_as_flag(arguments: list[str]) -> list[str]:
    """``--sixteen-bit window LO HI`` as two flags, since tyro's flags have a fixed number of values."""
    for at in range(len(arguments) - 3):
        if arguments[at : at + 2] == ["--sixteen-bit", "window"] and not arguments[at + 2].startswith("-"):
            return [*arguments[: at + 2], "--sixteen-bit-window", *arguments[at + 2 :]]
    return arguments


def describe(summary: Summary) -> str:
    """What a call did, for people."""
    size = f"{summary.shards} shards, {summary.images} images, {summary.bytes / 1e6:.1f} MB, {summary.classes} classes"
    if summary.restored:
        return (
            f"{summary.out}: {size}; {summary.restored} lost shards were written again, with the bytes that "
            "dataset.json records"
        )
    if summary.already_there:
        return f"{summary.out} is complete already: {size}. Nothing to do; --overwrite writes it again."
    lines = [f"{summary.out}: {size} in {summary.seconds:.1f} s", *describe_classes(summary)]
    lines += [f"note: {note}" for note in summary.notes]
    refused = sum(summary.rejected.values())
    if refused:
        lines.append(f"{refused} entries of the source were refused (see {_file(summary, REJECTED_FILE)}):")
        lines += [
            f"  {count:8d}  {describe_reason(summary, reason)}"
            for reason, count in sorted(summary.rejected.items(), key=lambda e: -e[1])
        ]
    if summary.reencoded:
        count = sum(summary.reencoded.values())
        lines.append(f"{count} images were re-encoded without loss (see {_file(summary, REENCODED_FILE)}):")
        lines += [f"  {n:8d}  {reason}" for reason, n in sorted(summary.reencoded.items(), key=lambda e: -e[1])]
    if summary.missing:
        lines.append(
            f"{summary.missing} shards of other parts are missing: the dataset is complete when they are built"
        )
    return printable("\n".join(lines))


def describe_classes(summary: Summary) -> list[str]:
    """What classes came out, and how many images have none."""
    if not summary.classes:
        return []
    shown = ", ".join(map(quoted, summary.class_names[:CLASSES_SHOWN])) + (
        ", ..." if summary.classes > CLASSES_SHOWN else ""
    )
    origin = "" if summary.labels_from is None else f" from {summary.labels_from}"
    doubt = "; not classes? --labels none" if summary.labels_from == "folders" else ""
    lines = [f"{summary.classes} classes{origin}: {shown}{doubt}"]
    if summary.unlabelled:
        lines.append(f"some images have no label, {summary.unlabelled} of {summary.images}: their label is -1")
    return lines


def _file(summary: Summary, name: str) -> Path | Url:
    return summary.out.file(name) if isinstance(summary.out, Url) else summary.out / name


def quoted(name: str) -> str:
    """A class name, in quotes if it holds a comma."""
    return f'"{name}"' if "," in name else name


def describe_reason(summary: Summary, reason: str) -> str:
    """A reason of refusals; entries that are no images by their names are counted by ending."""
    file = _file(summary, REJECTED_FILE)
    if reason != NO_IMAGE_NAME or isinstance(file, Url) or not file.exists():
        return reason
    with open(file, "rb") as lines:
        kinds = kinds_of(Rejected(**json.loads(line)) for line in lines)
    return f"{reason} ({kinds})"


if __name__ == "__main__":
    exit_on_user_error(main)
