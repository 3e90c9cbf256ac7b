"""Sharding against webdataset's own writer and against tar: python benchmarks/sharding.py DATASET

The images of DATASET are first written as an image folder, repeated under other names (hard links) until they suffice
for a run of 10 seconds. Then all contestants make tars of it in turn: ours with each kind of verification and number
of workers, webdataset's ShardWriter in one process, and `tar cf`, which only copies. Ours also checks, hashes, indexes,
shuffles and syncs; a plain copy with a sync shows the speed of the disk. Images come from the page cache, since the
same ones are read repeatedly.

Reported: images/s and MB/s, by wall clock and per second of CPU; the start-up time of ours, which is the time for a
handful of images; and the scaling with workers, with and without the start-up, beside that of processes that only
hash, which shows the scaling of the machine's cores.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.files import check_writable
from pipeline.common.locations import InputPath, LocalPath
from pipeline.dataset.dataset import ShardSet
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tools.common.measuring import Run, Spread, alternate, describe_machine, write_results

Verify = Literal["full", "header", "none"]

CLASSES = 10
SHARDS_A_WORKER = 8  # for the largest number of workers, so that none waits long for the last shard
FEW = 4  # images per worker, for the measurement of the start-up
HASHING = "import hashlib; data = bytes(1 << 20)\nfor _ in range(3000): hashlib.sha256(data)"
START = "start-up"
SHARD_WRITER = "webdataset ShardWriter"


@dataclass(frozen=True)
class Config:
    """Flags of sharding.py."""

    data: Annotated[InputPath, tyro.conf.Positional]
    """Dataset folder whose images are sharded again."""
    megabytes: float = 8000
    """Size of the images for contestants that only copy, MB; as much disk must be free."""
    full_megabytes: float = 2000
    """Size of the images for --verify full, which decodes them, MB."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of worker processes."""
    verify: tuple[Verify, ...] = ("full", "header", "none")
    """Kinds of verification."""
    repeats: int = 3
    """Runs of each after a warm-up."""
    place: LocalPath | None = None
    """Folder on the disk to measure (default: the system's temporary folder)."""
    json: LocalPath | None = None
    """Write the results to this JSON file."""
    plot: LocalPath | None = None
    """Draw the results into this PNG."""


@dataclass(frozen=True)
class Contestant:
    """A way to make tars of a folder of images."""

    work: Callable[[], Any]
    samples: int  # images in it
    size: int  # their bytes


def main() -> None:
    """The command."""
    config = tyro.cli(Config, description=__doc__)
    check(config)
    dataset = ShardSet.open(config.data)
    folder = Path(tempfile.mkdtemp(prefix="sharding-", dir=config.place))
    try:
        named = contestants(config, folder, *write_folders(config, dataset, folder))
        print(describe_machine(), flush=True)
        for kind, picked in (("copied", named[SHARD_WRITER]), ("decoded", named.get(ours("full", config.workers[0])))):
            if picked is not None:
                print(f"{picked.samples:,} images, {picked.size / 1e6:,.0f} MB, where they are {kind}")
        print(f"{config.repeats} runs each in turn; median (minimum .. maximum)", flush=True)
        works = {name: contestant.work for name, contestant in named.items()}
        runs = alternate(works, config.repeats, lambda: shutil.rmtree(folder / "out", ignore_errors=True))
    finally:
        shutil.rmtree(folder)
    results = report(named, runs)
    if config.json is not None:
        write_results(config.json, {"contestants": results})
    if config.plot is not None:
        from plots import draw_sharding  # here: worker processes import this module again, but need no matplotlib

        subtitle = f"{describe_machine().splitlines()[0]}; whiskers: slowest and fastest of {config.repeats} runs"
        draw_sharding({name: result for name, result in results.items() if "img_per_s" in result}, subtitle).savefig(
            config.plot, dpi=150
        )


def check(config: Config) -> None:
    """Raise UserError for what cannot be measured or written, before any measurement."""
    if config.repeats < 3 or not config.workers or min(config.workers) < 1:
        raise UserError("--repeats must be at least 3, and --workers at least 1")
    if min(config.megabytes, config.full_megabytes) <= 0:
        raise UserError("--megabytes and --full-megabytes must be above 0")
    place = config.place or Path(tempfile.gettempdir())
    if not place.is_dir():
        raise UserError(f"--place {place} is no folder: make it, or choose another")
    needed, free = 1e6 * max(config.megabytes, config.full_megabytes), shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{place} has {free / 1e6:.0f} MB free, and this takes {needed / 1e6:.0f}: "
            "lower --megabytes, or choose another disk with --place"
        )
    for flag, path in (("--json", config.json), ("--plot", config.plot)):
        if path is not None:
            check_writable(flag, path)


def ours(what: str, workers: int) -> str:
    """Name of our contestant; ``what``: a kind of verification, or START."""
    return f"ours, {what}, {workers} worker{'s' if workers > 1 else ''}"


def hashing(processes: int) -> str:
    """Name of the contestant of processes that only hash."""
    return f"hashing, {processes} process{'es' if processes > 1 else ''}"


def write_folders(config: Config, dataset: ShardSet, folder: Path) -> tuple[Contestant, Contestant, Contestant]:
    """Write the folders of images to copy, to decode, and for the start-up; return the amount in each."""
    mean = float(dataset.samples["length"].mean())
    fewest = SHARDS_A_WORKER * max(config.workers)
    counts = [max(fewest, round(1e6 * megabytes / mean)) for megabytes in (config.megabytes, config.full_megabytes)]
    copied, decoded, few = (
        Contestant(lambda: None, count, write_folder(dataset, count, folder / name))
        for name, count in zip(("copied", "decoded", "few"), (*counts, FEW * max(config.workers)), strict=True)
    )
    return copied, decoded, few


def write_folder(dataset: ShardSet, samples: int, folder: Path) -> int:
    """Write ``samples`` images as files in class folders, repeating them as needed; return their bytes."""
    size, files = 0, []
    for number in range(samples):
        place = folder / f"class-{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        file = place / f"{number:07d}.jpg"
        if number < dataset.num_samples:
            files.append((file, file.write_bytes(dataset.read(number))))
        else:
            os.link(files[number % dataset.num_samples][0], file)
        size += files[number % dataset.num_samples][1]
    return size


def contestants(
    config: Config, folder: Path, copied: Contestant, decoded: Contestant, few: Contestant
) -> dict[str, Contestant]:
    """All contestants; each creates the folder ``out``."""
    out = folder / "out"

    def shard(verify: Verify, workers: int, name: str, amount: Contestant, per_shard: int) -> Contestant:
        options = ShardingOptions(samples_per_shard=per_shard, workers=workers, verify=verify)
        work = partial(make_dataset, str(folder / name), out, options, quiet=True)
        return Contestant(work, amount.samples, amount.size)

    def of_shards(amount: Contestant) -> int:
        return math.ceil(amount.samples / (SHARDS_A_WORKER * max(config.workers)))

    named = {}
    for verify in config.verify:
        name, amount = ("decoded", decoded) if verify == "full" else ("copied", copied)
        for workers in config.workers:
            named[ours(verify, workers)] = shard(verify, workers, name, amount, of_shards(amount))
    for workers in config.workers:
        named[ours(START, workers)] = shard("header", workers, "few", few, FEW)
    others = {
        SHARD_WRITER: partial(write_with_webdataset, folder / "copied", out, of_shards(copied)),
        "tar cf": partial(write_with_tar, folder / "copied", out),
        "copied and synced": partial(copy_and_sync, folder / "copied", out),
    }
    named |= {name: Contestant(work, copied.samples, copied.size) for name, work in others.items()}
    for processes in config.workers:
        named[hashing(processes)] = Contestant(partial(hash_only, processes), 0, 0)
    return named


def hash_only(processes: int) -> None:
    """The same work in each process."""
    running = [subprocess.Popen([sys.executable, "-c", HASHING]) for _ in range(processes)]
    for process in running:
        process.wait()


def write_with_webdataset(images: Path, out: Path, per_shard: int) -> None:
    """As in webdataset's documentation: one process, no checks."""
    import webdataset  # here: it imports torch, which our worker processes do not need

    out.mkdir()
    with webdataset.ShardWriter(str(out / "shard-%06d.tar"), maxcount=per_shard, verbose=0) as writer:
        for image in sorted(images.glob("*/*.jpg")):
            label = int(image.parent.name.removeprefix("class-"))
            writer.write({"__key__": image.stem, "jpg": image.read_bytes(), "cls": label})


def write_with_tar(images: Path, out: Path) -> None:
    """One tar of all images."""
    out.mkdir()
    subprocess.run(["tar", "cf", str(out / "all.tar"), "--hard-dereference", "-C", str(images), "."], check=True)


def copy_and_sync(images: Path, out: Path) -> None:
    """Copy all files into one, in order, and sync it."""
    out.mkdir()
    with open(out / "all", "wb", buffering=1 << 20) as file:
        for image in sorted(images.glob("*/*.jpg")):
            file.write(image.read_bytes())
        file.flush()
        os.fsync(file.fileno())


def report(named: dict[str, Contestant], runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """Print the tables; return them for --json."""
    print(f"{'':25} {'images/s':>24} {'MB/s':>6} {'images/CPU s':>24} {'MB/CPU s':>9} {'x ShardWriter':>23} {'s':>7}")
    results: dict[str, dict[str, Any]] = {}
    for name, of in runs.items():
        contestant, wall = named[name], Spread.of([run.wall_s for run in of])
        results[name] = {"samples": contestant.samples, "bytes": contestant.size, "wall_s": wall}
        if START in name or contestant.samples == 0:
            continue
        rate = Spread.of([contestant.samples / run.wall_s for run in of])
        per_core = Spread.of([contestant.samples / run.cpu_s for run in of])
        against = times_as_fast(named, runs, name, SHARD_WRITER)
        megabytes = contestant.size / contestant.samples / 1e6
        print(
            f"{name:25} {rate!s:>24} {rate.median * megabytes:6.0f} {per_core!s:>24} "
            f"{per_core.median * megabytes:9.0f} {against!s:>23} {wall.median:7.2f}"
        )
        results[name] |= {
            "img_per_s": rate,
            "mb_per_s": rate.median * megabytes,
            "img_per_cpu_s": per_core,
            "mb_per_cpu_s": per_core.median * megabytes,
            "times_shard_writer": against,
        }
    for name, result in results.items():
        if START in name:
            print(f"{name}: {result['wall_s']} s")
    report_scaling(named, runs, results)
    return results


def report_scaling(
    named: dict[str, Contestant], runs: dict[str, list[Run]], results: dict[str, dict[str, Any]]
) -> None:
    """Print the speed-up of many workers over one, and add it to ``results``."""
    for name in [name for name in results if not name.endswith((" 1 worker", " 1 process"))]:
        head, _, tail = name.rpartition(", ")
        number = tail.split()[0]
        if head == "hashing" and hashing(1) in runs:
            pairs = zip(runs[hashing(1)], runs[name], strict=True)
            gain = Spread.of([int(number) * one.wall_s / many.wall_s for one, many in pairs])
            print(f"{name}: {gain} times as much as 1 process")
            results[name]["times_one"] = gain
        elif head.startswith("ours") and START not in name and f"{head}, 1 worker" in runs:
            one = f"{head}, 1 worker"
            gain = times_as_fast(named, runs, name, one)
            starts = [[run.wall_s for run in runs[ours(START, workers)]] for workers in (1, int(number))]
            rounds = zip(runs[one], runs[name], *starts, strict=True)
            begun = Spread.of(
                [(a.wall_s - a_start) / max(b.wall_s - b_start, 1e-9) for a, b, a_start, b_start in rounds]
            )
            print(f"{name}: {gain} times as fast as 1 worker; once started {begun}")
            results[name] |= {"times_one": gain, "times_one_once_started": begun}


def times_as_fast(named: dict[str, Contestant], runs: dict[str, list[Run]], name: str, as_: str) -> Spread:
    """Images/s of ``name`` / those of ``as_``, round by round."""
    share = named[name].samples / named[as_].samples
    return Spread.of([share * b.wall_s / a.wall_s for a, b in zip(runs[name], runs[as_], strict=True)])


if __name__ == "__main__":
    exit_on_user_error(main)
