"""SwAV: a view predicts to which prototypes another view of its image is assigned. Caron et al. 2020.

By arXiv:2006.09882 and facebookresearch/swav: scores are cosines between embeddings and prototypes, assignments come
from Sinkhorn-Knopp over the batch of all ranks, so that all prototypes are used alike. The first two views are
assigned; all, small crops too, predict. The SimSiam paper takes a third layer in the projector (appendix C), and its
section 6.3 adds a predictor or leaves the stop-gradient out, as the switches here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from model.backbone import build_backbone
from model.embedding_stats import unit_rows, wide
from model.feature_queue import FeatureQueue
from model.gather import gather_rows, rank_and_world
from model.heads import Predictor, Prototypes, mlp
from model.methods.base import (
    BatchShape,
    CollapseProfile,
    Method,
    MethodConfig,
    MethodOutput,
    StepInfo,
    check_counts,
    check_temperature,
    distribution_entropy,
    encode_jointly,
    mean_z_std,
)
from pipeline.common.errors import UserError, require
from pipeline.sampling.views import ViewRecipe

ASSIGNED = 2  # views whose assignments are predicted: --crops_for_assign 0 1


@dataclass(frozen=True)
class SwAVConfig(MethodConfig):
    """SwAV's architecture and loss. The defaults are its scripts', with the projector of SimSiam's comparison."""

    name: ClassVar[str] = "swav"
    batch_coupled: ClassVar[bool] = True
    most_views: ClassVar[int | None] = None

    dim: int = 128  # width of z: --feat_dim
    projector_layers: int = 3  # SimSiam, appendix C; the original has 2 (src/resnet50.py)
    projector_hidden: int = 2048  # width of the projector's hidden layers: --hidden_mlp
    prototypes: int = 3000  # --nmb_prototypes
    temperature: float = 0.1  # of the prediction's softmax: --temperature
    epsilon: float = 0.05  # smoothness of the assignments; too small is unstable: --epsilon, README
    sinkhorn_iterations: int = 3  # --sinkhorn_iterations
    # Steps for which the prototypes stay at their random start. 313 at batch 4096, 5005 at 256: one epoch of ImageNet
    freeze_prototypes: int | Literal["epoch"] = "epoch"
    # Embeddings of earlier steps that are assigned along with a small batch: 3840 at batch 256, 0 at 4096
    queue: int = 0
    queue_from_epoch: int = 15  # epochs before the queue is used: --epoch_queue_starts
    predictor: bool = False  # put SimSiam's predictor on the predicting view; SimSiam section 6.3: 65.2, without 66.5
    stop_gradient: bool = True  # detach the assignments (default; without it the loss is nan: SimSiam section 6.3)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "dim", "projector_layers", "projector_hidden", "sinkhorn_iterations")
        require("--prototypes", self.prototypes, self.prototypes >= 2, "it must be at least 2")
        check_temperature("--temperature", self.temperature)
        require("--epsilon", self.epsilon, 0 < self.epsilon < math.inf, "it must be above 0 and finite; SwAV's is 0.05")
        for name in ("queue", "queue_from_epoch"):
            require(
                f"--{name.replace('_', '-')}", getattr(self, name), getattr(self, name) >= 0, "it must be at least 0"
            )
        frozen = self.freeze_prototypes
        if isinstance(frozen, int):
            require("--freeze-prototypes", frozen, frozen >= 0, "it must be a number of steps, or epoch")

    @classmethod
    def default_views(cls) -> ViewRecipe:
        """Two views: scripts/swav_400ep_2x224_pretrain.sh, src/multicropdataset.py."""
        return ViewRecipe(crop_scale=(0.08, 1.0), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)

    def build(self) -> SwAV:
        return SwAV(self)

    def check(self, batch: BatchShape, views: ViewRecipe) -> None:
        """Raise UserError for a batch that does not divide the queue, or for prototypes that do not fit in memory."""
        super().check(batch, views)
        if self.queue % batch.global_batch:
            above = -(-self.queue // batch.global_batch) * batch.global_batch
            raise UserError(
                f"--queue {self.queue} is no multiple of --global-batch {batch.global_batch}: take {above}, or 0 for "
                "none"
            )
        batch.check_memory(
            "--prototypes", self.prototypes, self.prototypes * self.dim * 3 + self.prototypes * batch.micro_batch * 4
        )

    def frozen_steps(self, info: StepInfo) -> int:
        """Steps for which the prototypes stay."""
        return info.steps_per_epoch if self.freeze_prototypes == "epoch" else self.freeze_prototypes


class SwAV(Method):
    """``backbone``, ``projector``, ``prototypes``; a predictor and queues where asked for."""

    config: SwAVConfig
    capturable = True

    def __init__(self, config: SwAVConfig) -> None:
        """Weights come from torch's global generator. The prototypes have length 1 between any two steps."""
        super().__init__()
        self.config = config
        self.backbone, features = build_backbone(config.backbone, config.stem)
        hidden = [config.projector_hidden] * (config.projector_layers - 1)
        self.projector = mlp([features, *hidden, config.dim], batch_norm=True, hidden_bias=True, out_bias=True)
        self.predictor = Predictor(config.dim, max(1, config.dim // 4)) if config.predictor else nn.Identity()
        self.prototypes = Prototypes(config.dim, config.prototypes, normalised=False)
        count = ASSIGNED if config.queue else 0
        self.queues = nn.ModuleList([FeatureQueue(config.queue, config.dim) for _ in range(count)])
        # Set before each step: reading the step in forward would recompile it every time
        self._queue_in_use = self._is_frozen = False
        self._assigned: list[list[Tensor]] = []  # embeddings of this step's passes, a tensor for each assigned view

    def forward(self, views: list[Tensor], info: StepInfo) -> MethodOutput:
        """Views of one size share batch statistics, as in the reference."""
        z = encode_jointly(nn.Sequential(self.backbone, self.projector), views)
        predicting = encode_jointly(self.predictor, z) if self.config.predictor else z
        with torch.autocast(z[0].device.type, enabled=False):
            unit = [unit_rows(embedding) for embedding in z]
            scores = [self.prototypes(unit_rows(embedding)) for embedding in predicting]
            assignments = [self._assign(view, unit[view]) for view in range(ASSIGNED)]
            loss = swapped_prediction(scores, assignments, self.config.temperature)
            used = distribution_entropy(torch.cat(scores[:ASSIGNED]).detach() / self.config.temperature)
        self._assigned.append([embedding.detach() for embedding in unit[:ASSIGNED]])
        return MethodOutput(loss, z[0].detach(), {"z_std": mean_z_std(z[:ASSIGNED]), "prototype_entropy": used})

    def _assign(self, view: int, unit: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        """The assignments of one view, together with the queue's where that is in use."""
        config, rows = self.config, unit
        if self._queue_in_use:
            rank, world = rank_and_world()
            rows = torch.cat([self.queues[view].rows.chunk(world)[rank], unit])  # type: ignore[operator]
        with torch.set_grad_enabled(not config.stop_gradient):
            return sinkhorn(self.prototypes(rows), config.epsilon, config.sinkhorn_iterations)[-len(unit) :]

    def _uses_queue(self, info: StepInfo) -> bool:
        """From the given epoch on, and not before it is full."""
        full = self.config.queue // info.global_batch
        return bool(self.config.queue) and bool(
            info.step >= max(full, self.config.queue_from_epoch * info.steps_per_epoch)
        )

    def before_step(self, info: StepInfo) -> None:
        """Forget the embeddings of the step before; see what this step does."""
        self._assigned = []
        self._queue_in_use, self._is_frozen = self.phase(info)

    def before_optimizer(self, info: StepInfo) -> None:
        """Freeze the prototypes at first: without a gradient neither decay nor momentum moves them."""
        if self._is_frozen:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, info: StepInfo, applied: Shaped[Tensor, ""]) -> None:
        """Bring the prototypes back to length 1 and enqueue the embeddings."""
        if not self._is_frozen:
            self.prototypes.normalise(applied)
        for queue, passes in zip(self.queues, zip(*self._assigned, strict=True), strict=False):
            queue.push(gather_rows(torch.cat(passes)), info.step, applied)  # type: ignore[operator]
        self._assigned = []

    def phase(self, info: StepInfo) -> tuple[bool, bool]:
        """Whether the queue is in use, and whether the prototypes are frozen."""
        return self._uses_queue(info), bool(info.step < self.config.frozen_steps(info))

    def schedules(self, info: StepInfo) -> dict[str, float | int]:
        """Steps since the oldest row of the queue was written."""
        return {"queue_age": self.queues[0].age(int(info.step), info.global_batch)} if self.config.queue else {}  # type: ignore[operator]

    def collapse(self, batch: BatchShape) -> CollapseProfile:
        """Of equal scores the loss is ln(prototypes): swav issue 12."""
        causes = () if self.config.stop_gradient else ("the stop-gradient is off (--no-stop-gradient)",)
        prototypes = self.config.prototypes
        return CollapseProfile(
            self.config.dim, causes=causes, stuck_loss=math.log(prototypes), stuck_name=f"ln({prototypes})"
        )


def sinkhorn(scores: Float[Tensor, "n k"], epsilon: float, iterations: int) -> Float[Tensor, "n k"]:
    """Assignments of this rank's rows, each a distribution over the prototypes, which all ranks' rows use evenly.

    distributed_sinkhorn of main_swav.py: ``exp(scores / epsilon)``, then rows and columns are scaled in turn, the
    columns (samples) last. Of the logarithms, in float32: exp(1 / 0.05) is beyond float16, and at an epsilon of 0.005
    exp is beyond float32, too. That each prototype has 1 / prototypes of the mass is the same factor for all, which the
    samples' turn takes away. A collective.
    """
    with torch.autocast(scores.device.type, enabled=False):
        log_q = wide(scores) / epsilon
        for _ in range(iterations):
            of_prototypes = gather_rows(log_q.logsumexp(dim=0, keepdim=True)).logsumexp(dim=0)
            log_q = F.log_softmax(log_q - of_prototypes, dim=1)
        return log_q.exp()


def swapped_prediction(
    scores: list[Float[Tensor, "n k"]], assignments: list[Float[Tensor, "n k"]], temperature: float
) -> Float[Tensor, ""]:
    """Equation 2 of the paper, as main_swav.py averages it: over the assigned views, and for each over all others."""
    losses = [
        -(assignment * F.log_softmax(score / temperature, dim=1)).sum(dim=1).mean()
        for assigned, assignment in enumerate(assignments)
        for view, score in enumerate(scores)
        if view != assigned
    ]
    return torch.stack(losses).mean()
