"""Start-up time, memory and time per batch of a rank as the dataset grows: python benchmarks/scale.py

Simulates datasets of 1e6, 1e8 and 1e9 samples by their index alone (28 bytes a sample, a hole in a file that takes no
disk) and 1 to 1024 ranks. For each case it starts a process that does the work of a rank before its first image and at
every batch: open the dataset, compute the order, look up sizes, draw parameters. Start-up includes the first batch and
excludes the import of torch, which is constant. Memory is private memory, without the pages of the mapped index, which
all ranks of a machine share. A batch's time has two parts: computing order and parameters, and looking up sizes in the
index, whose pages are read from the disk the first time.

Then it compares how well the order by blocks and the random order mix, and the share of shards that a machine reads.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.files import check_writable
from pipeline.common.locations import LocalPath
from pipeline.dataset.dataset import ShardSet
from pipeline.dataset.format import FORMAT_VERSION, SAMPLE_DTYPE
from pipeline.sampling.order import Order, OrderConfig, choose_order
from pipeline.sampling.sampler import batch_positions, node_positions, steps_per_epoch
from pipeline.sampling.views import ViewRecipe, draw_views
from tools.common.measuring import Spread, describe_machine, write_results

ONE_RANK = "one-rank"  # first argument of a process that plays one rank
STREAMS = 8
ORDERS = {
    "random": OrderConfig(),
    "blocks": OrderConfig("blocks"),
    f"{STREAMS} streams": OrderConfig("blocks", block_streams=STREAMS),
}
TYPICAL_SIZE = (375, 500)  # height, width in px; holes in the index read as 0 x 0


@dataclass(frozen=True)
class Config:
    """Flags of scale.py."""

    samples: tuple[float, ...] = (1e6, 1e8, 1e9)
    """Sizes of the simulated datasets."""
    ranks: tuple[int, ...] = (1, 32, 1024)
    """Numbers of ranks; one of them is measured."""
    samples_per_shard: int = 10_000
    """Samples per shard."""
    rank_batch: int = 256
    """Samples per batch of a rank."""
    batches: int = 50
    """Batches timed in each process, after a tenth as many for warm-up."""
    repeats: int = 3
    """Processes started for each case, in turn."""
    json: LocalPath | None = None
    """Write the results to this JSON file."""
    plot: LocalPath | None = None
    """Draw the results into this PNG."""


def main() -> None:
    """The command."""
    if sys.argv[1:2] == [ONE_RANK]:
        folder, ranks, order, rank_batch, batches = sys.argv[2:]
        print(json.dumps(be_a_rank(Path(folder), int(ranks), order, int(rank_batch), int(batches))))
        return
    config = tyro.cli(Config, description=__doc__)
    check(config)
    print(describe_machine(), flush=True)
    results = measure(config)
    quality = measure_quality()
    print(f"\n{'order':34} {'shards in a batch of 256':>26} {'pairs that meet again':>22} {'read by a machine':>18}")
    for row in quality:
        mixing = f"{row['shards_in_batch']:26.1f} {row['meet_again']:20.2f} x"
        print(f"{row['order']:34} {mixing} {row['read_by_machine']:18.1%}")
    print("pairs that meet again: pairs of one batch that share a batch in the next epoch too, against chance")
    print(f"read by a machine: the part of the shards that one of {STREAMS} machines reads in an epoch")
    if config.json is not None:
        write_results(config.json, {"cases": results, "quality": quality})
    if config.plot is not None:
        from plots import draw_scale  # here: the processes of the ranks do not need matplotlib

        subtitle = f"{describe_machine().splitlines()[0]}; whiskers: the slowest and the fastest process"
        draw_scale(results, subtitle).savefig(config.plot, dpi=150)


def check(config: Config) -> None:
    """Raise UserError for what cannot be simulated or written, before any measurement."""
    if min(config.samples) < config.samples_per_shard or config.repeats < 1 or config.batches < 10:
        raise UserError("--samples must fill a shard, --repeats must be at least 1 and --batches at least 10")
    if config.rank_batch % STREAMS:
        raise UserError(f"--rank-batch {config.rank_batch}: take a multiple of {STREAMS}, the streams of an order here")
    for ranks, samples in itertools.product(config.ranks, config.samples):
        if ranks < 1 or ranks * config.rank_batch > samples:
            raise UserError(f"--ranks {ranks} x --rank-batch {config.rank_batch} is no batch of {samples:g} samples")
    for flag, path in (("--json", config.json), ("--plot", config.plot)):
        if path is not None:
            check_writable(flag, path)


def measure(config: Config) -> list[dict[str, Any]]:
    """Every size, number of ranks and order."""
    columns = f"{'start-up s':>26} {'memory MiB':>11} {'order + parameters ms':>27} {'index ms':>26}"
    title = f"{'samples':>8} {'ranks':>6} {'order':>9} {columns}"
    print(f"\n{title}", flush=True)
    results = []
    for size in config.samples:
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:
            simulate(Path(folder), int(size), config.samples_per_shard)
            cases = [(ranks, order) for ranks in config.ranks for order in ORDERS]
            runs: dict[tuple[int, str], list[dict[str, float]]] = {case: [] for case in cases}
            for _ in range(config.repeats):
                for case in cases:
                    runs[case].append(start_rank(config, Path(folder), *case))
            for (ranks, order), measured in runs.items():
                spread = {name: Spread.of([run[name] for run in measured]) for name in measured[0]}
                print(
                    f"{size:8.0e} {ranks:6d} {order:>9} {spread['start_up_s']!s:>26} "
                    f"{spread['memory_mib'].median:11.0f} {spread['batch_ms']!s:>27} {spread['lookup_ms']!s:>26}",
                    flush=True,
                )
                fields = {name: asdict(value) for name, value in spread.items()}
                results.append({"samples": int(size), "ranks": ranks, "order": order, **fields})
    return results


def simulate(folder: Path, samples: int, per_shard: int) -> None:
    """Write a dataset without images: empty tars, and an index that is a hole."""
    shards = -(-samples // per_shard)
    counts = [min(per_shard, samples - number * per_shard) for number in range(shards)]
    with open(folder / "samples.npy", "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(SAMPLE_DTYPE), "fortran_order": False, "shape": (samples,)}
        np.lib.format.write_array_header_2_0(file, header)
        file.truncate(file.tell() + samples * SAMPLE_DTYPE.itemsize)
    small = (folder / "samples.npy").stat().st_size <= 64 << 20
    digest = hashlib.sha256((folder / "samples.npy").read_bytes()).hexdigest() if small else "0" * 64
    entries = []
    for number, count in enumerate(counts):
        name = f"shard-{number:06d}"
        (folder / f"{name}.tar").touch()
        entries.append(
            {"name": f"{name}.tar", "index": f"{name}.idx", "samples": count, "bytes": 0, "sha256": f"{number:064x}"}
        )
    info = {
        "format_version": FORMAT_VERSION,
        "source": "simulated",
        "source_fingerprint": "",
        "split": None,
        "seed": 0,
        "recipe": {},
        "num_samples": samples,
        "num_rejected": 0,
        "rejected": {},
        "classes": ["class 0"],  # a hole reads as label 0
        "has_labels": True,
        "samples_sha256": digest,
        "shards": entries,
    }
    (folder / "dataset.json").write_text(json.dumps(info))


def start_rank(config: Config, folder: Path, ranks: int, order: str) -> dict[str, float]:
    """Measure a rank in its own process."""
    words = [str(word) for word in (folder, ranks, order, config.rank_batch, config.batches)]
    answer = subprocess.run([sys.executable, __file__, ONE_RANK, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(answer.stdout)


def be_a_rank(folder: Path, ranks: int, order_name: str, rank_batch: int, batches: int) -> dict[str, float]:
    """Time the last of ``ranks`` ranks: its start up to the first batch, and ``batches`` batches across the epoch."""
    before = private_mib()
    start_s = time.perf_counter()
    dataset = ShardSet.open(folder)
    global_batch = ranks * rank_batch
    order = choose_order(ORDERS[order_name], 0, dataset.shard_samples, global_batch)
    steps = steps_per_epoch(dataset.num_samples, global_batch)
    one_batch(dataset, order, 0, global_batch, ranks)
    start_up_s = time.perf_counter() - start_s
    seconds, lookup_seconds = [], []
    for step in np.linspace(0, steps - 1, batches + batches // 10).astype(int).tolist():
        start_s = time.perf_counter()
        lookup_s = one_batch(dataset, order, step, global_batch, ranks)
        seconds.append(time.perf_counter() - start_s - lookup_s)
        lookup_seconds.append(lookup_s)
    return {
        "start_up_s": start_up_s,
        "memory_mib": private_mib() - before,
        "batch_ms": 1e3 * float(np.median(seconds[batches // 10 :])),
        "lookup_ms": 1e3 * float(np.median(lookup_seconds[batches // 10 :])),
    }


def one_batch(dataset: ShardSet, order: Order, step: int, global_batch: int, ranks: int) -> float:
    """Order, sizes and parameters of the last rank's part of a batch; gives the seconds that the sizes took."""
    ids = order(0, batch_positions(step, global_batch, ranks - 1, ranks))
    start_s = time.perf_counter()
    stored = dataset.sizes(ids)
    lookup_s = time.perf_counter() - start_s
    draw_views(ViewRecipe(), 0, 0, ids, np.maximum(stored, TYPICAL_SIZE).astype(np.int32))
    return lookup_s


def private_mib() -> float:
    """Private memory of this process; the mapped index is shared by the ranks of a machine."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise UserError(f"this benchmark reads Linux's /proc; {os.uname().sysname} has none")


def measure_quality(
    shards: int = 640, per_shard: int = 2048, batch: int = 256, epochs: int = 4
) -> list[dict[str, Any]]:
    """How well orders mix a dataset of ImageNet's size: shards in a batch, and pairs of samples that meet again."""
    counts = np.full(shards, per_shard)
    configs = {"random": OrderConfig()}
    configs |= {f"blocks of {group} shards": OrderConfig("blocks", group) for group in (1, 4, 16, 64)}
    configs |= {f"blocks of 16 shards, {streams} streams": OrderConfig("blocks", 16, streams) for streams in (2, 8, 32)}
    steps = shards * per_shard // batch
    samples = steps * batch
    chance = batch * (batch - 1) / 2 * steps * (batch - 1) / (samples - 1)
    rows = []
    for name, config in configs.items():
        order = choose_order(config, 0, counts, batch)
        everything = [order(epoch, np.arange(samples)) for epoch in range(epochs)]
        shard_of = everything[0].reshape(steps, batch) // per_shard
        rows.append(
            {
                "order": name,
                "shards_in_batch": float(np.mean([len(np.unique(row)) for row in shard_of])),
                "meet_again": float(
                    np.mean([pairs_again(now, later, batch) for now, later in itertools.pairwise(everything)]) / chance
                ),
                "read_by_machine": len(np.unique(shard_of[:, node_positions(0, batch, 0, STREAMS, 1)])) / shards,
            }
        )
    return rows


def pairs_again(now: np.ndarray, later: np.ndarray, batch: int) -> int:
    """Pairs that share a batch in both of two epochs."""
    place = np.empty_like(later)
    place[later] = np.arange(len(later)) // batch
    cells = np.arange(len(now)) // batch * (len(now) // batch + 1) + place[now]
    _, together = np.unique(cells, return_counts=True)
    return int((together * (together - 1) // 2).sum())


if __name__ == "__main__":
    exit_on_user_error(main)
