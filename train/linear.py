"""Linear evaluation: the accuracy of a linear classifier on an encoder's frozen features. Chen & He 2020, appendix A.

    torchrun --standalone --nproc-per-node=8 train/linear.py --data DIR --val-data DIR --checkpoint FILE
    python train/linear.py --data DIR --val-data DIR --checkpoint untrained:resnet50                     (one process)

Training sees a random crop (scale 0.08 to 1, torchvision's default) and a flip of each image; validation the whole
image resized to a shorter side of 256, its centre of 224 cut out. The encoder does not change, so the validation
features are made once, each image's exactly once over all ranks, and every epoch is validated on them. With --run-dir
metrics.jsonl gets a line for each epoch and rate, summary.json the end; --resume goes on after the last whole epoch.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.common.buffers import on_device
from pipeline.common.errors import UserError, check_divisible, exit_on_user_error, require
from pipeline.common.flags import group, usage
from pipeline.common.locations import DatasetPlace, LocalPath
from pipeline.common.system import duration
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_crops
from pipeline.sampling.order import epoch_order
from pipeline.sampling.sampler import BatchSampler, batch_positions, steps_per_epoch
from pipeline.sharding.index_cache import make_indexes
from train.distributed.collectives import mean_over_ranks, on_all_ranks, print0, sum_over_ranks
from train.distributed.process_group import DistContext, distributed, exit_once, found_by_every_rank, read_launch
from train.evaluation.features import (
    IMAGES_PER_PASS,
    EncoderConfig,
    FrozenEncoder,
    ImageSource,
    Samples,
    check_same_classes,
    each_rank,
    labelled_features,
    open_frozen,
    open_labelled,
    split_ids,
)
from train.evaluation.linear_probe import (
    LITTLE_TRAVEL,
    LinearHeads,
    ProbeConfig,
    build_lars,
    count_correct,
    head_losses,
    set_rates,
    stratified,
)
from train.evaluation.linear_results import LinearRun, Outcome
from train.optimization.precision import PrecisionName, choose_precision

CROP_SCALE = (0.08, 1.0)  # torchvision's RandomResizedCrop, which the official code uses as it is
Batch = tuple[Float[Tensor, "n d"], Int64[Tensor, " n"]]  # features and labels of one rank's part of one step


@dataclass(frozen=True)
class LinearConfig:
    """Linear evaluation of a frozen encoder."""

    # Labelled dataset to train the classifier on.
    data: DatasetPlace
    # Labelled dataset to measure on, of the same classes; every image counts exactly once.
    val_data: DatasetPlace
    encoder: Annotated[EncoderConfig, group("encoder")]
    # Folder for metrics.jsonl, summary.json and what --resume needs; default: print only.
    run_dir: LocalPath | None = None
    # Go on after the last whole epoch in --run-dir; from the start if there is none.
    resume: bool = False
    # Share of each class to train on, 0.01 or 0.1 for low-label evaluation; --seed draws other samples.
    fraction: float = 1.0
    # Compute the training features once, from centre crops, instead of new crops in each epoch: an epoch takes seconds,
    # and the accuracy is usually some points lower, as there is no augmentation. For small sets: every process holds
    # all features.
    features_cache: bool = False
    # Device that computes; auto: the GPUs if there are any.
    device: Literal["auto", "cuda", "cpu"] = "auto"
    # Number format of the encoder's forward pass; auto: bf16 on a GPU (fp16 before Ampere), fp32 on a CPU.
    precision: PrecisionName = "auto"
    probe: Annotated[ProbeConfig, group("classifier")] = field(default_factory=ProbeConfig)
    loader: Annotated[LoaderConfig, group("loader")] = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        require("--fraction", self.fraction, 0 < self.fraction <= 1, "it must be above 0 and at most 1")
        if self.resume and self.run_dir is None:
            raise UserError("--resume: say with --run-dir which evaluation is to go on")


def main() -> None:
    """Run the command."""
    launch = read_launch()
    with exit_once(), found_by_every_rank(launch):
        config = tyro.cli(
            LinearConfig, prog=usage("--data DIR --val-data DIR --checkpoint FILE"), console_outputs=launch.is_main
        )
    make_indexes(config.loader.cache, config.data, config.val_data)
    with exit_once(), distributed(config.device, launch=launch) as dist:
        evaluate(config, dist)


@dataclass(frozen=True)
class ProbeSetup:
    """Everything that is settled before the first step."""

    config: LinearConfig
    dist: DistContext
    encoder: FrozenEncoder
    source: ImageSource
    precision: str  # of the encoder's forward pass
    train: Samples
    val: Samples
    steps: int  # of an epoch

    @property
    def labels(self) -> int:
        return len(self.train.dataset.classes)

    @property
    def rank_batch(self) -> int:
        """Images of a step on one rank."""
        return self.config.probe.global_batch // self.dist.world_size

    def identity(self) -> dict[str, Any]:
        """What decides the numbers; an interrupted evaluation goes on only where all of it is equal."""
        datasets = {"data": self.train.dataset.fingerprint, "val_data": self.val.dataset.fingerprint}
        more = {name: getattr(self.config, name) for name in ("fraction", "features_cache")}
        size = {"image_size": self.encoder.pixels.image_size, "seed": self.config.encoder.seed}
        return {**asdict(self.config.probe), **datasets, **more, **size, "encoder": self.encoder.weights.identity}


def evaluate(config: LinearConfig, dist: DistContext) -> Outcome:
    """Train the classifiers and measure them. Raises UserError for mistakes. A collective."""
    with ExitStack() as held:
        return _evaluate(config, dist, held)


def _evaluate(config: LinearConfig, dist: DistContext, held: ExitStack) -> Outcome:
    work = prepare(config, dist)
    config = work.config
    heads = LinearHeads(len(config.probe.base_lrs()), work.encoder.width, work.labels, config.encoder.seed).to(
        dist.device
    )
    optimizer = build_lars(config.probe, heads)
    run = LinearRun(config.run_dir, dist, work.identity(), config.probe.base_lrs(), heads, optimizer)
    first = run.open(config.resume, held)
    print0(dist, f"validation   features of {len(work.val.ids):,} images, once")
    val = labelled_features(work.encoder.backbone, work.val, work.source)
    parallel = DistributedDataParallel(heads) if dist.world_size > 1 else heads
    start_s = time.perf_counter()
    with batches(work, first) as training:
        for epoch in range(first, config.probe.epochs):
            losses = train_epoch(work, parallel, optimizer, training, epoch)
            correct = sum_over_ranks(dist, count_correct(heads, *val)).tolist()
            outcome = run.epoch_done(epoch + 1, (epoch + 1) * work.steps, losses, correct, len(work.val.ids))
            left_s = (time.perf_counter() - start_s) / (epoch + 1 - first) * (config.probe.epochs - epoch - 1)
            print0(dist, f"epoch {epoch + 1}/{config.probe.epochs}: {outcome.best.describe()}; left {duration(left_s)}")
    outcome = run.outcome()
    for head in outcome.heads:
        print0(dist, head.describe())
    if (note := outcome.edge_of_sweep()) is not None:
        print0(dist, note)
    run.finish({"checkpoint": work.encoder.weights.source, "train_samples": len(work.train.ids)})
    return outcome


def prepare(config: LinearConfig, dist: DistContext) -> ProbeSetup:
    """Check everything that can be checked, read the encoder, print the plan. A collective."""
    setup = on_all_ranks(dist, lambda: _set_up(config, dist))
    probe, train, pixels = setup.config.probe, setup.train, setup.encoder.pixels
    rates = ", ".join(f"{rate:g} (peak {rate * probe.global_batch / 256:g})" for rate in probe.base_lrs())
    views = "centre crops, features made once" if config.features_cache else "a new crop and flip in each epoch"
    steps = f"{probe.epochs} epochs x {setup.steps:,} of {probe.global_batch:,}"
    print0(
        dist,
        f"encoder      {setup.encoder.weights.describe()}, images of {pixels.image_size} px, {setup.precision}\n"
        f"training     {len(train.ids):,} samples of {len(train.dataset.classes):,} classes; {views}\n"
        f"steps        {probe.epochs * setup.steps:,} = {steps}\n"
        f"LARS         base lr {rates}; cosine",
    )
    if (travel := probe.travel(probe.epochs * setup.steps)) < LITTLE_TRAVEL:
        times = math.ceil(LITTLE_TRAVEL / travel)
        print0(
            dist,
            f"note: so few steps let LARS move the classifier's weights by {100 * travel:.2g} % of their length at "
            f"most, near their random start. Take {times} times as many --epochs, or a higher --base-lr",
        )
    return setup


def _set_up(config: LinearConfig, dist: DistContext) -> ProbeSetup:
    """What one rank can find out alone. Raises UserError."""
    encoder = open_frozen(config.encoder, dist.device)
    precision = choose_precision(config.precision, dist.device)
    train, val = open_datasets(config)
    config = replace(config, probe=config.probe.fitted(len(train.ids), dist.world_size))
    steps = check_batch(config.probe, len(train.ids), dist.world_size)
    source = ImageSource(encoder.recipe, config.loader, dist, precision.autocast, precision.view_dtype)
    return ProbeSetup(config, dist, encoder, source, precision.name, train, val, steps)


def open_datasets(config: LinearConfig) -> tuple[Samples, Samples]:
    """What to train on and what to measure on. Raises UserError if they do not fit."""
    train = open_labelled(config.data, "--data", config.loader)
    val = open_labelled(config.val_data, "--val-data", config.loader)
    check_same_classes("--val-data", val, train)
    ids = Samples.labelled(train).ids
    chosen = stratified(train.labels(ids), config.fraction, train.classes, config.encoder.seed)
    return Samples(train, ids[chosen]), Samples.labelled(val)


def check_batch(probe: ProbeConfig, samples: int, world_size: int) -> int:
    """Steps of an epoch. Raises UserError for a batch that the ranks cannot share or the samples cannot fill."""
    check_divisible(probe.global_batch, world_size, f"{world_size} processes")
    if probe.global_batch > samples:
        raise UserError(
            f"--global-batch {probe.global_batch} is more than the {samples} samples to train on: take at most "
            f"{max(samples // world_size, 1) * world_size}; 256 suits some thousand samples"
        )
    return steps_per_epoch(samples, probe.global_batch)


def train_epoch(
    work: ProbeSetup, heads: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Batch], epoch: int
) -> list[float]:
    """One pass over the data; returns each head's mean loss."""
    sums = torch.zeros(len(optimizer.param_groups), device=work.dist.device)
    for step in range(epoch * work.steps, (epoch + 1) * work.steps):
        features, labels = next(batches)
        set_rates(optimizer, step, work.config.probe.epochs * work.steps)
        optimizer.zero_grad()
        losses = head_losses(heads(features), labels)
        losses.sum().backward()
        optimizer.step()
        sums += losses.detach()
    return (mean_over_ranks(work.dist, sums) / work.steps).tolist()


@contextmanager
def batches(work: ProbeSetup, first_epoch: int) -> Iterator[Iterator[Batch]]:
    """This rank's features and labels of every step from ``first_epoch`` on."""
    if work.config.features_cache:
        yield cached_batches(work, first_epoch)
        return
    recipe = replace(
        work.encoder.recipe, crop_scale=CROP_SCALE, jitter_prob=0.0, gray_prob=0.0, blur_prob=0.0, solarize_prob=0.0
    )
    probe, passes = work.config.probe, -(-work.rank_batch // IMAGES_PER_PASS)
    with open_crops(
        work.train.dataset,
        recipe,
        work.config.loader,
        BatchSampler(work.config.encoder.seed, probe.global_batch, probe.epochs, first_epoch, accumulate=passes),
        work.dist,
        ids=work.train.ids,
        dtype=work.source.dtype,
    ) as crops:

        def features() -> Iterator[Batch]:
            while True:
                parts = [frozen_pass(work, crop.views[0], crop.sources) for crop in islice(crops, passes)]
                if not parts:
                    return
                yield torch.cat([part for part, _ in parts]), torch.cat([labels for _, labels in parts])

        yield features()


@torch.no_grad()
def frozen_pass(work: ProbeSetup, x: Float[Tensor, "n c s s"], sources: Int64[np.ndarray, " n"]) -> Batch:
    """Features of some images, and the labels of those that are seen: a bad image stands with its substitute's."""
    with work.source.autocast():
        features = work.encoder.backbone(x)
    labels = work.train.dataset.labels(sources).astype(np.int64)
    return features.float(), on_device(labels, work.dist.device)


def cached_batches(work: ProbeSetup, first_epoch: int) -> Iterator[Batch]:
    """The same order of samples, their features made once from centre crops and held by every rank."""
    dist, probe = work.dist, work.config.probe
    mine, my_labels = labelled_features(work.encoder.backbone, work.train, work.source)
    counts = [len(part) for part in split_ids(work.train.ids, dist.world_size)]
    features = torch.cat([part.clone() for part in each_rank(dist, mine, counts)])
    labels = torch.cat([part.clone() for part in each_rank(dist, my_labels, counts)])
    for epoch in range(first_epoch, probe.epochs):
        for step in range(work.steps):
            positions = batch_positions(step, probe.global_batch, dist.rank, dist.world_size)
            rows = on_device(epoch_order(len(features), work.config.encoder.seed, epoch, positions), dist.device)
            yield features[rows], labels[rows]


if __name__ == "__main__":
    exit_on_user_error(main)
