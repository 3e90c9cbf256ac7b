"""MoCo v2: a query is told from the keys of earlier batches, which a momentum encoder made.

He et al. 2020, Chen et al. 2020 (arXiv:1911.05722, 2003.04297), by facebookresearch/moco with --mlp --moco-t 0.2
--aug-plus --cos; the symmetric loss is that of its CIFAR-10 notebook and of the SimSiam paper's table 4. Batch norm
keeps to groups of a fixed number of images (group_batchnorm.py), so that the loss does not depend on the number of
ranks, and a query and its key have different groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from model.backbone import build_backbone, has_batch_norm, start_blocks_at_one
from model.embedding_stats import unit_rows
from model.feature_queue import FeatureQueue
from model.gather import gather_rows
from model.group_batchnorm import group_batch_norm, update_running_statistics
from model.heads import mlp
from model.methods.base import (
    BatchShape,
    CollapseProfile,
    Method,
    MethodConfig,
    MethodOutput,
    StepInfo,
    check_counts,
    check_momentum,
    check_temperature,
    encode,
    mean_z_std,
)
from model.momentum import Teacher
from pipeline.common.errors import UserError, require
from pipeline.sampling.views import ViewRecipe


@dataclass(frozen=True)
class MoCoConfig(MethodConfig):
    """MoCo v2's architecture and loss. The defaults are its code's, and SimSiam's where that compares."""

    name: ClassVar[str] = "moco-v2"
    own_batch_norm: ClassVar[bool] = True

    dim: int = 128  # width of queries and keys: main_moco.py
    projector_hidden: int = 2048  # width of the projector's hidden layer: builder.py
    temperature: float = 0.2  # of the softmax over the similarities: README, --moco-t
    queue: int = 65536  # keys of earlier batches: main_moco.py
    teacher_momentum: float = 0.999  # of the key encoder's moving average: main_moco.py
    symmetric: bool = True  # each view is query and key (SimSiam, appendix C); the original has one side only
    bn_images: int = 32  # images of a batch norm group: batch 256 on 8 GPUs (main_moco.py)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "dim", "projector_hidden", "queue")
        check_momentum("--teacher-momentum", self.teacher_momentum)
        require("--bn-images", self.bn_images, self.bn_images >= 2, "batch norm needs at least 2 images")
        check_temperature("--temperature", self.temperature)

    def build(self) -> MoCo:
        return MoCo(self)

    @property
    def keys_per_image(self) -> int:
        """Keys that a step puts into the queue, for each image."""
        return 2 if self.symmetric else 1

    def check(self, batch: BatchShape, views: ViewRecipe) -> None:
        """Raise UserError for a batch that does not divide the queue, or that batch norm's groups do not divide."""
        super().check(batch, views)
        keys = batch.global_batch * self.keys_per_image
        if self.queue % keys:
            above = -(-self.queue // keys) * keys
            raise UserError(
                f"--queue {self.queue} is no multiple of the {keys} keys of a step (--global-batch "
                f"{batch.global_batch}{' x 2, as the loss is symmetric' if self.symmetric else ''}): take {above}, or "
                "another batch"
            )
        if not has_batch_norm(self.backbone):
            return
        if batch.sync_bn:
            raise UserError(
                "--sync-bn with --method moco-v2: statistics over all ranks let a query and its key recognise each "
                "other (facebookresearch/moco issue 46); leave it out, and batch norm keeps to groups of --bn-images"
            )
        if batch.micro_batch % self.bn_images:
            raise UserError(
                f"--bn-images {self.bn_images} does not divide the {batch.micro_batch} images of a pass "
                f"(--global-batch {batch.global_batch}, {batch.parts}): take a divisor of "
                f"{batch.micro_batch}, or another batch"
            )
        if batch.pass_batch == self.bn_images:
            raise UserError(
                f"--bn-images {self.bn_images} makes one group of all {batch.pass_batch} images of a pass: a query and "
                "its key would share their statistics, which give the pair away (He et al. 2020, section 3.3); take "
                f"{max(2, batch.pass_batch // 2)} or less, or a larger batch"
            )


class MoCo(Method):
    """The query encoder is ``backbone`` and ``projector``, the key encoder ``teacher``."""

    config: MoCoConfig
    capturable = True

    def __init__(self, config: MoCoConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone, features = build_backbone(config.backbone, config.stem)
        start_blocks_at_one(self.backbone)
        widths = [features, config.projector_hidden, config.dim]
        self.projector = mlp(widths, batch_norm=False, hidden_bias=True, out_bias=True)
        self.teacher = Teacher(self._encoder())
        group_batch_norm(self.backbone, config.bn_images, "in a row")
        group_batch_norm(self.teacher, config.bn_images, "strided")
        self.queue = FeatureQueue(config.queue, config.dim)
        self._keys: list[list[Tensor]] = []  # of this step's passes, a tensor a view

    def forward(self, views: list[Tensor], info: StepInfo) -> MethodOutput:
        """One side: view 1 is the query, view 2 the key. Symmetric: the sum of both sides, as in moco's notebook."""
        queried = views if self.config.symmetric else views[:1]
        z = encode(self._encoder(), queried)
        keys = encode(self.teacher, views[::-1] if self.config.symmetric else views[1:])
        with torch.autocast(z[0].device.type, enabled=False):
            queries = [unit_rows(query) for query in z]
            keys = [unit_rows(key) for key in keys]
            losses = [
                queue_contrast(query, key, self.queue.rows, self.config.temperature)
                for query, key in zip(queries, keys, strict=True)
            ]
        self._keys.append(keys)
        return MethodOutput(torch.stack(losses).sum(), z[0].detach(), {"z_std": mean_z_std(z)})

    def before_step(self, info: StepInfo) -> None:
        """Forget the keys of the step before."""
        self._keys = []

    def copy_student(self) -> None:
        self.teacher.copy_every(self._encoder(), 0, 1)

    @torch.no_grad()
    def after_step(self, info: StepInfo, applied: Shaped[Tensor, ""]) -> None:
        """Move the key encoder, enqueue the keys, update batch norm's running statistics.

        The reference moves the key encoder before it computes the keys: the same, as it starts as a copy.
        """
        self.teacher.update(self._encoder(), self.config.teacher_momentum, applied)
        sides = [gather_rows(torch.cat(passes)) for passes in zip(*self._keys, strict=True)]
        self.queue.push(torch.cat(sides), info.step, applied)
        update_running_statistics(self, applied)
        self._keys = []

    def schedules(self, info: StepInfo) -> dict[str, float | int]:
        """Steps since the oldest key was written."""
        return {"queue_age": self.queue.age(int(info.step), info.global_batch * self.config.keys_per_image)}

    def collapse(self, batch: BatchShape) -> CollapseProfile:
        """Of equal similarities each side's loss is ln(queue + 1); in the first steps it is above, and no alarm."""
        sides, candidates = self.config.keys_per_image, self.config.queue + 1
        return CollapseProfile(
            self.config.dim,
            stuck_loss=sides * math.log(candidates),
            stuck_name=f"{'2 ' if sides == 2 else ''}ln({candidates})",
        )

    def _encoder(self) -> nn.Sequential:
        return nn.Sequential(self.backbone, self.projector)


def queue_contrast(
    queries: Float[Tensor, "n d"], keys: Float[Tensor, "n d"], queue: Float[Tensor, "k d"], temperature: float
) -> Float[Tensor, ""]:
    """InfoNCE of unit vectors: each query against its own key and all of the queue; the mean over the queries."""
    positive = (queries * keys).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, queries @ queue.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
