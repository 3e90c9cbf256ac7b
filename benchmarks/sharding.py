"""Sharding against webdataset's own writer and against tar: python benchmarks/sharding.py DATASET

The pictures of DATASET are written out as an image folder first. Then all contestants make tars of it in turn: ours
with each kind of verification and number of workers, webdataset's ShardWriter in one process, and `tar cf`, which does
nothing but copy. Ours also checks, hashes, indexes, shuffles and syncs. Reported: images/s and MB/s, by wall clock and
per second of CPU, and how far workers scale.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import webdataset

from pipeline.errors import UserError, exit_on_user_error
from pipeline.options import ShardingOptions
from pipeline.shards import ShardSet
from pipeline.writer import make_dataset
from tools.measuring import Run, Spread, alternate, describe_machine, ratio, write_json

CLASSES = 10
SHARD = 256  # samples; small, so that a thousand pictures are work for several workers


@dataclass(frozen=True)
class Config:
    """Sharding against others."""

    data: Annotated[Path, tyro.conf.Positional]
    """Dataset folder whose pictures are sharded again."""
    samples: int = 1000
    """Pictures, at most."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of worker processes."""
    verify: tuple[Literal["full", "header", "none"], ...] = ("full", "header", "none")
    """Kinds of verification."""
    repeats: int = 5
    """Runs of each after a warm-up."""
    json: Path | None = None
    """Write the results here too."""


def main() -> None:
    """The command."""
    config = tyro.cli(Config, description=__doc__)
    dataset = ShardSet.open(config.data)
    samples = min(config.samples, dataset.num_samples)
    if samples < 2 * SHARD:
        raise UserError(
            f"{config.data} and --samples give {samples} pictures: it takes {2 * SHARD} to measure anything"
        )
    if config.repeats < 3 or min(config.workers) < 1:
        raise UserError("--repeats must be at least 3, and --workers at least 1")
    folder = Path(tempfile.mkdtemp(prefix="sharding-"))
    try:
        size = write_folder(dataset, samples, folder / "pictures")
        print(describe_machine(), flush=True)
        print(
            f"{samples} pictures, {size / 1e6:.1f} MB, {config.repeats} runs each in turn; median (minimum .. maximum)"
        )
        runs = alternate(contestants(config, folder), config.repeats)
    finally:
        shutil.rmtree(folder)
    results = report(runs, samples, size)
    if config.json is not None:
        write_json(config.json, {"samples": samples, "bytes": size, "contestants": results})


def write_folder(dataset: ShardSet, samples: int, folder: Path) -> int:
    """The pictures as files in class folders; gives their bytes."""
    size = 0
    for sample in range(samples):
        place = folder / f"class-{sample % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        size += (place / f"{sample:06d}.jpg").write_bytes(dataset.read(sample))
    return size


def contestants(config: Config, folder: Path) -> dict[str, Callable[[], None]]:
    """All of them, each writing into a folder that is empty before it begins."""
    pictures, out = folder / "pictures", folder / "out"

    def afresh(work: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            if out.exists():
                shutil.rmtree(out)
            work()

        return run

    def ours(workers: int, verify: Literal["full", "header", "none"]) -> Callable[[], None]:
        options = ShardingOptions(samples_per_shard=SHARD, workers=workers, verify=verify)
        return afresh(lambda: make_dataset(str(pictures), out, options, quiet=True))

    named = {
        f"ours, {verify}, {workers} worker{'s' if workers > 1 else ''}": ours(workers, verify)
        for verify in config.verify
        for workers in config.workers
    }
    named["webdataset ShardWriter"] = afresh(lambda: write_with_webdataset(pictures, out))
    named["tar cf"] = afresh(lambda: write_with_tar(pictures, out))
    return named


def write_with_webdataset(pictures: Path, out: Path) -> None:
    """What its users do: one process, a shuffled list, no checks."""
    out.mkdir()
    with webdataset.ShardWriter(str(out / "shard-%06d.tar"), maxcount=SHARD, verbose=0) as writer:
        for picture in sorted(pictures.glob("*/*.jpg")):
            label = int(picture.parent.name.removeprefix("class-"))
            writer.write({"__key__": picture.stem, "jpg": picture.read_bytes(), "cls": label})


def write_with_tar(pictures: Path, out: Path) -> None:
    """One tar of all."""
    out.mkdir()
    subprocess.run(["tar", "cf", str(out / "all.tar"), "-C", str(pictures), "."], check=True)


def report(runs: dict[str, list[Run]], samples: int, size: int) -> dict[str, Any]:
    """Print the table; gives it for --json."""
    print(f"{'':28} {'images/s':>26} {'MB/s':>8} {'images/CPU s':>26} {'MB/CPU s':>9} {'x ShardWriter':>24}")
    results: dict[str, Any] = {}
    for name, of in runs.items():
        rate = Spread.of([samples / run.wall_s for run in of])
        per_core = Spread.of([samples / run.cpu_s for run in of])
        against = ratio(runs, name, "webdataset ShardWriter")
        megabytes = size / samples / 1e6
        print(
            f"{name:28} {rate!s:>26} {rate.median * megabytes:8.1f} {per_core!s:>26} "
            f"{per_core.median * megabytes:9.1f} {against!s:>24}"
        )
        results[name] = {"img_per_s": rate, "img_per_cpu_s": per_core, "times_shard_writer": against}
    for name in runs:
        one = name.rpartition(", ")[0] + ", 1 worker"
        if name.startswith("ours") and name != one and one in runs:
            gain = ratio(runs, name, one)
            print(f"{name}: {gain} times as fast as 1 worker")
            results[name]["times_one_worker"] = gain
    return results


if __name__ == "__main__":
    exit_on_user_error(main)
