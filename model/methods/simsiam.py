"""Owns the method: one encoder for both views, predictor, stop-gradient, loss. Chen & He 2020, algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import assert_never

from model.backbone import Stem, build_backbone
from model.heads import BatchNormPlaces, Predictor, Projector

Similarity = Literal["cosine", "cross-entropy"]


@dataclass(frozen=True)
class SimSiamConfig:
    """The architecture and the method's switches. The defaults are the paper's (arXiv:2011.10566)."""

    # ResNet backbone: section 3, "Baseline settings"; resnet_tiny is fit for 32 pixels on a CPU
    backbone: str = "resnet50"
    stem: Stem = "default"  # first layers: "cifar" as in appendix D for images of 32 pixels
    dim: int = 2048  # width d of z and p: section 3
    projector_layers: int = 3  # section 3; appendix D takes 2 for CIFAR-10
    projector_hidden: int = 2048  # section 3
    # None: a quarter of dim. Section 3: 512 of 2048; appendix B keeps to a quarter, with which
    # dim 256, 512, 1024, 2048 gives 65.3, 67.2, 67.5, 68.1
    predictor_hidden: int | None = None
    predictor: Literal["mlp", "none", "fixed-random"] = "mlp"  # table 1: learned 67.7, none 0.1, fixed random 1.5
    # BN after which layers; table 3 (projector/predictor): none/none 34.6, hidden/hidden 67.4, all/hidden 68.1
    projector_bn: BatchNormPlaces = "all"
    predictor_bn: BatchNormPlaces = "hidden"  # table 3: all/all is unstable
    stop_gradient: bool = True  # section 4.1, figure 2: without it 0.1
    similarity: Similarity = "cosine"  # section 4.5: cosine 68.1, cross-entropy 63.2
    symmetric: bool = True  # section 4.6: symmetric 68.1, one side only 64.8
    # Pairs of views of each image in a step. Section 4.6: "sampling two pairs for each image in the asymmetric
    # version (2x)" 67.3. Each pair is a pass of its own, their gradients are averaged
    pairs: int = 1
    # What predictions are drawn to: section 5.2. encoder: the other view's z, as ever. frozen: that of a copy of the
    # encoder, renewed every target_steps steps. moving-average: a mean with the image's earlier z; --predictor none
    targets: Literal["encoder", "frozen", "moving-average"] = "encoder"
    target_steps: int | Literal["epoch"] = 1  # section 5.2: 1 (as encoder) 68.1, 10 68.7, 100 68.9, an epoch 67.0
    target_momentum: float = 0.8  # section 5.2: without predictor 55.0, where encoder gives 0.1
    target_memory: Literal["ram", "disk"] = "ram"  # each process keeps num_samples x dim x 4 bytes

    @property
    def predictor_width(self) -> int:
        """Width of the predictor's hidden layer."""
        return max(1, self.dim // 4) if self.predictor_hidden is None else self.predictor_hidden


class SimSiamOutput(NamedTuple):
    """Predictions and projections of both views, each ``[n, dim]``; z is detached unless ``stop_gradient`` is off."""

    p1: Tensor
    p2: Tensor
    z1: Tensor
    z2: Tensor


class SimSiam(nn.Module):
    """``(x1, x2) -> SimSiamOutput``. ``backbone`` and ``projector`` are the paper's encoder f, ``predictor`` is h."""

    def __init__(self, config: SimSiamConfig) -> None:
        """Weights come from torch's global generator. Raises ValueError for an unknown backbone or stem."""
        super().__init__()
        self.config = config
        self.backbone, features = build_backbone(config.backbone, config.stem)
        self.projector = Projector(
            features, config.projector_hidden, config.dim, config.projector_layers, config.projector_bn
        )
        self.predictor: nn.Module
        match config.predictor:
            case "mlp":
                self.predictor = Predictor(config.dim, config.predictor_width, config.predictor_bn)
            case "fixed-random":
                fixed = Predictor(config.dim, config.predictor_width, config.predictor_bn)
                self.predictor = fixed.requires_grad_(False)
            case "none":
                self.predictor = nn.Identity()
            case unreachable:
                assert_never(unreachable)

    def forward(self, x1: Float[Tensor, "n 3 h w"], x2: Float[Tensor, "n 3 h w"]) -> SimSiamOutput:
        """Encode both views in separate passes, so that BN takes its statistics of each view alone (official code)."""
        z1 = self.projector(self.backbone(x1))
        z2 = self.projector(self.backbone(x2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        if self.config.stop_gradient:
            z1, z2 = z1.detach(), z2.detach()
        return SimSiamOutput(p1, p2, z1, z2)


def simsiam_loss(
    p1: Float[Tensor, "n d"],
    p2: Float[Tensor, "n d"],
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    similarity: Similarity = "cosine",
    symmetric: bool = True,
) -> Float[Tensor, ""]:
    """Equation 2: ``D(p1, z2) / 2 + D(p2, z1) / 2``, or ``D(p1, z2)`` alone; float32 even under autocast.

    It stops no gradient: z comes detached from ``SimSiam``.
    """
    with torch.autocast(p1.device.type, enabled=False):
        loss = negative_similarity(p1.float(), z2.float(), similarity)
        if not symmetric:
            return loss
        return loss / 2 + negative_similarity(p2.float(), z1.float(), similarity) / 2


def negative_similarity(
    p: Float[Tensor, "n d"], z: Float[Tensor, "n d"], similarity: Similarity = "cosine"
) -> Float[Tensor, ""]:
    """D of equation 1, the mean over the batch of -cos(p, z); or section 4.5's ``-softmax(z) . log softmax(p)``."""
    match similarity:
        case "cosine":
            return -F.cosine_similarity(p, z, dim=1).mean()
        case "cross-entropy":
            return -(F.softmax(z, dim=1) * F.log_softmax(p, dim=1)).sum(dim=1).mean()
        case unreachable:
            assert_never(unreachable)
