"""DINO: the student matches a momentum teacher's distribution over prototypes. Caron et al. 2021.

By arXiv:2104.14294 and facebookresearch/dino (main_dino.py, vision_transformer.DINOHead). The teacher sees only the
first two views, the student all of them, small crops too. Centring keeps one prototype from taking all samples,
sharpening (the teacher's lower temperature) keeps the distributions from becoming even. Suits vision transformers.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from model.backbone import build_backbone
from model.embedding_stats import unit_rows, wide
from model.gather import rank_and_world, sum_over_ranks
from model.heads import Prototypes
from model.methods.base import (
    BatchShape,
    CollapseProfile,
    Method,
    MethodConfig,
    MethodOutput,
    ParamGroup,
    StepInfo,
    check_counts,
    check_momentum,
    check_temperature,
    distribution_entropy,
    encode_jointly,
    mean_z_std,
    trained,
    unlike_views,
    weights_apart,
)
from model.momentum import Teacher, cosine_momentum
from pipeline.common.errors import require
from pipeline.sampling.views import ViewRecipe

TEACHER_VIEWS = 2


@dataclass(frozen=True)
class DINOConfig(MethodConfig):
    """DINO's head and schedules. The defaults are main_dino.py's."""

    name: ClassVar[str] = "dino"
    most_views: ClassVar[int | None] = None

    prototypes: int = 65536  # width of the distributions: --out_dim
    head_hidden: int = 2048  # width of the head's hidden layers: DINOHead
    head_layers: int = 3  # layers of the head before the prototypes: DINOHead
    head_batch_norm: bool = False  # a batch norm after each hidden layer of the head: --use_bn_in_head
    dim: int = 256  # width of the bottleneck that is compared with the prototypes: DINOHead
    student_temperature: float = 0.1  # DINOLoss
    teacher_temperature: float = 0.04  # after its warm-up; up to 0.07 in longer runs: --teacher_temp
    warmup_teacher_temperature: float = 0.04  # at the start: --warmup_teacher_temp
    teacher_temperature_epochs: int = 0  # epochs from one to the other, 30 in longer runs: --warmup_teacher_temp_epochs
    teacher_momentum: float = 0.996  # at the start; it rises to 1 along half a cosine: --momentum_teacher
    centre_momentum: float = 0.9  # of the moving average of the teacher's outputs: DINOLoss
    freeze_prototypes: int | Literal["epoch"] = "epoch"  # steps for which the last layer stays: --freeze_last_layer 1
    clip_gradient: float = 3.0  # largest norm of a parameter's gradient; 0: off: --clip_grad

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "dim", "head_hidden", "head_layers")
        require("--prototypes", self.prototypes, self.prototypes >= 2, "it must be at least 2")
        for name in ("student_temperature", "teacher_temperature", "warmup_teacher_temperature"):
            check_temperature(f"--{name.replace('_', '-')}", getattr(self, name))
        check_momentum("--teacher-momentum", self.teacher_momentum)
        check_momentum("--centre-momentum", self.centre_momentum)
        epochs, clip = self.teacher_temperature_epochs, self.clip_gradient
        require("--teacher-temperature-epochs", epochs, epochs >= 0, "it must be at least 0")
        require("--clip-gradient", clip, 0 <= clip < math.inf, "it must be above 0 and finite, or 0 for none")
        frozen = self.freeze_prototypes
        if isinstance(frozen, int):
            require("--freeze-prototypes", frozen, frozen >= 0, "it must be a number of steps, or epoch")

    def identity(self) -> dict[str, Any]:
        """The first checkpoints of the method do not know --head-batch-norm."""
        fields = super().identity()
        if not self.head_batch_norm:
            del fields["model.head_batch_norm"]
        return fields

    @classmethod
    def default_views(cls) -> ViewRecipe:
        """The two global views of DataAugmentationDINO, with the crop scale that main_dino.py recommends for these."""
        return unlike_views((0.14, 1.0))

    def build(self) -> DINO:
        return DINO(self)

    def check(self, batch: BatchShape, views: ViewRecipe) -> None:
        """Raise UserError for prototypes that do not fit in memory."""
        super().check(batch, views)
        batch.check_memory(
            "--prototypes", self.prototypes, self.prototypes * self.dim * 5 + self.prototypes * batch.micro_batch * 8
        )

    def frozen_steps(self, info: StepInfo) -> int:
        """Steps for which the last layer stays."""
        return info.steps_per_epoch if self.freeze_prototypes == "epoch" else self.freeze_prototypes

    def temperature_at(self, info: StepInfo) -> float:
        """The teacher's temperature, which moves once an epoch."""
        epoch, epochs = int(info.step) // info.steps_per_epoch, self.teacher_temperature_epochs
        if epoch >= epochs:
            return self.teacher_temperature
        share = epoch / max(epochs - 1, 1)  # numpy.linspace of main_dino.py
        return self.warmup_teacher_temperature + share * (self.teacher_temperature - self.warmup_teacher_temperature)


class DINO(Method):
    """The student is ``backbone``, ``head`` and ``prototypes``; ``teacher`` is a copy of the three."""

    config: DINOConfig
    capturable = True
    centre: Tensor
    temperature: Tensor

    def __init__(self, config: DINOConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone, features = build_backbone(config.backbone, config.stem)
        self.head = dino_head(features, config)
        self.prototypes = Prototypes(config.dim, config.prototypes, normalised=True)
        self.teacher = Teacher(self._student())
        self.register_buffer("centre", torch.zeros(config.prototypes))
        # Of this step. A tensor, as reading the step in forward would recompile it every time
        self.register_buffer("temperature", torch.tensor(config.warmup_teacher_temperature), persistent=False)
        self._is_frozen = False  # the last layer, in this step
        self._seen: list[Tensor] = []  # mean of the teacher's outputs in this step's passes

    def forward(self, views: list[Tensor], info: StepInfo) -> MethodOutput:
        """Views of one size in a row are one pass."""
        z = encode_jointly(nn.Sequential(self.backbone, self.head), views)
        targets = encode_jointly(self.teacher, views[:TEACHER_VIEWS])
        with torch.autocast(z[0].device.type, enabled=False):
            logits = [self.prototypes(embedding) for embedding in z]
            loss = distillation(logits, targets, self.centre, self.config.student_temperature, self.temperature)
            together = torch.cat(targets)
            self._seen.append(together.mean(dim=0))
            used = distribution_entropy((together - self.centre) / self.temperature)
        return MethodOutput(loss, z[0].detach(), {"z_std": mean_z_std(z[:TEACHER_VIEWS]), "prototype_entropy": used})

    def parameter_groups(self) -> list[ParamGroup]:
        """No weight decay on biases and norms: utils.get_params_groups."""
        return weights_apart(self)

    def before_step(self, info: StepInfo) -> None:
        """Forget the outputs of the step before; set the teacher's temperature."""
        self._seen = []
        self._is_frozen = self.phase(info)
        self.temperature.fill_(self.config.temperature_at(info))

    @torch.no_grad()
    def before_optimizer(self, info: StepInfo) -> None:
        """Clip each parameter's gradient; freeze the last layer at first."""
        if self.config.clip_gradient:
            clip_each([p.grad for p in trained(self) if p.grad is not None], self.config.clip_gradient)
        if self._is_frozen:
            self.prototypes.weight.grad = None

    def copy_student(self) -> None:
        self.teacher.copy_every(self._student(), 0, 1)

    @torch.no_grad()
    def after_step(self, info: StepInfo, applied: Shaped[Tensor, ""]) -> None:
        """Move the teacher and the centre."""
        self.teacher.update(self._student(), self._momentum(info), applied)
        seen = sum_over_ranks(torch.stack(self._seen).mean(dim=0)) / rank_and_world()[1]
        moved = self.centre.lerp(seen, 1 - self.config.centre_momentum)
        self.centre.copy_(torch.where(applied.bool(), moved, self.centre))
        self._seen = []

    def phase(self, info: StepInfo) -> bool:
        """Whether the last layer is frozen."""
        return bool(info.step < self.config.frozen_steps(info))

    def schedules(self, info: StepInfo) -> dict[str, float | int]:
        """The teacher's momentum and temperature."""
        return {
            "teacher_momentum": float(self._momentum(info)),
            "teacher_temperature": self.config.temperature_at(info),
        }

    def collapse(self, batch: BatchShape) -> CollapseProfile:
        """Of even distributions the loss is ln(prototypes)."""
        prototypes = self.config.prototypes
        return CollapseProfile(self.config.dim, stuck_loss=math.log(prototypes), stuck_name=f"ln({prototypes})")

    def _student(self) -> nn.Sequential:
        return nn.Sequential(self.backbone, self.head, self.prototypes)

    def _momentum(self, info: StepInfo) -> float | Tensor:
        return cosine_momentum(self.config.teacher_momentum, info.step, info.total_steps)


class UnitLength(nn.Module):
    """``[n, d]`` -> rows of length 1, float32."""

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return unit_rows(x)


def dino_head(features: int, config: DINOConfig) -> nn.Sequential:
    """``[n, features]`` -> unit vectors ``[n, dim]``: DINOHead, linear layers with GELU, or BN and GELU, between."""
    widths = [features, *[config.head_hidden] * (config.head_layers - 1), config.dim]
    modules: list[nn.Module] = []
    for layer, (in_dim, out_dim) in enumerate(itertools.pairwise(widths), start=1):
        linear = nn.Linear(in_dim, out_dim)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        modules.append(linear)
        if layer < config.head_layers:
            modules += [nn.BatchNorm1d(out_dim), nn.GELU()] if config.head_batch_norm else [nn.GELU()]
    return nn.Sequential(*modules, UnitLength())


def distillation(
    student: list[Float[Tensor, "n k"]],
    teacher: list[Float[Tensor, "n k"]],
    centre: Float[Tensor, " k"],
    student_temperature: float,
    teacher_temperature: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Algorithm 1 of the paper: the mean cross-entropy of each student view with each other view of the teacher."""
    predictions = [F.log_softmax(wide(logits) / student_temperature, dim=1) for logits in student]
    losses = []
    for seen, logits in enumerate(teacher):
        target = F.softmax((wide(logits) - centre) / teacher_temperature, dim=1).detach()
        losses += [
            -(target * prediction).sum(dim=1).mean() for view, prediction in enumerate(predictions) if view != seen
        ]
    return torch.stack(losses).mean()


def clip_each(gradients: list[Tensor], limit: float) -> None:
    """Scale down, in place, each gradient whose own norm is above ``limit``: utils.clip_gradients of DINO.

    What is not finite stays so, and the step is skipped.
    """
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, list((limit / (norms + 1e-6)).clamp(max=1.0).unbind()))
