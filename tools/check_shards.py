"""Check a dataset that tools/make_shards.py wrote, and rebuild damaged sidecar files.

    python tools/check_shards.py data/photos
    python tools/check_shards.py data/photos --decode full --json report.json
    python tools/check_shards.py data/photos --repair

Compares the tars with dataset.json (lengths, sha256), samples.npy (offsets, lengths, labels, sizes, crc32) and DALI's
indexes, decodes some images of each shard or all of them, finds duplicate images, and counts the classes. --repair
rebuilds dataset.json, samples.npy, rejected.jsonl and the indexes from the tars, which are only read, and checks the
result.
Exit codes: 0 nothing is damaged; 1 something is; 2 a user's mistake.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.checking.check_dataset import Duplicates, Inspection, inspect_dataset
from pipeline.checking.check_shard import CheckOptions
from pipeline.checking.remote_copy import local_copy
from pipeline.checking.repair import repair_dataset
from pipeline.common.engine import EngineConfig
from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.files import check_writable, disk_errors, write_json
from pipeline.common.flags import group
from pipeline.common.locations import LocalPath, Location, Url
from pipeline.dataset.dataset import where_tars_lie
from pipeline.dataset.remote_cache import CacheConfig

CLASSES_SHOWN = 5  # smallest and largest classes listed in the report


@dataclass(frozen=True)
class Command:
    """The command line: DIR and the options of the check."""

    dir: Annotated[Location, tyro.conf.Positional]
    """Folder of the dataset; or its URL (s3://, gs://, https://, hf://), all of which is copied for the check."""
    json: Annotated[LocalPath | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the report to this file as JSON."""
    repair: bool = False
    """Rebuild damaged sidecar files from the tars, then check."""
    global_batch: int = 512
    """Global batch for the report's last line, the steps of an epoch (default: the paper's 512)."""
    quiet: bool = False
    """Show no progress bar."""
    options: Annotated[CheckOptions, tyro.conf.OmitArgPrefixes] = field(default_factory=CheckOptions)
    cache: Annotated[CacheConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=CacheConfig)
    engine: Annotated[EngineConfig, group("engine")] = field(default_factory=EngineConfig)


def main() -> None:
    """Parse the command line, repair if asked to, check, report."""
    command = tyro.cli(Command, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    if command.global_batch < 1:
        raise UserError(f"--global-batch {command.global_batch}: must be at least 1")
    if command.json is not None:
        check_writable("--json", command.json)
    try:
        inspection = _inspect(command)
    except KeyboardInterrupt:
        print("\ninterrupted; the tars are unchanged", file=sys.stderr)
        sys.exit(130)  # the shell's code for Ctrl-C
    print(describe(inspection, command.global_batch))
    if command.json is not None:
        with disk_errors(f"writing {command.json}", f"--json {command.json} cannot be written", "name another file"):
            write_json(command.json, inspection.as_json())
    if not inspection.fine:
        sys.exit(1)


def _inspect(command: Command) -> Inspection:
    place = command.dir
    if isinstance(place, Url):
        if command.repair:
            raise UserError(f"--repair writes files, and {place} can only be read: repair a copy, and upload that")
        on_ray = command.engine.engine == "ray"
        with local_copy(place, command.cache, shards=not on_ray, quiet=command.quiet) as folder:
            found = inspect_dataset(
                folder,
                command.options,
                quiet=command.quiet,
                engine=command.engine,
                shards_at=place if on_ray else None,
            )
            return replace(found, path=place)
    if (tars_at := where_tars_lie(place)) is not None:
        if command.repair or command.engine.engine == "ray":
            raise UserError(
                f"{place} is the index of tars at {tars_at}, which are copied here for the check: leave out --engine "
                "ray; instead of --repair make the index again (siamstream shard --index-only --overwrite)"
            )
        with local_copy(tars_at, command.cache, quiet=command.quiet, index=place) as folder:
            return replace(inspect_dataset(folder, command.options, quiet=command.quiet), path=place)
    if command.repair:
        _repair(place, command)
    return inspect_dataset(place, command.options, quiet=command.quiet, engine=command.engine)


def _repair(folder: Path, command: Command) -> None:
    repaired = repair_dataset(folder, command.options.workers, quiet=command.quiet)
    for name in repaired.rewritten:
        print(f"repaired: {name}")
    if not repaired.rewritten:
        print("nothing to repair: every sidecar file agrees with the tars")
    for what in repaired.lost:
        print(f"could not be restored: {what}")


def describe(inspection: Inspection, global_batch: int) -> str:
    """The report for people."""
    lines = [str(inspection.path)]
    if inspection.samples:
        lines[0] += (
            f": {inspection.samples:,} samples in {inspection.shards:,} shards of {inspection.shard_samples[0]:,} to "
            f"{inspection.shard_samples[1]:,}, {inspection.bytes / 1e6:,.1f} MB; {inspection.decoded:,} decoded"
        )
    lines += [f"  DAMAGED  {damage}" for damage in inspection.damage]
    if inspection.readable_rows:
        lines += [f"  {line}" for line in (*_classes(inspection), *_duplicates(inspection.duplicates))]
    if inspection.samples:
        lines.append(f"  {_batches(inspection.samples, global_batch)}")
    lines.append("nothing is damaged" if inspection.fine else _remedy(inspection))
    return "\n".join(lines)


def _remedy(inspection: Inspection) -> str:
    return (
        f"{len(inspection.damage)} kinds of damage in all. What concerns a .tar: copy that tar again from where the "
        "dataset came from. What concerns other files: --repair makes them again from tars as they were written"
    )


def _classes(inspection: Inspection) -> list[str]:
    counts = sorted(inspection.class_counts.items(), key=lambda entry: entry[1])
    lines = [f"{inspection.unlabelled:,} samples have no label"] if inspection.unlabelled else []
    if len(counts) == 0:
        return lines
    empty = sum(count == 0 for _, count in counts)
    lines.append(f"{len(counts):,} classes, {empty:,} of them empty; samples in the smallest and the largest:")
    ends = [counts[:CLASSES_SHOWN], counts[CLASSES_SHOWN:][-CLASSES_SHOWN:]]
    lines += [f"  {count:9,}  {name}" for end in ends for name, count in end]
    return lines


def _duplicates(found: Duplicates) -> list[str]:
    if found.groups == 0:
        return ["no image is there twice"]
    shown = "; ".join(str(list(group)) for group in found.listed[:CLASSES_SHOWN])
    lines = [f"{found.groups:,} images are there more than once, {found.redundant:,} samples too many: ids {shown}"]
    if found.other_labels:
        lines.append(f"{found.other_labels:,} of these images have several labels")
    return lines


def _batches(samples: int, global_batch: int) -> str:
    """The steps of an epoch. The order is global, so ranks and shards may have any ratio."""
    if samples < global_batch:
        return f"too few samples for a global batch of {global_batch:,}: lower --global-batch of the training"
    steps, rest = divmod(samples, global_batch)
    return (
        f"an epoch of global batch {global_batch:,} has {steps:,} steps and leaves out {rest:,} samples, on any ranks"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
