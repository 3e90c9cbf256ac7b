"""The seam between the training loop and a method: what a method is, what it is given and what it returns.

A method is an nn.Module whose forward pass takes all views of a pass and returns the loss. All that it keeps between
steps is parameters and buffers, so that checkpoints, resuming, DDP and export need no code of its own. One file of this
folder holds a method's configuration and module; docs/adding-a-method.md walks through one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from model.backbone import Stem, check_backbone, check_view_sides
from model.embedding_stats import wide, z_std
from model.sync_batchnorm import encode as encode  # methods take it from here, beside encode_jointly
from pipeline.common.errors import UserError, check_at_least_1, require
from pipeline.common.flags import own_flags
from pipeline.sampling.views import ViewGroup, ViewRecipe

MOST_LAYERS = 100  # of a head; more is a slip of the finger, and takes for ever to build


class StepInfo(NamedTuple):
    """Where a pass stands in its run. The same in all passes of a step, but for the samples."""

    step: int | Int64[Tensor, ""]  # optimizer steps done, from 0; in a CUDA graph a tensor on the device, see Method
    total_steps: int  # of the whole schedule, also where --max-steps ends earlier
    steps_per_epoch: int
    global_batch: int  # source images of a step, over all ranks
    rank: int = 0
    ids: Int64[Tensor, " n"] | None = None  # the samples of this pass
    memory: Float[Tensor, "n d"] | None = None  # their rows of the sample memory, for a method with a memory_dim


class MethodOutput(NamedTuple):
    """What a pass gives."""

    loss: Float[Tensor, ""]  # float32; the mean over ranks and passes is the step's loss
    embedding: Float[Tensor, "n d"]  # of one view, detached: what the collapse guard looks at
    metrics: dict[str, Tensor]  # scalars on the device, for metrics.jsonl; always with z_std
    memory: Float[Tensor, "n d"] | None = None  # the new rows of the sample memory


@dataclass(frozen=True)
class BatchShape:
    """How a run divides its batches."""

    global_batch: int  # source images of a step over all ranks
    micro_batch: int  # of them in one pass on one rank
    world_size: int
    sync_bn: bool = True  # whether batch statistics are taken over all ranks
    memory_bytes: int | None = None  # of the device that a rank computes on; None: unknown

    @property
    def pass_batch(self) -> int:
        """Source images of one pass over all ranks."""
        return self.micro_batch * self.world_size

    @property
    def parts(self) -> str:
        """How many passes share a step's images, for messages."""
        passes = self.global_batch // self.pass_batch
        return f"{self.world_size} ranks" + (f" x --accumulate {passes}" if passes > 1 else "")

    def check_memory(self, flag: str, value: int, numbers: int) -> None:
        """Raise UserError if ``value`` of ``flag`` needs ``numbers`` float32 numbers, and the device has no room."""
        if self.memory_bytes is not None and 4 * numbers > self.memory_bytes:
            raise UserError(
                f"{flag} {value} takes at least {4 * numbers / 2**30:.1f} GiB, and a process has "
                f"{self.memory_bytes / 2**30:.1f} GiB: take at most {int(value * self.memory_bytes / (4 * numbers))}"
            )


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that the optimizer treats alike."""

    name: str
    params: list[nn.Parameter]
    constant_lr: bool = False  # the rate stays at its peak
    lr_scale: float = 1.0  # times the run's rate
    decay: bool = True  # with weight decay
    adapt: bool = True  # LARS scales the rate by the trust ratio


@dataclass(frozen=True)
class CollapseProfile:
    """What a collapse of this method looks like, for the guard."""

    dim: int  # width of the embedding
    # The least that z_std x sqrt(dim) can be of so many samples, which batch norm at the output may raise above 0
    floor: Callable[[int], float] = lambda rows: 0.0
    causes: tuple[str, ...] = ()  # switches of this run that are known to collapse it
    stuck_loss: float | None = None  # the loss of an encoder that tells no two samples apart
    stuck_name: str = ""  # how that number comes about: "ln(queue + 1)"


@own_flags
@dataclass(frozen=True)
class MethodConfig:
    """What all methods have: a backbone. A method's own fields follow in its subclass."""

    name: ClassVar[str]  # of --method
    # Apply batch norm by the method's own rule, which --sync-bn would break
    own_batch_norm: ClassVar[bool] = False
    most_views: ClassVar[int | None] = 2  # of an image; None: any number from 2 up
    batch_coupled: ClassVar[bool] = False  # the loss of a sample depends on which others are in the pass

    # Backbone [Chen & He 2020, section 3, "Baseline settings"]: resnet18, resnet34, resnet50, resnet101, resnet152,
    # resnext50_32x4d, resnext101_32x8d, wide_resnet50_2, wide_resnet101_2, resnet_tiny (for 32 px on a CPU),
    # convnext_tiny, vit_small_patch16_224; or timm:NAME or torchvision:NAME, at random, or MODULE:FUNCTION of yours.
    backbone: str = "resnet50"
    # First layers: "cifar" for images of 32 px (Chen & He 2020, appendix D); default: the backbone's own
    stem: Stem = "default"

    def __init_subclass__(cls) -> None:
        own_flags(cls)

    def __post_init__(self) -> None:
        """Raise UserError for a model that cannot be built; subclasses add their own rules."""
        check_backbone(self.backbone, self.stem)

    def build(self) -> Method:
        """The method, with weights from torch's global generator."""
        raise NotImplementedError

    @property
    def passes_per_batch(self) -> int:
        """How many times in a row a step sees each sample, each time in other views."""
        return 1

    @property
    def memory_place(self) -> Literal["ram", "disk"]:
        """Where each process keeps the sample memory, for methods with a memory_dim."""
        return "ram"

    def identity(self) -> dict[str, Any]:
        """What decides the run's numbers, flat: resuming compares it."""
        return {"method": self.name, **{f"model.{name}": value for name, value in asdict(self).items()}}

    @classmethod
    def default_views(cls) -> ViewRecipe:
        """The views of the method's paper."""
        return ViewRecipe()

    def check(self, batch: BatchShape, views: ViewRecipe) -> None:
        """Raise UserError for a run whose batches or views the method cannot take; subclasses add their own rules."""
        count = len(views.per_view)
        rule = f"--method {self.name} takes " + ("2 views or more" if self.most_views is None else "exactly 2 views")
        remedy = f"{rule} of each image: change --views or --more-views"
        require("views of each image:", count, count >= 2 and count <= (self.most_views or count), remedy)
        check_view_sides(self.backbone, [view.image_size for view in views.per_view])


class Method(nn.Module):
    """A self-supervised method. Checkpoints, kNN, linear evaluation and export know ``backbone`` by this name alone."""

    config: MethodConfig
    backbone: nn.Module
    memory_dim: int | None = None  # width of the sample memory that it needs, if any
    # Whether a CUDA graph can hold a step (--cuda-graph). Python then runs only when the step is captured, so forward,
    # before_optimizer and after_step must neither wait for the device nor use numbers that change from step to step,
    # but for ``info.step``, which is a tensor there. before_step runs in every step.
    capturable: bool = False

    @property
    def batch_coupled(self) -> bool:
        """Whether the loss of a sample depends on which others are in the pass."""
        return self.config.batch_coupled

    def forward(self, views: list[Tensor], info: StepInfo) -> MethodOutput:
        """The loss of one pass. ``views``: float images ``[n, 3, h, w]``, each view of the same n samples."""
        raise NotImplementedError

    def parameter_groups(self) -> list[ParamGroup]:
        """All trained parameters, each in one group."""
        return [ParamGroup("all", trained(self))]

    def copy_student(self) -> None:
        """Let a teacher start as the student, whose weights --init has replaced."""

    def before_step(self, info: StepInfo) -> None:
        """Called before a step's first pass."""

    def before_optimizer(self, info: StepInfo) -> None:
        """Called when a step's gradients are complete, before the optimizer uses them."""

    def after_step(self, info: StepInfo, applied: Shaped[Tensor, ""]) -> None:
        """Called after the optimizer's step. ``applied`` is 0 if it was skipped: change nothing then."""

    def phase(self, info: StepInfo) -> Hashable:
        """What decides which work a step does: where it changes, the step is captured anew."""
        return None

    def schedules(self, info: StepInfo) -> dict[str, float | int]:
        """Numbers of a step that follow from the configuration (teacher momentum, queue age), for metrics.jsonl."""
        return {}

    def collapse(self, batch: BatchShape) -> CollapseProfile:
        """What the guard should look for."""
        raise NotImplementedError


def unlike_views(crop_scale: tuple[float, float]) -> ViewRecipe:
    """BYOL's and DINO's two views: one is always blurred, the other rarely, but solarized at times."""
    options: dict[str, Any] = {"interpolation": "bicubic", "saturation": 0.2, "blur_prob": 1.0}
    second = ViewGroup(blur_prob=0.1, solarize_prob=0.2)
    return ViewRecipe(count=1, crop_scale=crop_scale, **options, more_views=(second,))


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters with a gradient, in the order of the module."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def weights_apart(module: nn.Module, name: str = "all", lr_scale: float = 1.0) -> list[ParamGroup]:
    """Two groups: weights; and biases with the parameters of norms, neither decayed nor adapted by LARS."""
    parameters = trained(module)
    weights, rest = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
    groups = [
        ParamGroup(f"{name}: weights", weights, lr_scale=lr_scale),
        ParamGroup(f"{name}: biases and norms", rest, lr_scale=lr_scale, decay=False, adapt=False),
    ]
    return [group for group in groups if group.params]


def check_counts(config: MethodConfig, *names: str) -> None:
    """Raise UserError unless each of these fields is at least 1, and a size that torch knows, or few layers."""
    for name in names:
        flag, number = f"--{name.replace('_', '-')}", getattr(config, name)
        check_at_least_1(flag, number)
        if name.endswith("_layers"):
            require(flag, number, number <= MOST_LAYERS, f"it must be at most {MOST_LAYERS}")
        require(flag, number, number < 1 << 31, "it must be below 2**31")


def check_momentum(flag: str, momentum: float) -> None:
    """Raise UserError for a momentum that is none."""
    require(flag, momentum, 0 <= momentum <= 1, "it must lie in 0 (a copy of the student) .. 1 (never moves)")


def check_temperature(flag: str, temperature: float) -> None:
    """Raise UserError for a temperature that no softmax can take."""
    require(flag, temperature, 0 < temperature < math.inf, "it must be above 0 and finite")


def encode_jointly(module: nn.Module, views: list[Tensor]) -> list[Tensor]:
    """As ``encode``, but views of one size in a row share a pass and batch statistics (SimCLR, SwAV)."""
    embeddings: list[Tensor] = []
    start = 0
    for end in range(1, len(views) + 1):
        if end == len(views) or views[end].shape != views[start].shape:
            embeddings += module(torch.cat(views[start:end])).chunk(end - start)
            start = end
    return embeddings


@torch.no_grad()
def distribution_entropy(logits: Float[Tensor, "n k"]) -> Float[Tensor, ""]:
    """Entropy of the mean of the rows' softmax: ln k where all k prototypes are used alike, 0 where one is."""
    mean = F.softmax(wide(logits), dim=1).mean(dim=0)
    return -torch.special.xlogy(mean, mean).sum()


def mean_z_std(embeddings: list[Float[Tensor, "n d"]]) -> Float[Tensor, ""]:
    """z_std, as the mean over views."""
    return torch.stack([z_std(z) for z in embeddings]).mean()
