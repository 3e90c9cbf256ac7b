"""Owns how a run is built: everything checked that can be checked before the first step, the model, the plan told."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.backbone import BACKBONES, has_imagenet_stem
from model.methods.simsiam import SimSiam
from model.sync_batchnorm import synchronise
from pipeline.backends.select import choose_backend
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.loader import check_cache, open_dataset
from train.config.loader_tuning import check_ranks
from train.config.run_config import PretrainConfig
from train.config.run_plan import make_plan
from train.distributed.collectives import on_all_ranks, on_rank0, print0
from train.distributed.process_group import DistContext
from train.engine.run import Run
from train.engine.sample_memory import make_targets
from train.optimization.optimizer import build_optimizer
from train.optimization.precision import SkipNonFinite, choose_precision
from train.storage.checkpoints import CHECKPOINTS, CheckpointTimer, newest_checkpoint
from train.storage.encoder_files import initialise, read_weights

STEM_TOO_COARSE = 64  # px; up to here the ImageNet stem and its max-pool leave the last stage a map of at most 2 x 2


def prepare(config: PretrainConfig, dist: DistContext, announce: Callable[[DistContext, str], None] = print0) -> Run:
    """Check everything that can be checked before the first step, build the model, print the plan.

    ``announce`` hears the plan's lines. Raises SharedError for a user's mistake on any rank. A collective.
    """
    timer = on_all_ranks(dist, lambda: CheckpointTimer(config.checkpoint_every))
    precision = on_all_ranks(dist, lambda: choose_precision(config.precision, dist.device))
    on_all_ranks(dist, lambda: check_ranks(config.loader_tuning, dist.local_world_size))
    dataset = open_same_dataset(config, dist)
    plan = on_all_ranks(dist, lambda: make_plan(config, dataset.num_samples, dist.world_size))
    backend, reason = on_all_ranks(dist, lambda: choose_backend(config.loader.backend))
    model, weights_from = build_model(config, dist)
    targets = make_targets(model, plan.steps_per_epoch, dataset.num_samples, dist)
    lr, scaled = plan.schedule.peak_lr, precision.scaler.is_enabled()
    optimizer, implementation = on_all_ranks(
        dist, lambda: build_optimizer(config.optim, model.parameter_groups(), lr, dist.device, scaled)
    )
    parallel, guard = _parallel(model, config, dist), SkipNonFinite(model, optimizer, dist.device)
    run = Run(config, dist, dataset, plan, precision, model, parallel, targets, optimizer, timer, guard)
    for line in _description(run, weights_from, implementation, f"{backend} ({reason})"):
        announce(dist, line)
    return run


def open_same_dataset(config: PretrainConfig, dist: DistContext) -> ShardSet:
    """The dataset of --data, the same on all ranks. Raises SharedError. A collective."""
    dataset = on_all_ranks(dist, lambda: open_dataset(config.data, config.loader))
    on_all_ranks(dist, lambda: check_cache(dataset, config.order, config.loader, config.global_batch, dist))
    of_main = on_rank0(dist, lambda: dataset.fingerprint)
    on_all_ranks(dist, lambda: check_same_dataset(dataset, of_main))
    return dataset


def check_same_dataset(dataset: ShardSet, of_main: str) -> None:
    """Raise UserError unless this process sees the dataset that rank 0 does: machines may hold copies of their own."""
    if dataset.fingerprint != of_main:
        raise UserError(f"--data {dataset.path} is another dataset here than on rank 0: copy it to all machines anew")


def build_model(config: PretrainConfig, dist: DistContext) -> tuple[SimSiam, str]:
    """The model on its device, the same on all ranks, and where its weights are from. Raises SharedError."""
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True
    model = SimSiam(config.model)
    weights_from = on_all_ranks(dist, lambda: start_weights(config, model))
    if _has_sync_bn(config, dist):
        synchronise(model)
    return model.to(device=dist.device, memory_format=torch.channels_last), weights_from  # type: ignore[call-overload]


def start_weights(config: PretrainConfig, model: SimSiam) -> str:
    """Put the weights of --init into a new model; returns where they are from. A resumed run brings its own."""
    if config.init is None:
        return f"random, seed {config.seed}"
    if config.resume and newest_checkpoint(config.run_dir / CHECKPOINTS) is not None:
        return "of the checkpoint"
    name, stem = config.model.backbone, config.model.stem
    stem = BACKBONES[name].default_stem if stem == "default" else stem
    return initialise(model, read_weights(config.init, name, stem))


def _parallel(model: SimSiam, config: PretrainConfig, dist: DistContext) -> nn.Module:
    parallel: nn.Module = model
    if dist.world_size > 1:
        # BN statistics differ between ranks only where BN is local; share_buffers evens them out before they are used.
        # torch 2.15 has a new name for the option.
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {"gradient_as_bucket_view": True, name: False}
        parallel = DistributedDataParallel(model, **options)
    return torch.compile(parallel) if config.compile else parallel  # type: ignore[return-value]


def _description(run: Run, weights_from: str, optimizer: str, loader: str) -> Iterator[str]:
    config, side = run.config, run.config.views.image_size
    if side <= STEM_TOO_COARSE and has_imagenet_stem(run.model.backbone):
        hint = "--stem cifar (stride 1) or --stem small keeps more of the image"
        yield f"note: the ImageNet stem takes views of {side} px down to a quarter at once; {hint}"
    weights = sum(p.numel() for p in run.model.backbone.parameters()) / 1e6
    yield f"plan for {config.run_dir}\n{run.plan.describe()}"
    yield f"  model        {config.model.backbone}, {weights:.1f} M weights, views of {side} px"
    yield f"  weights      {weights_from}"
    yield f"  optimizer    {optimizer}"
    yield f"  loader       {loader}"
    yield f"  compute      {_machine(run.dist)}, {run.precision.name}, {_batch_norm(config, run.dist)}"


def _machine(dist: DistContext) -> str:
    if dist.device.type == "cuda":
        return f"{dist.world_size} x {torch.cuda.get_device_name(dist.device)}"
    return f"{dist.world_size} x CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _has_sync_bn(config: PretrainConfig, dist: DistContext) -> bool:
    return config.sync_bn and dist.world_size > 1


def _batch_norm(config: PretrainConfig, dist: DistContext) -> str:
    if dist.world_size == 1:
        return "batch norm over the whole batch of a pass"
    if _has_sync_bn(config, dist):
        return "batch norm over all ranks (SyncBN)"
    return "batch norm within each rank (--no-sync-bn; accuracy may suffer)"
