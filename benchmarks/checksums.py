"""The cost of comparing every image with its checksum: python benchmarks/checksums.py DATASET

The whole CPU loader, and reading alone, each with and without `--no-verify-checksums`, in turn; and how fast one core
computes the checksum. Cost is the time or CPU time with it over that without it, pair by pair, less one. Then how fast
one core compares samples.npy with its sha256, which a run on more than 2.4 million samples does beside its first steps.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.locations import InputPath, LocalPath
from pipeline.dataset.dataset import ShardSet
from pipeline.dataset.format import SAMPLE_DTYPE
from pipeline.dataset.row_check import compare_rows
from pipeline.loader.config import LoaderConfig
from pipeline.sampling.order import OrderConfig
from pipeline.sampling.views import ViewRecipe
from tools.common.measuring import Spread, alternate, describe_machine, ratio, write_results
from tools.throughput.stages import Advance, Bench, read_bytes, whole_loader

GPU_RATE = 4000  # images/s of one rank; a fast GPU with a small backbone
CRC_SECONDS = 1.0  # of CPU; how long the checksum alone is measured, each time
MAX_RESIDENT = 200  # images kept in memory for that
ROWS = 1 << 21  # of a samples.npy of 59 MB


@dataclass(frozen=True)
class Config:
    """Flags of checksums.py."""

    data: Annotated[InputPath, tyro.conf.Positional]
    """Dataset folder."""
    samples: int = 1000
    """Images of one run of the loader; reading alone takes `read_epochs` times as many."""
    read_epochs: int = 10
    """Passes over the images of a run that only reads, which is much faster than the loader."""
    batch: int = 64
    """Images a batch."""
    image_size: int = 224
    """Side of the views, px."""
    repeats: int = 7
    """Runs of each after a warm-up."""
    json: LocalPath | None = None
    """Write the results to this JSON file."""


def main() -> None:
    """The command."""
    config = tyro.cli(Config, description=__doc__)
    dataset = ShardSet.open(config.data)
    batches = min(config.samples, dataset.num_samples) // config.batch
    if batches == 0 or min(config.repeats, config.read_epochs) < 1:
        raise UserError(
            f"{config.data} has {dataset.num_samples} samples: --batch {config.batch} and --samples {config.samples} "
            "must leave a batch, and --repeats and --read-epochs be at least 1"
        )
    print(describe_machine(), flush=True)
    mean = float(dataset.samples["length"].mean())
    speed = crc_speed(dataset, config.repeats)
    cost_ms = mean / speed.median / 1e6
    print(f"one core computes {speed} GB/s: {cost_ms:.3f} ms for an image of {mean / 1e3:.1f} KB, the mean here;")
    print(f"  at {GPU_RATE} images/s of a rank {100 * GPU_RATE * cost_ms / 1e3:.1f} % of one core")
    rows = row_speed(config.repeats)
    hash_s = 1e9 * SAMPLE_DTYPE.itemsize / rows.median / 1e9
    print(f"one core compares {rows} GB/s of samples.npy: {hash_s:.0f} s for a billion samples")
    runs = alternate(contestants(config, batches), config.repeats)
    print(f"{batches * config.batch} images, {config.repeats} runs each in turn; median (minimum .. maximum)")
    print(f"{'':8} {'time with / without':>28} {'CPU time with / without':>28} {'images/s with':>26}")
    results = {}
    for stage, passes in (("read", config.read_epochs), ("loader", 1)):
        images = passes * batches * config.batch
        rate = Spread.of([images / run.wall_s for run in runs[f"{stage}, checked"]])
        wall, cpu = (
            ratio(runs, f"{stage}, unchecked", f"{stage}, checked", quantity) for quantity in ("wall_s", "cpu_s")
        )
        print(f"{stage:8} {wall!s:>28} {cpu!s:>28} {rate!s:>26}")
        results[stage] = {"wall_ratio": wall, "cpu_ratio": cpu, "img_per_s": rate}
    if config.json is not None:
        speeds = {"gb_per_s": speed, "rows_gb_per_s": rows, "mean_bytes": mean, "ms_per_image": cost_ms}
        write_results(config.json, {**speeds, "stages": results})


def crc_speed(dataset: ShardSet, repeats: int) -> Spread:
    """GB/s of the checksum on one core, over images in memory."""
    images = [dataset.read(sample) for sample in range(min(MAX_RESIDENT, dataset.num_samples))]
    speeds = []
    for _ in range(repeats):
        done, start_s = 0, time.thread_time()  # other work on the machine does not count
        while (seconds := time.thread_time() - start_s) < CRC_SECONDS:
            for image in images:
                zlib.crc32(image)
            done += sum(map(len, images))
        speeds.append(done / seconds / 1e9)
    return Spread.of(speeds)


def row_speed(repeats: int) -> Spread:
    """GB/s at which one core compares a samples.npy in the page cache."""
    speeds = []
    with tempfile.TemporaryDirectory(prefix="checksums-") as folder:
        file = Path(folder) / "samples.npy"
        np.save(file, np.zeros(ROWS, SAMPLE_DTYPE))
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        header = file.stat().st_size - ROWS * SAMPLE_DTYPE.itemsize
        for _ in range(repeats):
            start_s = time.thread_time()
            compare_rows(file, header, SAMPLE_DTYPE, sha256, 1, remedy="")
            speeds.append(file.stat().st_size / (time.thread_time() - start_s) / 1e9)
    return Spread.of(speeds)


def contestants(config: Config, batches: int) -> dict[str, Callable[[], None]]:
    """Both stages, with and without checksums; each run opens and closes its own, so that no queue fills."""
    plain = Bench(
        ShardSet.open(config.data),
        ViewRecipe(image_size=config.image_size),
        LoaderConfig(),
        OrderConfig(),
        config.batch,
        seed=0,
        ranks_per_machine=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )

    def run(stage: Callable[[Bench], AbstractContextManager[Advance]], verify: bool, count: int) -> Callable[[], None]:
        bench = replace(plain, dataset=ShardSet.open(config.data, verify_checksums=verify))

        def work() -> None:
            with stage(bench) as advance:
                advance(count)

        return work

    stages = (("read", read_bytes, config.read_epochs * batches), ("loader", whole_loader, batches))
    return {
        f"{name}, {'checked' if verify else 'unchecked'}": run(stage, verify, count)
        for (name, stage, count), verify in itertools.product(stages, (True, False))
    }


if __name__ == "__main__":
    exit_on_user_error(main)
