"""BYOL: the online network predicts a momentum encoder's projection of the other view. Grill et al. 2020.

By arXiv:2006.07733 and google-deepmind's byol code. No negatives; without the momentum encoder and with a ten times
faster predictor (appendix I) it is close to SimSiam, hence the two switches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from model.backbone import build_backbone
from model.embedding_stats import wide
from model.heads import mlp
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
    encode,
    mean_z_std,
    unlike_views,
    weights_apart,
)
from model.momentum import Teacher, cosine_momentum
from pipeline.common.errors import require
from pipeline.sampling.views import ViewRecipe


@dataclass(frozen=True)
class BYOLConfig(MethodConfig):
    """BYOL's architecture. The defaults are its code's, with the 100-epoch run's momentum as in SimSiam, footnote 6."""

    name: ClassVar[str] = "byol"

    dim: int = 256  # width of z and p: paper section 3.3
    projector_hidden: int = 4096  # width of the projector's hidden layer: paper section 3.3
    predictor_hidden: int = 4096  # width of the predictor's hidden layer: paper section 3.3
    # The target network's momentum tau at the start; it rises to 1 along half a cosine. 0.99 for 100 and 300 epochs,
    # 0.996 for 1000: configs/byol.py, _EMA_PRESETS
    teacher_momentum: float = 0.99
    momentum_encoder: bool = True  # off: the online network itself, detached, is the target (appendix I, table 21)
    predictor_lr_scale: float = 1.0  # the predictor's rate, times the others'; 10 without momentum encoder (appendix I)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "dim", "projector_hidden", "predictor_hidden")
        check_momentum("--teacher-momentum", self.teacher_momentum)
        scale = self.predictor_lr_scale
        require("--predictor-lr-scale", scale, 0 < scale < math.inf, "it must be above 0 and finite")

    @classmethod
    def default_views(cls) -> ViewRecipe:
        """Two unlike views: augmentations.py, dataset.py."""
        return unlike_views((0.08, 1.0))

    def build(self) -> BYOL:
        return BYOL(self)


class BYOL(Method):
    """The online network is ``backbone``, ``projector`` and ``predictor``, the target network ``teacher``."""

    config: BYOLConfig
    capturable = True

    def __init__(self, config: BYOLConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone, features = build_backbone(config.backbone, config.stem)
        head = {"batch_norm": True, "hidden_bias": True, "out_bias": False}  # networks.MLP
        self.projector = mlp([features, config.projector_hidden, config.dim], **head)
        self.predictor = mlp([config.dim, config.predictor_hidden, config.dim], **head)
        self.teacher = Teacher(self._encoder()) if config.momentum_encoder else None

    def forward(self, views: list[Tensor], info: StepInfo) -> MethodOutput:
        """Each view's prediction against the target of the other; batch statistics are of each view alone."""
        z = encode(self._encoder(), views)
        targets = [target.detach() for target in z] if self.teacher is None else encode(self.teacher, views)
        p1, p2 = encode(self.predictor, z)
        loss = regression_loss(p1, targets[1]) + regression_loss(p2, targets[0])
        return MethodOutput(loss, z[0].detach(), {"z_std": mean_z_std(z)})

    def parameter_groups(self) -> list[ParamGroup]:
        """Biases and norms have neither weight decay nor LARS' adaptation (configs/byol.py, exclude_bias_and_norm)."""
        predictor = weights_apart(self.predictor, "predictor", self.config.predictor_lr_scale)
        return [*weights_apart(self._encoder(), "encoder"), *predictor]

    def copy_student(self) -> None:
        if self.teacher is not None:
            self.teacher.copy_every(self._encoder(), 0, 1)

    def after_step(self, info: StepInfo, applied: Shaped[Tensor, ""]) -> None:
        """Move the target network, with this step's tau, after the optimizer (byol_experiment.py)."""
        if self.teacher is not None:
            self.teacher.update(self._encoder(), self._momentum(info), applied)

    def schedules(self, info: StepInfo) -> dict[str, float | int]:
        """Tau."""
        return {} if self.teacher is None else {"teacher_momentum": float(self._momentum(info))}

    def collapse(self, batch: BatchShape) -> CollapseProfile:
        """Of equal projections the loss is 0, its least."""
        causes = []
        if self.teacher is None and self.config.predictor_lr_scale < 10:
            causes.append("no momentum encoder, and the predictor's rate is not raised (--predictor-lr-scale 10)")
        return CollapseProfile(self.config.dim, causes=tuple(causes))

    def _encoder(self) -> nn.Sequential:
        return nn.Sequential(self.backbone, self.projector)

    def _momentum(self, info: StepInfo) -> float | Tensor:
        return cosine_momentum(self.config.teacher_momentum, info.step, info.total_steps)


def regression_loss(p: Float[Tensor, "n d"], target: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Equation 2 of the paper, the mean of ``2 - 2 cos(p, target)``; float32 even under autocast."""
    with torch.autocast(p.device.type, enabled=False):
        return (2 - 2 * F.cosine_similarity(wide(p), wide(target), dim=1)).mean()
