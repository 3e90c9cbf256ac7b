"""The workload that profile_throughput.py measures: its flags, the dataset, and a run set up as by pretrain.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from model.methods.simsiam import SimSiamConfig
from pipeline.common.errors import UserError, require
from pipeline.common.flags import group
from pipeline.common.locations import LocalPath
from pipeline.common.mixed_data import MixedData
from pipeline.common.system import share_of_cores
from pipeline.dataset.dataset import ShardSet, require_rgb
from pipeline.dataset.mixture import Dataset
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_data, open_dataset
from pipeline.sampling.order import OrderConfig
from pipeline.sampling.views import ViewRecipe
from pipeline.sharding.index_cache import with_indexes
from tools.common.fake_imagenet import dataset_folder
from tools.throughput.report import Setting
from tools.throughput.stages import Bench, StageName
from train.config.run_config import PretrainConfig
from train.distributed.process_group import DistContext
from train.engine.build import describe, prepare
from train.engine.run import Run
from train.evaluation.knn_monitor import KnnConfig
from train.optimization.optimizer import OptimConfig
from train.optimization.precision import PrecisionName

SYNTHETIC = "synthetic"

STAGES: tuple[StageName, ...] = ("read", "decode", "crops", "photometric", "loader", "model", "end_to_end")
GPU_BATCH, CPU_BATCH = 256, 64
FEWEST_REPEATS = 3


@dataclass(frozen=True)
class ProfileConfig:
    """Flags of profile_throughput.py."""

    data: MixedData
    """Dataset folder of make_shards.py, or several as in pretrain.py, or "synthetic": draw JPEGs of ImageNet's size and
    density."""
    batch: int | None = None
    """Source images per step on this rank (default: 256 on a GPU, 64 on a CPU)."""
    repeats: int = 5
    """Timed trials of each stage, after one that warms up; at least 3."""
    seconds: float = 2.0
    """Length of a trial, s."""
    stages: tuple[StageName, ...] = STAGES
    """Stages to measure (default: all)."""
    json: LocalPath | None = None
    """Write the numbers to this file."""
    plot: LocalPath | None = None
    """Draw the stages as bars into this PNG."""
    trace: LocalPath | None = None
    """Write a torch.profiler trace of three end-to-end steps to this file, for ui.perfetto.dev."""
    tune: bool = False
    """Search for the loader's fastest settings instead, and print the flags for pretrain.py."""
    budget: float = 10.0
    """Minutes that --tune may take."""
    ranks_per_machine: int = 1
    """Give the loader the share of the cores that one of so many ranks has."""
    synthetic_samples: int = 1000
    """Images drawn by --data synthetic."""
    synthetic_dir: LocalPath | None = None
    """Keep the drawn images here as a dataset, and reuse it if it exists (default: a temporary folder)."""
    seed: int = 0
    """Seed of weights, order and views."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the model; auto: a GPU if there is one."""
    precision: PrecisionName = "auto"
    """Number format of the step, as in pretrain.py."""
    compile: bool = False
    """Compile the model with torch.compile."""
    model: Annotated[SimSiamConfig, tyro.conf.arg(name="")] = field(default_factory=SimSiamConfig)
    views: Annotated[ViewRecipe, group("views")] = field(default_factory=ViewRecipe)
    order: Annotated[OrderConfig, group("data")] = field(default_factory=OrderConfig)
    loader: Annotated[LoaderConfig, group("loader")] = field(default_factory=LoaderConfig)
    optim: Annotated[OptimConfig, group("optimizer")] = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        require(
            "--repeats",
            self.repeats,
            self.repeats >= FEWEST_REPEATS,
            f"a single run says little; take at least {FEWEST_REPEATS}",
        )
        for name in ("seconds", "budget", "ranks_per_machine"):
            value = getattr(self, name)
            require(f"--{name.replace('_', '-')}", value, value > 0, "it must be above 0")
        if self.batch is not None:
            require("--batch", self.batch, self.batch >= 2, "batch norm needs at least 2")
        require("--stages", "()", bool(self.stages), f"name at least one of {', '.join(STAGES)}")
        if self.plot is not None:
            rule = "the plot is written as PNG; give a name that ends in .png"
            require("--plot", self.plot, self.plot.suffix.lower() == ".png", rule)
        if self.trace is not None:
            rule = "it records end-to-end steps; add end_to_end to --stages"
            require("--trace", self.trace, "end_to_end" in self.stages, rule)


@contextmanager
def open_workload(config: ProfileConfig) -> Iterator[Dataset]:
    """The dataset of --data, or a synthetic one."""
    if str(config.data) != SYNTHETIC:
        data = open_data(with_indexes(config.data, config.loader.cache), config.loader)
        for part in data.parts:
            require_rgb(part, "the profiler")
        yield data
        return
    with dataset_folder(config.synthetic_dir, config.synthetic_samples) as folder:
        dataset = open_dataset(folder, config.loader)
        mean = float(dataset.samples["length"].mean()) / 1e3
        height, width = dataset.sizes(range(dataset.num_samples)).mean(axis=0)
        print(f"data: {dataset.num_samples} synthetic JPEGs, mean {mean:.0f} KB, {width:.0f} x {height:.0f} px")
        yield dataset


def build(config: ProfileConfig, dataset: Dataset, dist: DistContext) -> tuple[Bench, Run]:
    """The bench and the run, set up as by pretrain.py. Raises UserError if the dataset is too small."""
    batch = config.batch or (GPU_BATCH if dist.device.type == "cuda" else CPU_BATCH)
    if dataset.epoch_samples < batch:
        raise UserError(
            f"--data {dataset.path} has {dataset.epoch_samples} samples, too few to measure batches of {batch}: "
            "lower --batch, or take a larger dataset (--data synthetic)"
        )
    pretrain = PretrainConfig(
        data=dataset.path if isinstance(dataset, ShardSet) else config.data,
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
        knn=KnnConfig(every=0),
    )
    run = prepare(pretrain, dist)
    for line in describe(run):
        if line.startswith("  "):
            print(line)
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


def setting_of(bench: Bench, run: Run) -> Setting:
    """The part of the configuration that advice depends on."""
    return Setting(
        on_gpu=bench.device.type == "cuda",
        decoder=bench.loader.dali.decoder,
        cores=share_of_cores(bench.ranks_per_machine),
        precision=run.precision.name,
        compiled=run.config.compile,
    )


def subtitle(bench: Bench, run: Run) -> str:
    """One line on what was measured, for the plot."""
    machine = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    return (
        f"{run.config.model.backbone} at {bench.recipe.image_size} px, batch {bench.batch}, {run.precision.name}"
        f"{', compiled' if run.config.compile else ''}; {machine}, {share_of_cores(bench.ranks_per_machine)} cores"
    )
