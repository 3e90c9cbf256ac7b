"""Measure the ladder of throughput, from bytes to trained steps, and say what limits training and what to change.

    python tools/profile_throughput.py --data DIR
    python tools/profile_throughput.py --data synthetic --json ladder.json --plot ladder.png
    python tools/profile_throughput.py --data synthetic --backbone resnet_tiny --image-size 32 --batch 64     (a CPU)
    python tools/profile_throughput.py --data DIR --tune --budget 10 --tuning-file loader-tuning.json

Every rung runs alone and in turn with the others, several times after a warm-up; medians and extremes are shown, in
source images per second. --data synthetic draws JPEGs of ImageNet's size and density, so no ImageNet is needed. --tune
searches the loader's settings instead and writes the file that pretrain.py --loader-tuning takes.
Exit codes: 0 done; 2 a user's mistake.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from model.simsiam import SimSiamConfig
from pipeline.backends import choose_backend
from pipeline.delivery import share_of_cores
from pipeline.disk import check_writable
from pipeline.errors import UserError, exit_on_user_error
from pipeline.loader import open_dataset
from pipeline.loader_config import LoaderConfig
from pipeline.location import Location
from pipeline.order import OrderConfig
from pipeline.shards import ShardSet
from pipeline.views import ViewRecipe
from tools.gpu_watch import GpuWatch, busy_with_others
from tools.imagenet_like import dataset_folder
from tools.ladder import Bench, Rung, RungName, make_ladder
from tools.ladder_plot import draw_ladder
from tools.ladder_report import RungResult, Setting, as_json, describe, judge, table
from tools.measuring import describe_machine, write_results
from tools.tuning import tune
from tools.turns import Climber, Turn
from train.build import prepare
from train.config import PretrainConfig
from train.dist import Dist, distributed
from train.optim import OptimConfig
from train.precision import PrecisionName
from train.run import Run

SYNTHETIC = "synthetic"
RUNGS: tuple[RungName, ...] = ("read", "decode", "crops", "photometric", "loader", "model", "end_to_end")
FEWEST_REPEATS = 3
GPU_BATCH, CPU_BATCH = 256, 64
TRACE_STEPS = 3


@dataclass(frozen=True)
class ProfileConfig:
    """What limits training, measured."""

    data: Location  # dataset folder, as tools/make_shards.py wrote it, or "synthetic"
    batch: int | None = None  # source images a step on this rank; default: 256 on a GPU, 64 on a CPU
    repeats: int = 5  # timed turns of each rung, after one that warms up; at least 3
    seconds: float = 2.0  # of each turn
    rungs: tuple[RungName, ...] = RUNGS  # those to measure
    json: Path | None = None  # write the numbers here
    plot: Path | None = None  # write a bar ladder here, as PNG
    trace: Path | None = None  # write a torch.profiler trace of some end-to-end steps here (open in Perfetto)
    tune: bool = False  # search the loader's settings instead, and write --tuning-file
    budget: float = 10.0  # minutes that --tune may take
    tuning_file: Path = Path("loader-tuning.json")  # what --tune writes, for pretrain.py --loader-tuning
    tune_batch: bool = False  # let --tune try other batches too
    ranks_per_machine: int = 1  # take the share of the cores that one of so many ranks has
    synthetic_samples: int = 1000  # pictures that --data synthetic draws
    # Keep them as a dataset here, and use it if it is there; default: a temporary one
    synthetic_dir: Path | None = None
    seed: int = 0  # of weights, order and views
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU if there is one
    precision: PrecisionName = "auto"  # as in pretrain.py
    compile: bool = False  # torch.compile the model
    model: Annotated[SimSiamConfig, tyro.conf.arg(name="")] = field(default_factory=SimSiamConfig)
    views: Annotated[ViewRecipe, tyro.conf.arg(name="")] = field(default_factory=ViewRecipe)
    order: Annotated[OrderConfig, tyro.conf.arg(name="")] = field(default_factory=OrderConfig)
    loader: Annotated[LoaderConfig, tyro.conf.arg(name="")] = field(default_factory=LoaderConfig)
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(default_factory=OptimConfig)


def main() -> None:
    """The command."""
    config = tyro.cli(ProfileConfig, description=__doc__)
    check(config)
    with distributed(config.device) as dist, open_data(config) as dataset:
        warning = busy_with_others(dist.device)
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        print(describe_machine(), flush=True)
        bench, run = build(config, dataset, dist)
        if config.tune:
            tune(
                bench,
                run,
                budget_s=60 * config.budget,
                with_batch=config.tune_batch,
                file=config.tuning_file,
            )
        else:
            profile(config, bench, run)


def check(config: ProfileConfig) -> None:
    """Raise UserError for what cannot be measured or written, before time is spent."""
    if config.repeats < FEWEST_REPEATS:
        raise UserError(f"--repeats {config.repeats}: a single run says little; take at least {FEWEST_REPEATS}")
    for flag, value in (
        ("--seconds", config.seconds),
        ("--budget", config.budget),
        ("--ranks-per-machine", config.ranks_per_machine),
    ):
        if value <= 0:
            raise UserError(f"{flag} {value}: it must be above 0")
    if config.batch is not None and config.batch < 2:
        raise UserError(f"--batch {config.batch}: batch norm needs at least 2")
    if not config.rungs:
        raise UserError(f"--rungs: name at least one of {', '.join(RUNGS)}")
    if config.plot is not None and config.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {config.plot}: the plot is written as PNG; give a name that ends in .png")
    if config.trace is not None and "end_to_end" not in config.rungs:
        raise UserError("--trace records end-to-end steps: add end_to_end to --rungs")
    for flag, path in (
        ("--json", config.json),
        ("--plot", config.plot),
        ("--trace", config.trace),
        ("--tuning-file", config.tuning_file if config.tune else None),
    ):
        if path is not None:
            check_writable(flag, path)


@contextmanager
def open_data(config: ProfileConfig) -> Iterator[ShardSet]:
    """The dataset to measure with, or one drawn for the purpose."""
    if str(config.data) != SYNTHETIC:
        yield open_dataset(config.data, config.loader)
        return
    with dataset_folder(config.synthetic_dir, config.synthetic_samples) as folder:
        dataset = open_dataset(folder, config.loader)
        mean = float(dataset.samples["length"].mean()) / 1e3
        height, width = dataset.sizes(range(dataset.num_samples)).mean(axis=0)
        print(f"data: {dataset.num_samples} synthetic JPEGs, mean {mean:.0f} KB, {width:.0f} x {height:.0f} px")
        yield dataset


def build(config: ProfileConfig, dataset: ShardSet, dist: Dist) -> tuple[Bench, Run]:
    """The bench and the run, as pretrain.py would set them up. Raises UserError if the dataset is too small."""
    batch = config.batch or (GPU_BATCH if dist.device.type == "cuda" else CPU_BATCH)
    if dataset.num_samples < batch:
        raise UserError(
            f"--data {config.data} has {dataset.num_samples} samples, too few to measure batches of {batch}: "
            "lower --batch, or take a larger dataset (--data synthetic)"
        )
    pretrain = PretrainConfig(
        data=dataset.path,
        run_dir=Path("(none)"),  # nothing is written
        global_batch=batch,
        seed=config.seed,
        device=config.device,
        precision=config.precision,
        compile=config.compile,
        model=config.model,
        views=config.views,
        order=config.order,
        loader=config.loader,
        optim=config.optim,
    )
    run = prepare(pretrain, dist, announce=lambda _, line: print(line) if line.startswith("  ") else None)
    run.model.train()
    bench = Bench(
        dataset=dataset,
        recipe=config.views,
        loader=config.loader,
        order=config.order,
        batch=batch,
        seed=config.seed,
        ranks_per_machine=config.ranks_per_machine,
        device=dist.device,
        dtype=run.precision.view_dtype,
    )
    return bench, run


def profile(config: ProfileConfig, bench: Bench, run: Run) -> None:
    """Climb the ladder, report, and write what was asked for."""
    every = make_ladder(bench, run)
    rungs = {name: every[name] for name in RUNGS if name in config.rungs}
    print(
        f"{config.repeats} turns of {config.seconds:g} s, batches of {bench.batch}, {bench.threads} loader threads, "
        f"back end {choose_backend(bench.loader.backend)[0]}; median (slowest .. fastest turn)",
        flush=True,
    )
    turns = climb(rungs, bench, config.seconds, config.repeats)
    results = {name: RungResult.of(of) for name, of in turns.items()}
    verdict = judge(results, turns, setting_of(bench, run))
    print(table(results))
    print(describe(verdict))
    if config.json is not None:
        write_results(config.json, {"config": _plain(config), **as_json(results, verdict)})
        print(f"numbers: {config.json}")
    if config.plot is not None:
        draw_ladder(results, verdict, subtitle(bench, run)).savefig(config.plot, dpi=130)
        print(f"plot: {config.plot}")
    if config.trace is not None:
        write_trace(every["end_to_end"], bench.device, config.trace)
        print(f"trace: {config.trace} (open it in https://ui.perfetto.dev)")


def climb(rungs: dict[RungName, Rung], bench: Bench, seconds: float, repeats: int) -> dict[str, list[Turn]]:
    """Take the turns; progress goes to stderr where that is a terminal."""
    done = 0

    def tell(name: str, turn: Turn) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            text = f"turn {done} of {repeats * len(rungs)}: {name} {turn.img_per_s:,.0f} images/s"
            print(f"\r\x1b[K{text}", end="" if done < repeats * len(rungs) else "\r\x1b[K", file=sys.stderr, flush=True)

    with GpuWatch(bench.device) as watch:
        climber = Climber(seconds, watch, bench.tidy)
        return climber.climb({str(name): rung for name, rung in rungs.items()}, repeats, tell)


def setting_of(bench: Bench, run: Run) -> Setting:
    """What advice depends on."""
    return Setting(
        on_gpu=bench.device.type == "cuda",
        decoder=bench.loader.dali.decoder,
        cores=share_of_cores(bench.ranks_per_machine),
        precision=run.precision.name,
        compiled=run.config.compile,
    )


def subtitle(bench: Bench, run: Run) -> str:
    """What was measured, for the plot."""
    machine = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    return (
        f"{run.config.model.backbone} at {bench.recipe.image_size} px, batch {bench.batch}, {run.precision.name}"
        f"{', compiled' if run.config.compile else ''}; {machine}, {share_of_cores(bench.ranks_per_machine)} cores"
    )


def write_trace(rung: Rung, device: torch.device, path: Path) -> None:
    """Record some end-to-end steps with torch.profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with rung.open() as advance:
        advance(2)
        with torch.profiler.profile(activities=kinds) as profiler:
            advance(TRACE_STEPS)
    profiler.export_chrome_trace(str(path))


def _plain(config: ProfileConfig) -> dict[str, object]:
    return {
        name: value if isinstance(value, (int, float, dict)) else str(value) for name, value in asdict(config).items()
    }


if __name__ == "__main__":
    exit_on_user_error(main)
