"""What is measured: dataset, model, settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from model.methods.simsiam import SimSiamConfig
from pipeline.common.errors import UserError
from pipeline.common.locations import Location
from pipeline.common.system import share_of_cores
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_dataset
from pipeline.sampling.order import OrderConfig
from pipeline.sampling.views import ViewRecipe
from tools.common.fake_imagenet import dataset_folder
from tools.throughput.report import Setting
from tools.throughput.stages import Bench, RungName
from train.config.run_config import PretrainConfig
from train.distributed.process_group import DistContext
from train.engine.build import prepare
from train.engine.run import Run
from train.optimization.optimizer import OptimConfig
from train.optimization.precision import PrecisionName

SYNTHETIC = "synthetic"


RUNGS: tuple[RungName, ...] = ("read", "decode", "crops", "photometric", "loader", "model", "end_to_end")
GPU_BATCH, CPU_BATCH = 256, 64


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
    synthetic_samples: int = 1000  # images that --data synthetic draws
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


def build(config: ProfileConfig, dataset: ShardSet, dist: DistContext) -> tuple[Bench, Run]:
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
