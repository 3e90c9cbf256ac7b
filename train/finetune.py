"""Fine-tune a whole encoder with a classifier on top, on all labels or on a few.

    torchrun --standalone --nproc-per-node=8 train/finetune.py --data DIR --val-data DIR --checkpoint RUN --run-dir DIR
    python train/finetune.py --data DIR --val-data DIR --checkpoint RUN --run-dir DIR --fraction 0.1 --recipe swav-10
    python train/finetune.py ... --checkpoint untrained:resnet50                                   (from scratch)

Training sees a random crop and a flip of each image, validation the centre of the whole image. Samples without a label
are left out. A stopped run goes on with --resume from its newest checkpoint, in the middle of an epoch, on another
number of processes too. RUN_DIR/classifier is what tools/predict.py and timm load.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from model.sync_batchnorm import synchronise
from pipeline.backends.base import ViewBatch
from pipeline.common.buffers import on_device
from pipeline.common.errors import UserError, check_at_least_1, check_divisible, exit_on_user_error, require
from pipeline.common.files import disk_errors, write_json
from pipeline.common.flags import group, own_flags, usage
from pipeline.common.locations import DatasetPlace, LocalPath
from pipeline.common.locks import FolderLock
from pipeline.common.system import duration
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_crops
from pipeline.sampling.sampler import BatchSampler, steps_per_epoch
from pipeline.sharding.index_cache import make_indexes
from train.distributed.collectives import any_rank, mean_over_ranks, on_all_ranks, on_rank0, print0, sum_over_ranks
from train.distributed.process_group import DistContext, distributed, exit_once, found_by_every_rank, read_launch
from train.distributed.stop_signals import EXIT_PREEMPTED, StopRequest, stop_signals
from train.evaluation.classifier import Classifier, save_classifier
from train.evaluation.features import (
    EncoderConfig,
    FrozenEncoder,
    ImageSource,
    Samples,
    check_same_classes,
    labelled_features,
    open_frozen,
    open_indexed,
)
from train.evaluation.linear_probe import stratified
from train.optimization.optimizer import Schedule, lr_at
from train.optimization.precision import Precision, PrecisionName, choose_precision
from train.storage.checkpoints import (
    CHECKPOINTS,
    CheckpointTimer,
    check_same_run,
    find_checkpoint,
    load_checkpoint,
    parse_interval,
    save_checkpoint,
)
from train.storage.run_folder import METRICS_FILE, SUMMARY_FILE, append_lines, claim_run_dir, cut_off

CROP_SCALE = (0.08, 1.0)  # torchvision's RandomResizedCrop; SimCLR, BYOL and SwAV fine-tune with it
RecipeName = Literal["simclr-1", "simclr-10", "byol-1", "byol-10", "swav-1", "swav-10"]


@own_flags
@dataclass(frozen=True)
class TuneConfig:
    """How the network is trained."""

    epochs: int = 30
    """Passes over the training samples."""
    global_batch: int = 256
    """Images of a step over all processes."""
    lr: float = 0.01
    """Learning rate of the backbone's last stage at a global batch of 256; scaled linearly with the batch."""
    head_lr: float = 0.2
    """Learning rate of the classifier, likewise. SwAV's code for 10 % of the labels has 0.01 and 0.2."""
    layer_decay: float = 1.0
    """Factor on the rate for every stage further from the classifier; 1: one rate for the whole backbone."""
    decay_epochs: tuple[int, ...] = ()
    """Epochs after which the rates are multiplied by --decay-factor; none: half a cosine down to 0."""
    decay_factor: float = 0.2
    """Factor of --decay-epochs (SwAV: 12 16 and 0.2)."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: float = 0.0
    """Weight decay; SimCLR, BYOL and SwAV fine-tune without."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""
    mixup: float = 0.0
    """Strength alpha of mixup (Zhang et al. 2018); 0: off. Partners are images of the same process."""

    def __post_init__(self) -> None:
        check_at_least_1("--epochs", self.epochs)
        check_at_least_1("--global-batch", self.global_batch)
        for name in ("lr", "head_lr"):
            value = getattr(self, name)
            require(f"--{name.replace('_', '-')}", value, 0 <= value < float("inf"), "it must be at least 0 and finite")
        require("--layer-decay", self.layer_decay, 0 < self.layer_decay <= 1, "it must be above 0 and at most 1")
        require("--momentum", self.momentum, 0 <= self.momentum < 1, "it must be at least 0 and below 1")
        require("--weight-decay", self.weight_decay, 0 <= self.weight_decay < float("inf"), "at least 0 and finite")
        require("--label-smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        require("--mixup", self.mixup, 0 <= self.mixup < float("inf"), "it must be at least 0 and finite")
        require("--decay-factor", self.decay_factor, 0 < self.decay_factor <= 1, "above 0 and at most 1")

    def rate(self, step: int, total_steps: int, per_epoch: int) -> float:
        """The factor on all rates at step ``step`` (from 0), a pure function."""
        if self.decay_epochs:
            return self.decay_factor ** sum(step >= epoch * per_epoch for epoch in self.decay_epochs)
        return lr_at(Schedule(1.0, total_steps, warmup_steps=0, unit_steps=1), step)


# The semi-supervised tables' fine-tuning, for 1 % and 10 % of ImageNet's labels.
RECIPES: dict[RecipeName, TuneConfig] = {
    # Chen et al. 2020 (arXiv:2002.05709), appendix B.5: Nesterov 0.9, batch 4096, lr 0.05 x batch / 256 for all layers,
    # no weight decay, no warm-up; 60 epochs for 1 %, 30 for 10 %
    "simclr-1": TuneConfig(60, 4096, lr=0.05, head_lr=0.05),
    "simclr-10": TuneConfig(30, 4096, lr=0.05, head_lr=0.05),
    # Grill et al. 2020 (arXiv:2006.07733), appendix C.2: Nesterov 0.9, batch 1024, 30 or 50 epochs and lr out of 0.01,
    # 0.02, 0.05, 0.1, 0.005 by validation; here the middle ones
    "byol-1": TuneConfig(50, 1024, lr=0.02, head_lr=0.02),
    "byol-10": TuneConfig(30, 1024, lr=0.02, head_lr=0.02),
    # Caron et al. 2020 (arXiv:2006.09882), eval_semisup.py: 20 epochs, batch 256, steps at 12 and 16
    "swav-1": TuneConfig(20, 256, lr=0.02, head_lr=5.0, decay_epochs=(12, 16)),
    "swav-10": TuneConfig(20, 256, lr=0.01, head_lr=0.2, decay_epochs=(12, 16)),
}


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune an encoder with a classifier."""

    data: DatasetPlace
    """Dataset to train on; samples without a label are left out."""
    val_data: DatasetPlace
    """Labelled dataset to measure on, of the same classes (make_shards.py --hold-out makes one)."""
    run_dir: LocalPath
    """Folder for checkpoints, metrics.jsonl, summary.json and the classifier."""
    encoder: Annotated[EncoderConfig, group("encoder")]
    recipe: RecipeName | None = None
    """Take the defaults of a method's semi-supervised table; with --help it shows them."""
    fraction: float = 1.0
    """Share of each class's labels to use, as in 0.01 or 0.1; --seed draws other samples."""
    resume: bool = False
    """Go on from the newest checkpoint in --run-dir; from the start if there is none."""
    checkpoint_every: str = "1epoch"
    """How often to save: 1epoch, 500steps, or 10m (minutes)."""
    sync_bn: bool = True
    """Take batch statistics over all processes."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device that computes; auto: the GPUs if there are any."""
    precision: PrecisionName = "auto"
    """Number format; auto: bf16 on a GPU (fp16 before Ampere), fp32 on a CPU."""
    tune: Annotated[TuneConfig, group("training")] = field(default_factory=TuneConfig)
    loader: Annotated[LoaderConfig, group("loader")] = field(default_factory=LoaderConfig)

    def __post_init__(self) -> None:
        require("--fraction", self.fraction, 0 < self.fraction <= 1, "it must be above 0 and at most 1")
        parse_interval(self.checkpoint_every)


@dataclass
class Finetuning:
    """A run between two steps."""

    config: FinetuneConfig
    dist: DistContext
    encoder: FrozenEncoder
    precision: Precision
    train: Samples
    val: Samples
    per_epoch: int
    model: Classifier
    parallel: nn.Module
    optimizer: torch.optim.SGD
    step: int = 0
    top1: float | None = None
    lock: FolderLock | None = None  # of the run folder, on rank 0

    @property
    def total_steps(self) -> int:
        return self.config.tune.epochs * self.per_epoch

    def identity(self) -> dict[str, Any]:
        """What decides the numbers; a run goes on only where all of it is equal."""
        datasets = {"data": self.train.dataset.fingerprint, "val_data": self.val.dataset.fingerprint}
        more = {"fraction": self.config.fraction, "seed": self.config.encoder.seed}
        size = {"image_size": self.encoder.recipe.image_size, "encoder": self.encoder.weights.identity}
        tune = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.config.tune).items()}
        return {**tune, **datasets, **more, **size}


def main() -> None:
    """Parse the command line and train."""
    launch = read_launch()
    with exit_once(), found_by_every_rank(launch):
        config = parse_config(prints=launch.is_main)
    make_indexes(config.loader.cache, config.data, config.val_data)
    with exit_once(), stop_signals() as stop, distributed(config.device, launch=launch) as dist:
        finished = finetune(config, dist, stop)
    if not finished:
        sys.exit(EXIT_PREEMPTED)


def parse_config(arguments: list[str] | None = None, prints: bool = True) -> FinetuneConfig:
    """Read the command line; a recipe takes the place of the defaults."""
    words = sys.argv[1:] if arguments is None else arguments
    pairs = [(*word.partition("=")[::2], following) for word, following in zip(words, [*words[1:], ""], strict=True)]
    named: list[Any] = [value or following for flag, value, following in pairs if flag == "--recipe"]
    kind: type[FinetuneConfig] = FinetuneConfig
    if named and named[-1] in RECIPES:
        tune = field(default_factory=lambda: RECIPES[named[-1]])
        fields = [("recipe", RecipeName, named[-1]), ("tune", Annotated[TuneConfig, group("training")], tune)]
        kind = make_dataclass("FinetuneConfig", fields, bases=(FinetuneConfig,), frozen=True)
    return tyro.cli(
        kind,
        args=words,
        prog=usage("--data DIR --val-data DIR --run-dir DIR --checkpoint FILE"),
        console_outputs=prints,
    )


def finetune(config: FinetuneConfig, dist: DistContext, stop: StopRequest) -> bool:
    """Train to the end, or until a signal: then False. Raises SharedError for mistakes. A collective."""
    timer = CheckpointTimer(config.checkpoint_every)
    run = prepare(config, dist)
    with ExitStack() as held:
        on_rank0(dist, lambda: open_folder(run, held))
        return _train(run, timer, stop)


def _train(run: Finetuning, timer: CheckpointTimer, stop: StopRequest) -> bool:
    config, dist = run.config, run.dist
    if config.resume:
        load_newest(run)
    stop.starting = False
    start_s, first = time.perf_counter(), run.step
    with open_batches(run) as batches:
        while run.step < run.total_steps:
            loss = train_step(run, next(batches))
            run.step += 1
            epoch, rest = divmod(run.step, run.per_epoch)
            if rest == 0:
                run.top1 = validate(run)
                left_s = (time.perf_counter() - start_s) / (run.step - first) * (run.total_steps - run.step)
                end_epoch(run, epoch, float(mean_over_ranks(dist, loss[None])[0]), left_s)
            stopping, minutes_over = any_rank(dist, bool(stop), timer.minutes_over())
            if stopping or minutes_over or timer.is_due_at(run.step, run.per_epoch):
                save(run)
                timer.saved(run.step)
            if stopping and run.step < run.total_steps:
                by = stop.signal_name or "a signal"
                print0(dist, f"stopped by {by} after step {run.step:,}; go on with --resume")
                return False
    save(run)
    on_rank0(dist, lambda: finish(run))
    return True


def prepare(config: FinetuneConfig, dist: DistContext) -> Finetuning:
    """Check what can be checked, build the model, print the plan. A collective."""
    encoder, precision, train, val, per_epoch = on_all_ranks(dist, lambda: _open(config, dist))
    model = Classifier(encoder.backbone.requires_grad_(True), encoder.width, len(train.dataset.classes), 0)
    model = model.to(dist.device)
    if config.sync_bn and dist.world_size > 1:
        synchronise(model)
    parallel: nn.Module = DistributedDataParallel(model) if dist.world_size > 1 else model
    optimizer = torch.optim.SGD(
        layer_groups(model, config.tune),
        momentum=config.tune.momentum,
        weight_decay=config.tune.weight_decay,
        nesterov=config.tune.momentum > 0,
    )
    side = encoder.recipe.image_size
    print0(dist, f"encoder      {encoder.weights.describe()}, images of {side} px, {precision.name}")
    print0(dist, f"training     {len(train.ids):,} labelled samples of {len(train.dataset.classes):,} classes")
    print0(dist, f"validation   {len(val.ids):,} samples")
    tune = config.tune
    print0(
        dist,
        f"steps        {tune.epochs * per_epoch:,} = {tune.epochs} epochs x {per_epoch:,} of {tune.global_batch:,}",
    )
    return Finetuning(config, dist, encoder, precision, train, val, per_epoch, model, parallel, optimizer)


def _open(config: FinetuneConfig, dist: DistContext) -> tuple[FrozenEncoder, Precision, Samples, Samples, int]:
    encoder = open_frozen(config.encoder, dist.device)
    train = _labelled(open_indexed(config.data, config.loader), "--data")
    val = _labelled(open_indexed(config.val_data, config.loader), "--val-data")
    check_same_classes("--val-data", val.dataset, train.dataset)
    if config.fraction != 1:
        labels, classes = train.dataset.labels(train.ids), train.dataset.classes
        chosen = stratified(labels, config.fraction, classes, config.encoder.seed)
        train = Samples(train.dataset, train.ids[chosen])
    batch = config.tune.global_batch
    check_divisible(batch, dist.world_size, f"{dist.world_size} processes")
    if batch > len(train.ids):
        fits = max(len(train.ids) // dist.world_size, 1) * dist.world_size
        raise UserError(
            f"--global-batch {batch} is more than the {len(train.ids)} labelled samples: take at most {fits}"
        )
    precision = choose_precision(config.precision, dist.device)
    return encoder, precision, train, val, steps_per_epoch(len(train.ids), batch)


def _labelled(dataset: ShardSet, flag: str) -> Samples:
    ids = np.flatnonzero(dataset.labels(np.arange(dataset.num_samples)) >= 0)
    if not len(ids) or not dataset.classes:
        raise UserError(f"{flag} {dataset.path} has no labels: shard it from class folders, or with --labels FILE")
    return Samples(dataset, ids)


def layer_groups(model: Classifier, tune: TuneConfig) -> list[dict[str, Any]]:
    """Parameter groups, each with its peak rate: the head, then the backbone's stages from the last to the first."""
    scale = tune.global_batch / 256
    stages: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.backbone.named_parameters():
        stages.setdefault(name.split(".")[0], []).append(parameter)
    groups: list[dict[str, Any]] = [{"params": list(model.head.parameters()), "lr": 0.0, "peak": tune.head_lr * scale}]
    for depth, parameters in enumerate(reversed(stages.values())):
        groups.append({"params": parameters, "lr": 0.0, "peak": tune.lr * scale * tune.layer_decay**depth})
    return groups


def open_batches(run: Finetuning) -> Any:
    """A context with this rank's batches of every step from ``run.step`` on."""
    recipe = replace(
        run.encoder.recipe, crop_scale=CROP_SCALE, jitter_prob=0.0, gray_prob=0.0, blur_prob=0.0, solarize_prob=0.0
    )
    epoch, step = divmod(run.step, run.per_epoch)
    config = run.config
    sampler = BatchSampler(config.encoder.seed, config.tune.global_batch, config.tune.epochs, epoch, step)
    return open_crops(
        run.train.dataset, recipe, config.loader, sampler, run.dist, ids=run.train.ids, dtype=run.precision.view_dtype
    )


def train_step(run: Finetuning, batch: ViewBatch) -> Tensor:
    """One optimizer step; returns the loss. A replaced image counts with the label of its replacement."""
    tune, scaler = run.config.tune, run.precision.scaler
    run.model.train()
    factor = tune.rate(run.step, run.total_steps, run.per_epoch)
    for params in run.optimizer.param_groups:
        params["lr"] = params["peak"] * factor
    labels = on_device(run.train.dataset.labels(batch.sources).astype(np.int64), run.dist.device)
    x, share = mixed(batch.views[0], tune.mixup, run.config.encoder.seed, run.step)
    run.optimizer.zero_grad()
    with run.precision.autocast():
        logits = run.parallel(x)
    loss = share * F.cross_entropy(logits, labels, label_smoothing=tune.label_smoothing)
    if share < 1:
        loss = loss + (1 - share) * F.cross_entropy(logits, labels.flip(0), label_smoothing=tune.label_smoothing)
    scaler.scale(loss).backward()
    scaler.step(run.optimizer)
    scaler.update()
    return loss.detach()


def mixed(x: Float[Tensor, "n c s s"], alpha: float, seed: int, step: int) -> tuple[Float[Tensor, "n c s s"], float]:
    """Images mixed with those in reverse order, and the share of the first; a pure function of seed and step."""
    if alpha == 0:
        return x, 1.0
    share = float(np.random.default_rng((seed, step)).beta(alpha, alpha))
    return share * x + (1 - share) * x.flip(0), share


def validate(run: Finetuning) -> float:
    """Top-1 accuracy in percent, every image exactly once over all ranks. A collective."""
    source = ImageSource(
        run.encoder.recipe, run.config.loader, run.dist, run.precision.autocast, run.precision.view_dtype
    )
    logits, labels = labelled_features(run.model, run.val, source)
    right = (logits.argmax(dim=1) == labels).sum() if len(logits) else torch.zeros((), device=run.dist.device)
    return 100 * float(sum_over_ranks(run.dist, right.float()[None])[0]) / len(run.val.ids)


def open_folder(run: Finetuning, held: ExitStack) -> None:
    """Claim the run folder, on rank 0. Raises UserError if it holds a run and --resume is not given."""
    folder = run.config.run_dir
    run.lock = claim_run_dir(folder, held)
    if (folder / METRICS_FILE).exists() and not run.config.resume:
        raise UserError(f"--run-dir {folder} already holds a run: add --resume to go on with it, or name another")
    if not run.config.resume:
        append_lines(folder / METRICS_FILE, [])


def load_newest(run: Finetuning) -> None:
    """Go on from the newest intact checkpoint, if there is one. Raises SharedError if it is another run's."""
    folder = run.config.run_dir
    found = on_rank0(run.dist, lambda: find_checkpoint(folder / CHECKPOINTS))
    if found.path is None:
        print0(run.dist, f"--resume: no checkpoint in {folder}; starting at step 0")
    else:
        path = found.path
        on_all_ranks(run.dist, lambda: _load(run, path))
        print0(run.dist, f"--resume: going on after step {run.step:,} of {run.total_steps:,} ({path.name})")
    on_rank0(run.dist, lambda: cut_off(folder / METRICS_FILE, run.step))


def _load(run: Finetuning, path: Path) -> None:
    state = load_checkpoint(path)
    if "classifier" not in state:
        raise UserError(f"{path} is no checkpoint of fine-tuning: name another --run-dir")
    check_same_run(state["identity"], run.identity(), path)
    run.model.load_state_dict(state["classifier"])
    run.optimizer.load_state_dict({**run.optimizer.state_dict(), "state": state["optimizer"]})
    if run.precision.scaler.is_enabled() and state["scaler"]:
        run.precision.scaler.load_state_dict(state["scaler"])
    run.step, run.top1 = state["step"], state["top1"]


def save(run: Finetuning) -> None:
    """Write a checkpoint. SharedError for a full disk. A collective."""
    state = {
        "step": run.step,
        "classifier": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict()["state"],
        "scaler": run.precision.scaler.state_dict(),
        "identity": run.identity(),
        "top1": run.top1,
    }

    def write() -> None:
        assert run.lock is not None
        run.lock.check()
        save_checkpoint(run.config.run_dir / CHECKPOINTS, state, run.step, keep=2)

    on_rank0(run.dist, write)


def end_epoch(run: Finetuning, epoch: int, loss: float, left_s: float) -> None:
    """Print the accuracy and append it to metrics.jsonl, with the last step's loss. A collective."""
    metrics, top1 = run.config.run_dir / METRICS_FILE, run.top1
    line = {"epoch": epoch, "step": run.step, "loss": loss, "val_top1": top1, "time": time.time()}
    on_rank0(run.dist, lambda: append_lines(metrics, [line]))
    epochs = f"{epoch}/{run.config.tune.epochs}"
    print0(run.dist, f"epoch {epochs}: loss {loss:.4f}, top-1 {top1:.2f} %; left {duration(left_s)}")


def finish(run: Finetuning) -> None:
    """Write the classifier and summary.json."""
    folder, weights = run.config.run_dir, run.encoder.weights
    classes = run.train.dataset.classes
    target = folder / "classifier"
    by_timm = save_classifier(target, run.model, weights.backbone, weights.stem, run.encoder.pixels, classes)
    summary = {"finished": True, "epochs": run.config.tune.epochs, "val_top1": run.top1}
    with disk_errors(f"writing {folder}"):
        about = {"train_samples": len(run.train.ids), "checkpoint": weights.source}
        write_json(folder / SUMMARY_FILE, {**summary, **about})
    print(f"{target}: python tools/predict.py {folder} FILES")
    if by_timm:
        print(f'in Python: timm.create_model("local-dir:{target}", pretrained=True)')


if __name__ == "__main__":
    exit_on_user_error(main)
