"""The configuration of a run as the user states it: one frozen dataclass; each component receives its own part."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from model.methods.base import MethodConfig
from model.methods.registry import DEFAULT_METHOD, METHODS
from model.methods.simsiam import SimSiamConfig
from pipeline.common.errors import UserError, check_at_least_1, check_seed, require
from pipeline.common.flags import group
from pipeline.common.locations import InputPath, LocalPath, Url
from pipeline.common.mixed_data import MixedData, WeightedPlace, data_parts
from pipeline.loader.config import LoaderConfig
from pipeline.sampling.order import OrderConfig
from pipeline.sampling.views import ViewRecipe
from train.config.tracker_config import TrackerConfig
from train.distributed.watchdog import parse_hang_timeout
from train.evaluation.knn_monitor import KnnConfig
from train.optimization.optimizer import OptimConfig
from train.optimization.precision import PrecisionName
from train.storage.checkpoints import parse_interval

NO_SETTINGS = ("config", "print_config", "dry_run")  # fields that say what the command does, and are not recorded
if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]
# Those of train/config/recipes.py; the tests compare them
RecipeName = Literal[
    "imagenet-100ep", "imagenet-200ep", "cifar10-800ep", "demo", "imagenet-multicrop-100ep", "imagenet-multicrop-200ep"
]


@dataclass(frozen=True)
class PretrainConfig:
    """Self-supervised pretraining from a dataset that tools/make_shards.py wrote.

    The flags to know first: --data --run-dir --method --recipe --backbone --image-size --epochs --global-batch
    --base-lr --resume
    """

    # Dataset folder, or its URL (s3://, gs://, https://, hf://), whose shards are fetched ahead of use into
    # --cache-dir. Given several times, --data A --data B:0.3, an epoch takes each image of A once and 30 % of those of
    # B, other ones in the next epoch. wds:s3://BUCKET/{000..146}.tar, or wds:/data/*.tar, reads tars of others where
    # they lie, through an index that is made in --cache-dir first.
    data: MixedData
    # Folder for checkpoints, metrics and the plan, on a file system that all machines share.
    run_dir: LocalPath
    # Take settings from a file, YAML or JSON, as config.json of a run and --print-config have them; flags override.
    config: InputPath | None = None
    # Print the settings as YAML for --config, and do nothing else.
    print_config: bool = False
    # Check everything, print the plan and what it needs of disk, cache and memory, and train nothing.
    dry_run: bool = False
    # Self-supervised method; with --help its own flags are shown.
    method: MethodName = DEFAULT_METHOD
    # Take the defaults of a recipe of train/config/recipes.py; with --help its values are shown.
    recipe: RecipeName | None = None
    # Start from these weights: a checkpoint or run folder, an official SimSiam checkpoint, torchvision's or timm's
    # weights, .safetensors. Heads of the same shape are taken too.
    init: InputPath | None = None
    # Passes over the dataset [Chen & He 2020, section 4].
    epochs: int = 100
    # Source images of a step over all processes [section 3].
    global_batch: Annotated[int, tyro.conf.arg(aliases=["--batch-size"])] = 512
    # Forward passes of a step, each over global_batch / processes / accumulate images.
    accumulate: int = 1
    # Seed of weights, order and views.
    seed: int = 0
    # Device to train on; auto: the GPUs if there are any.
    device: Literal["auto", "cuda", "cpu"] = "auto"
    # Number format of the forward pass; auto: bf16 on a GPU (fp16 before Ampere), fp32 on a CPU.
    precision: PrecisionName = "auto"
    # Take batch statistics over all processes [section 3].
    sync_bn: bool = True
    # Encode all views of a pass at once, with batch statistics of each view by itself: fewer and larger kernels, half
    # the collectives of SyncBN, the same losses but for rounding. off: one view after the other, as the official code;
    # auto: on a GPU.
    one_pass: Literal["auto", "on", "off"] = "auto"
    # Compile the model with torch.compile; saves time in long runs on a GPU.
    compile: bool = False
    # Replay steps as a CUDA graph, a single launch for the host: for GPUs that wait for it (host_bound in
    # metrics.jsonl). What no graph can hold is launched as ever; a line before the first step says so.
    cuda_graph: bool = False
    # Go on from the newest checkpoint in --run-dir; from the start if there is none. Alone with --run-dir it takes the
    # run's configuration from config.json there; flags given as well must agree with it where they decide numbers.
    resume: bool = False
    # Stop after so many steps of the schedule that --epochs lays out; a resumed run goes on to the end without it.
    max_steps: int | None = None
    # Steps in a row with nan or inf gradients, all of them skipped, before the run stops.
    max_bad_steps: int = 20
    # Reaction when z_std, the effective rank of z or the kNN accuracy show that the encoder collapses: warn and go on,
    # or stop with exit code 2. Checked with every log line; a sign must last for three of them.
    on_collapse: Literal["warn", "stop"] = "warn"
    # Train a linear classifier beside the method, on detached features of its own passes, where the dataset has labels;
    # its accuracy is probe_top1 in metrics.jsonl.
    probe: bool = False
    # Interval between checkpoints: 1epoch, 500steps, or 10m (minutes).
    checkpoint_every: str = "1epoch"
    # Newest checkpoints that stay on disk.
    keep_checkpoints: int = 3
    # Time without progress on any process after which the run ends with exit code 70 and names the one that hangs: 90s,
    # 10m, 2h, or off. With a remote dataset at least 5 minutes more than --retry-minutes.
    hang_timeout: str = "10m"
    # Steps between lines of metrics.jsonl.
    log_every: int = 10
    # Write each process's sample ids of every step to run_dir/samples-rankR.jsonl.
    record_samples: bool = False
    # Nested fields are flags of their own name in a box of --help; --dali.* and the augmentations beyond the paper's
    # (--erasing.* and so on) keep a prefix.
    model: Annotated[MethodConfig, group("method")] = field(default_factory=SimSiamConfig)
    views: Annotated[ViewRecipe, group("views")] = field(default_factory=ViewRecipe)
    order: Annotated[OrderConfig, group("data")] = field(default_factory=OrderConfig)
    loader: Annotated[LoaderConfig, group("loader")] = field(default_factory=LoaderConfig)
    optim: Annotated[OptimConfig, group("optimizer")] = field(default_factory=OptimConfig)
    knn: Annotated[KnnConfig, group("evaluation")] = field(default_factory=KnnConfig)
    trackers: Annotated[TrackerConfig, group("trackers")] = field(default_factory=TrackerConfig)

    def __post_init__(self) -> None:
        if self.model.name != self.method:
            raise UserError(f"--method {self.method}, but the model is one of {self.model.name}: name that method")
        for name in ("epochs", "global_batch", "accumulate", "max_bad_steps", "keep_checkpoints", "log_every"):
            check_at_least_1(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.max_steps is not None:
            check_at_least_1("--max-steps", self.max_steps)
        check_seed(self.seed)
        parse_interval(self.checkpoint_every)
        parse_hang_timeout(self.hang_timeout)
        self.order.check(self.global_batch)
        warmup = self.optim.warmup_epochs
        rule = f"it must be at least 0 and below --epochs {self.epochs}"
        require("--warmup-epochs", warmup, warmup is None or warmup < self.epochs, rule)

    @property
    def longest_fetch_s(self) -> float:
        """How long a step may have to wait for images before their failure is reported."""
        remote = any(isinstance(part.place, Url) for part in data_parts(self.data))
        return 60.0 * (self.loader.cache.retry_minutes + 5) if remote else 0.0

    def as_json(self) -> dict[str, Any]:
        """The configuration for config.json, with complete paths, so that it holds in any folder."""
        values = asdict(self)
        for name in NO_SETTINGS:
            del values[name]
        return _plain(values)

    def identity(self, dataset_fingerprint: str, init_weights: str | None = None) -> dict[str, Any]:
        """What decides a run's numbers, as one flat dictionary; a checkpoint is resumed only where all of it is equal.

        The number of processes, the loader, the precision and the optimizer's implementation are free to change: they
        decide no batch and no draw, only how sums, and with --backend and some of --dali.* also pixels, are rounded.
        So is --accumulate, so that a run may go on on fewer GPUs; batch norm may then use other numbers of images,
        which a resumed run prints. Where the loss couples the images of a pass, --accumulate counts as well.

        ``init_weights``: identity of the weights of --init; None: their path, as the first checkpoints have it.
        """
        run = {"epochs": self.epochs, "global_batch": self.global_batch, "seed": self.seed, **self.order.identity()}
        fields = {f"views.{name}": value for name, value in self.views.identity().items()}
        if self.init is not None:
            fields["init"] = str(self.init) if init_weights is None else init_weights
        if self.model.batch_coupled and self.accumulate > 1:
            fields["accumulate"] = self.accumulate
        fields = {**fields, **self.model.identity(), **self.optim.identity()}
        weights = {"weights": [part.weight for part in self.data]} if isinstance(self.data, tuple) else {}
        return _plain({**run, **fields, "dataset": dataset_fingerprint, **weights})


def _plain(value: Any) -> Any:
    """``value`` as JSON gives it back, so that what was saved compares equal to what is now."""
    match value:
        case dict():
            return {key: _plain(entry) for key, entry in value.items()}
        case WeightedPlace(place, weight):
            return f"{_plain(place)}:{repr(weight).removesuffix('.0')}"
        case list() | tuple():
            return [_plain(entry) for entry in value]
        case Path():
            return str(value.absolute())
        case Url():
            return str(value)
        case _:
            return value
