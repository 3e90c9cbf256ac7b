"""What --probe costs a training step: python benchmarks/probe_cost.py DATASET

The training loop's step with and without the linear probe, and the probe's own work on features of the same size, in
turn. Views are kept in memory, so that no loader is measured. DATASET needs labels; its images are not read. The
probe's own work is the sharper measure: whole steps differ by more from run to run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import nn

import train.openmp  # noqa: F401  # before torch's threads start
from model.backbone import find_backbone
from pipeline.backends.base import ViewBatch
from pipeline.common.errors import check_at_least_1, exit_on_user_error
from pipeline.common.locations import InputPath, LocalPath
from pipeline.dataset.dataset import ShardSet
from tools.common.measuring import Spread, alternate, describe_machine, ratio, write_results
from train.config.recipes import parse_config
from train.distributed.process_group import DistContext
from train.engine.build import prepare
from train.engine.loop import train_step
from train.evaluation.online_probe import open_probe

PROBE = "the probe alone"


@dataclass(frozen=True)
class Config:
    """Flags of probe_cost.py."""

    data: Annotated[InputPath, tyro.conf.Positional]
    """Dataset folder of make_shards.py, with labels."""
    backbone: str = "resnet_tiny"
    """Backbone to train with SimSiam."""
    image_size: int = 32
    """Side of the views in pixels."""
    batch: int = 128
    """Images of a step."""
    steps: int = 10
    """Steps of a run."""
    repeats: int = 9
    """Runs of each kind after a warm-up."""
    json: LocalPath | None = None
    """Write the results to this JSON file."""

    def __post_init__(self) -> None:
        """Raise UserError for numbers below 1."""
        for flag in ("batch", "steps", "repeats"):
            check_at_least_1(f"--{flag}", getattr(self, flag))


def probing(config: Config) -> Callable[[], None]:
    """A function that does the probe's work of ``config.steps`` training steps."""
    dist = DistContext.alone(torch.device(device_name()))
    backbone = nn.Identity().train()
    dataset, width = ShardSet.open(config.data), find_backbone(config.backbone).features
    probe = open_probe(backbone, width, dataset, dist)
    features, applied = torch.randn(config.batch, width, device=dist.device), torch.ones((), device=dist.device)
    ids = np.arange(config.batch) % dataset.num_samples

    def work() -> None:
        for _ in range(config.steps):
            backbone(features)
            probe.add(ids)
            top1 = probe.step(applied)
        top1.item()  # waits for the device

    return work


def device_name() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def stepper(config: Config, run_dir: Path, probe: bool) -> Callable[[], None]:
    """A function that makes ``config.steps`` training steps."""
    device = device_name()
    words = ["--data", str(config.data), "--run-dir", str(run_dir), "--global-batch", str(config.batch)]
    words += ["--backbone", config.backbone, "--image-size", str(config.image_size), "--knn-every", "0"]
    run = prepare(
        parse_config([*words, "--device", device, *(["--probe"] if probe else [])]),
        DistContext.alone(torch.device(device)),
    )
    run.model.train()
    shape = (config.batch, 3, config.image_size, config.image_size)
    views = [torch.randn(shape).to(device, memory_format=torch.channels_last) for _ in range(2)]
    ids = np.arange(config.batch) % run.dataset.num_samples
    batch = ViewBatch(views, ids, ids, epoch=0, step=0)

    def work() -> None:
        for _ in range(config.steps):
            result = train_step(run, iter([batch]))
        result.loss.item()  # waits for the device

    return work


def main() -> None:
    """The command."""
    config = tyro.cli(Config, description=__doc__)
    print(describe_machine(), flush=True)
    names = ("without", "with --probe")
    with tempfile.TemporaryDirectory() as folder:
        works = {name: stepper(config, Path(folder) / str(probe), bool(probe)) for probe, name in enumerate(names)}
        runs = alternate({**works, PROBE: probing(config)}, config.repeats)
    steps = {name: Spread.of([1e3 * run.wall_s / config.steps for run in of]) for name, of in runs.items()}
    for name, spread in steps.items():
        print(f"{name:16} {spread} ms a step")
    found = {
        f"{names[1]} / {names[0]}": (ratio(runs, *names), ratio(runs, *names, "cpu_s")),
        f"{PROBE} / {names[0]}": (ratio(runs, names[0], PROBE), ratio(runs, names[0], PROBE, "cpu_s")),
    }
    for name, (time, cpu_time) in found.items():
        print(f"{name}: {time} of the time, {cpu_time} of the CPU time")
    if config.json:
        write_results(config.json, {"ms_per_step": steps, **found})


if __name__ == "__main__":
    exit_on_user_error(main)
