"""Builds a run: checks everything that can be checked before the first step, then makes model and optimizer.

``prepare`` is called once by train/pretrain.py, and by tools/profile_throughput.py for the same run without a folder.
"""

from __future__ import annotations

import inspect
import os
import platform
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from model.backbone import find_backbone, has_imagenet_stem, take_channels
from model.methods.base import Method
from model.sync_batchnorm import prepare_batch_norm
from pipeline.backends.select import check_compiler, choose_backend
from pipeline.common.errors import UserError
from pipeline.common.system import share_of_cores
from pipeline.dataset.dataset import ShardSet
from pipeline.dataset.mixture import Dataset, Mixture
from pipeline.loader.loader import check_cache, open_data, order_of
from pipeline.sampling.views import IMAGENET_MEAN, IMAGENET_STD
from pipeline.sharding.index_cache import with_indexes
from train.config.run_config import PretrainConfig
from train.config.run_plan import RunPlan, make_plan
from train.distributed.collectives import Mark, on_all_ranks
from train.distributed.process_group import DistContext
from train.engine.run import Origins, Run
from train.engine.sample_memory import SampleMemory
from train.engine.step_graph import WARM_UP_STEPS, WARM_UP_STEPS_DDP, StepGraph
from train.evaluation.features import ImageSource
from train.evaluation.knn_monitor import open_knn
from train.evaluation.online_probe import open_probe
from train.optimization.optimizer import build_optimizer, rates_as_tensors
from train.optimization.precision import Precision, SkipNonFinite, choose_precision
from train.storage.checkpoints import CHECKPOINTS, CheckpointTimer, newest_checkpoint
from train.storage.encoder_files import initialise, read_weights

STEM_TOO_COARSE = 64  # px; up to here the ImageNet stem and its max-pool leave the last stage a map of at most 2 x 2


def prepare(config: PretrainConfig, dist: DistContext) -> Run:
    """Check everything, and build the run. Nothing is written.

    Each rank does its part alone; then one collective tells every rank of the first mistake on any, a dataset that is
    another one than on rank 0 included. Raises SharedError.
    """

    def same_dataset(run: Run) -> Mark:
        other = f"--data {run.dataset.path} is another dataset here than on rank 0: copy it to all machines anew"
        return Mark(run.dataset.fingerprint, other)

    if dist.device.type == "cuda":
        # Before the loader's kernels, whose stream has the lowest priority: batches are made ahead, steps are not.
        torch.cuda.set_stream(torch.cuda.Stream(dist.device, priority=-1))
    run = on_all_ranks(dist, lambda: _build(config, dist), same_dataset)
    run.parallel = _parallel(run.model, config, dist)
    return run


def _build(config: PretrainConfig, dist: DistContext) -> Run:
    """The part of one rank, without DDP. Raises UserError. Contains no collective."""
    precision = choose_precision(config.precision, dist.device)
    check_compiler(dist.device)
    config.trackers.check_installed()
    dist.status.work("opening the dataset")
    dataset = open_data(with_indexes(config.data, config.loader.cache), config.loader)
    config = with_pixels_of(dataset, config)
    backend, reason = choose_backend(config.loader.backend, dataset.channels)
    order_of(dataset, config.order, config.seed, config.global_batch)  # raises for one that the dataset cannot have
    check_cache(dataset, config.order, config.loader, config.global_batch, dist)
    plan = make_plan(config, dataset.epoch_samples, dist.world_size, memory_bytes(dist))
    dist.status.work("building the model")
    model, weights = build_model(config, dist)
    memory = None
    if model.memory_dim is not None:
        memory = SampleMemory(dataset.num_samples, model.memory_dim, config.model.memory_place, dist)
    lr, scaled = plan.schedule.peak_lr, precision.scaler.is_enabled()
    optimizer, implementation = build_optimizer(config.optim, model.parameter_groups(), lr, dist.device, scaled)
    graph, steps = step_graph(config, dist, model, optimizer, plan, precision)
    source = ImageSource(config.views, config.loader, dist, precision.autocast, precision.view_dtype)
    knn = open_knn(dataset, config.knn, source) if config.knn.every > 0 else {}
    width = find_backbone(config.model.backbone).features
    probe = open_probe(model.backbone, width, dataset, dist) if config.probe else None
    return Run(
        config=config,
        dist=dist,
        dataset=dataset,
        plan=plan,
        precision=precision,
        model=model,
        parallel=model,
        memory=memory,
        optimizer=optimizer,
        knn=knn,
        probe=probe,
        timer=CheckpointTimer(config.checkpoint_every),
        guard=SkipNonFinite(model, optimizer, dist.device),
        origins=Origins(
            weights.described,
            implementation,
            _loader(config, dist, f"{backend} ({reason})", plan.micro_batch),
            steps,
        ),
        init_weights=weights.identity,
        graph=graph,
    )


def with_pixels_of(dataset: Dataset, config: PretrainConfig) -> PretrainConfig:
    """The configuration with mean and std of a dataset of --channels, and without what is of colours.

    Raises UserError for a --mean of another number of channels.
    """
    views, channels = config.views, dataset.channels
    if channels == views.channels:
        return config
    if channels == 3 or (views.mean, views.std) != (IMAGENET_MEAN, IMAGENET_STD):
        raise UserError(
            f"--mean {' '.join(map(str, views.mean))}: the images of {dataset.path} have {channels} channels: give as "
            "many numbers, or leave --mean and --std out"
        )
    assert isinstance(dataset, ShardSet)
    pixels = dataset.info["pixels"]
    return replace(config, views=views.of_channels(tuple(pixels["mean"]), tuple(pixels["std"])))


def build_model(config: PretrainConfig, dist: DistContext) -> tuple[Method, StartWeights]:
    """The method on its device, the same on all ranks, and where its weights are from. Raises UserError."""
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = True
    model = config.model.build()
    if config.views.channels != 3:
        take_channels(model, config.views.channels, config.model.backbone)
        model.copy_student()
    weights = start_weights(config, model)
    _prepare_batch_norm(model, config, dist)
    return model.to(device=dist.device, memory_format=torch.channels_last), weights  # type: ignore[call-overload]


def _prepare_batch_norm(model: nn.Module, config: PretrainConfig, dist: DistContext) -> None:
    one_pass = config.one_pass == "on" or (config.one_pass == "auto" and dist.device.type == "cuda")
    try:
        prepare_batch_norm(model, over_ranks=_has_sync_bn(config, dist), one_pass=one_pass)
    except ValueError as error:
        raise UserError(f"--sync-bn, but in --backbone {config.model.backbone} {error}: take --no-sync-bn") from error


class StartWeights(NamedTuple):
    """Where the weights of a new model are from."""

    described: str  # for people
    identity: str | None = None  # of the file of --init; None without one, and in a resumed run


def start_weights(config: PretrainConfig, model: Method) -> StartWeights:
    """Put the weights of --init into a new model; returns where they are from. A resumed run brings its own."""
    if config.resume and newest_checkpoint(config.run_dir / CHECKPOINTS) is not None:
        return StartWeights("of the checkpoint")
    if config.init is None:
        return StartWeights(f"random, seed {config.seed}")
    name, stem = config.model.backbone, config.model.stem
    stem = find_backbone(name).default_stem if stem == "default" else stem
    weights = read_weights(config.init, name, stem)
    if weights.channels != config.views.channels:
        raise UserError(
            f"--init {config.init} takes images of {weights.channels} channels, and those of --data have "
            f"{config.views.channels}: leave --init out, or name an encoder of as many"
        )
    origin = initialise(model, weights)
    model.copy_student()
    return StartWeights(origin, weights.identity)


def _parallel(model: Method, config: PretrainConfig, dist: DistContext) -> nn.Module:
    parallel: nn.Module = model
    if dist.world_size > 1:
        # BN statistics differ between ranks only where BN is local; share_buffers evens them out before they are used.
        # torch 2.15 has a new name for the option.
        known = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {"gradient_as_bucket_view": True, name: False}
        parallel = DistributedDataParallel(model, **options)
    if not config.compile:
        return parallel
    dist.status.follow_compiler()
    return torch.compile(parallel, dynamic=False)  # type: ignore[return-value]


def step_graph(
    config: PretrainConfig,
    dist: DistContext,
    model: Method,
    optimizer: torch.optim.Optimizer,
    plan: RunPlan,
    precision: Precision,
) -> tuple[StepGraph | None, str | None]:
    """What replays the steps with --cuda-graph, and one line about it; None without it, or where it cannot work."""
    if not config.cuda_graph:
        return None, None
    obstacle = None
    if dist.device.type != "cuda":
        obstacle = "there is no GPU"
    elif not model.capturable:
        obstacle = f"--method {config.method} does not say that its steps can be captured (docs/adding-a-method.md)"
    elif model.memory_dim is not None:
        obstacle = "the host keeps a memory of the samples"
    elif config.probe:
        obstacle = "--probe takes the labels of each batch from the host"
    if obstacle is not None:
        return None, f"launched one kernel at a time: --cuda-graph, but {obstacle}"
    warm_up = WARM_UP_STEPS_DDP if dist.world_size > 1 else WARM_UP_STEPS
    outside = rates_as_tensors(optimizer, plan.schedule, dist.device, precision.scaler.is_enabled())
    line = f"a CUDA graph, captured after {warm_up} steps"
    rest = "" if outside is None else f"; the optimizer is outside of it, as {outside}"
    return StepGraph(warm_up, dist.device, with_optimizer=outside is None), line + rest


def memory_bytes(dist: DistContext) -> int:
    """Memory of the device that this rank computes on; of a CPU its share of the machine's."""
    if dist.device.type == "cuda":
        return torch.cuda.get_device_properties(dist.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // dist.local_world_size


def describe(run: Run) -> Iterator[str]:
    """The lines that a run prints before its first step."""
    config, side = run.config, run.config.views.image_size
    if side <= STEM_TOO_COARSE and has_imagenet_stem(run.model.backbone):
        hint = "--stem cifar (stride 1) or --stem small keeps more of the image"
        yield f"note: the ImageNet stem takes views of {side} px down to a quarter at once; {hint}"
    weights = sum(p.numel() for p in run.model.backbone.parameters()) / 1e6
    yield f"plan for {config.run_dir}\n{run.plan.describe()}"
    if isinstance(run.dataset, Mixture):
        yield from describe_mixture(run.dataset)
    yield f"  method       {config.method}{_coupling(run)}"
    yield f"  model        {config.model.backbone}, {weights:.1f} M weights, views of {side} px"
    if config.views.channels != 3:
        yield f"  pixels       {config.views.channels} channels: crops, flips and blur alone, no colour operations"
    yield f"  weights      {run.origins.weights}"
    yield f"  optimizer    {run.origins.optimizer}"
    yield f"  loader       {run.origins.loader}"
    yield f"  compute      {_machine(run.dist)}, {run.precision.name}, {_batch_norm(config, run.dist)}"
    if run.origins.steps is not None:
        yield f"  steps        {run.origins.steps}"
    for name, knn in run.knn.items():
        yield f"  kNN          {knn.describe()}{_of(name)}"
    if config.knn.every > 0 and not run.knn:
        yield "  kNN          none: the dataset has no labels"
    if run.probe is not None:
        yield "  probe        a linear classifier beside the method, on features of the first view"


def describe_mixture(mixture: Mixture) -> Iterator[str]:
    """A line for each dataset: its share of every batch, and its samples of an epoch."""
    for name, part, count in zip(mixture.names, mixture.parts, mixture.samples_per_epoch, strict=True):
        share = count / mixture.epoch_samples
        yield f"  data         {share:7.2%} {name}: {count:,} of an epoch, {part.num_samples:,} in all ({part.path})"


def _of(name: str) -> str:
    return f", of {name}" if name else ""


def _loader(config: PretrainConfig, dist: DistContext, backend: str, micro_batch: int) -> str:
    if dist.device.type != "cuda" or not backend.startswith("dali"):
        return backend
    threads = config.loader.threads or share_of_cores(dist.local_world_size)
    memory = config.loader.dali.describe_memory(micro_batch, threads)
    return backend if memory is None else f"{backend}; {memory}"


def _coupling(run: Run) -> str:
    if not run.model.batch_coupled or run.plan.accumulate == 1:
        return ""
    images = run.plan.micro_batch * run.plan.world_size
    return f", whose loss compares the {images:,} images of a pass: a resumed run keeps --accumulate"


def _machine(dist: DistContext) -> str:
    if dist.device.type == "cuda":
        return f"{dist.world_size} x {torch.cuda.get_device_name(dist.device)}"
    return f"{dist.world_size} x CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _has_sync_bn(config: PretrainConfig, dist: DistContext) -> bool:
    return config.sync_bn and not config.model.own_batch_norm and dist.world_size > 1


def _batch_norm(config: PretrainConfig, dist: DistContext) -> str:
    if config.model.own_batch_norm:
        return f"batch norm by the rule of {config.method}"
    if dist.world_size == 1:
        return "batch norm over the whole batch of a pass"
    if _has_sync_bn(config, dist):
        return "batch norm over all ranks (SyncBN)"
    return "batch norm within each rank (--no-sync-bn; accuracy may suffer)"
