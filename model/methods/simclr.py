"""SimCLR: each view is told from all other images of the batch. Chen, Kornblith, Norouzi & Hinton 2020.

Two views of an image are a positive pair; the 2 B - 2 other views of the global batch are negatives. By
arXiv:2002.05709 and google-research/simclr; what the SimSiam paper changes for its table 4 is the projector's third
layer. Its section 6.2 adds SimSiam's predictor and stop-gradient, as the switches here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from model.backbone import build_backbone
from model.embedding_stats import unit_rows
from model.gather import gather_rows
from model.heads import Predictor, mlp
from model.methods.base import (
    BatchShape,
    CollapseProfile,
    Method,
    MethodConfig,
    MethodOutput,
    ParamGroup,
    StepInfo,
    check_counts,
    check_temperature,
    encode_jointly,
    mean_z_std,
    weights_apart,
)
from pipeline.sampling.views import ViewRecipe


@dataclass(frozen=True)
class SimCLRConfig(MethodConfig):
    """SimCLR's architecture and loss. The defaults are its paper's, with the projector of SimSiam's comparison."""

    name: ClassVar[str] = "simclr"
    batch_coupled: ClassVar[bool] = True

    dim: int = 128  # width of z: paper section 2.2; run.py proj_out_dim
    projector_layers: int = 3  # SimSiam, appendix C; the paper has 2, its code 3 (num_proj_layers)
    projector_hidden: int = 2048  # the width of ResNet-50's features: model_util.projection_head
    temperature: float = 0.1  # of the softmax over the similarities: run.py; paper section 5.1
    predictor: bool = False  # put SimSiam's predictor on the anchor; SimSiam section 6.2: 66.4, without 66.5
    stop_gradient: bool = False  # detach the keys; SimSiam section 6.2, with the predictor: 66.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "dim", "projector_layers", "projector_hidden")
        check_temperature("--temperature", self.temperature)

    @classmethod
    def default_views(cls) -> ViewRecipe:
        """data_util.py at colour strength 1; README."""
        return ViewRecipe(
            crop_scale=(0.08, 1.0), interpolation="bicubic", brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2
        )

    def build(self) -> SimCLR:
        return SimCLR(self)


class SimCLR(Method):
    """``backbone`` and ``projector``; a predictor where asked for."""

    config: SimCLRConfig
    capturable = True

    def __init__(self, config: SimCLRConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone, features = build_backbone(config.backbone, config.stem)
        hidden = [config.projector_hidden] * (config.projector_layers - 1)
        output_bn = nn.BatchNorm1d(config.dim)
        assert output_bn.bias is not None
        output_bn.bias.requires_grad_(False)  # "center" is off in the last layer of model_util.projection_head
        layers = mlp([features, *hidden, config.dim], batch_norm=True, hidden_bias=False, out_bias=False)
        self.projector = nn.Sequential(*layers, output_bn)
        width = max(1, config.dim // 4)  # as SimSiam's, a quarter
        self.predictor = Predictor(config.dim, width) if config.predictor else nn.Identity()

    def forward(self, views: list[Tensor], info: StepInfo) -> MethodOutput:
        """Batch statistics are of both views together, as in the reference."""
        z = encode_jointly(nn.Sequential(self.backbone, self.projector), views)
        anchors = encode_jointly(self.predictor, z)
        keys = [key.detach() for key in z] if self.config.stop_gradient else z
        loss, top1 = nt_xent(anchors, keys, self.config.temperature, info.rank)
        return MethodOutput(loss, z[0].detach(), {"z_std": mean_z_std(z), "contrast_top1": top1})

    def parameter_groups(self) -> list[ParamGroup]:
        """Biases and norms have neither weight decay nor LARS' adaptation: model_util.get_optimizer."""
        return weights_apart(self)

    def collapse(self, batch: BatchShape) -> CollapseProfile:
        """Of equal similarities the loss is the logarithm of the candidates' number."""
        candidates = 2 * batch.pass_batch - 1
        return CollapseProfile(
            self.config.dim, stuck_loss=math.log(candidates), stuck_name=f"ln(2 x {batch.pass_batch} - 1)"
        )


def nt_xent(
    anchors: list[Float[Tensor, "n d"]], keys: list[Float[Tensor, "n d"]], temperature: float, rank: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Equation 1 of the paper, the mean over this rank's 2 n anchors, and how often the positive is the most similar.

    ``anchors`` and ``keys`` are of two views, in SimCLR itself the same. Candidates are all ranks' keys but the
    anchor's own sample in its own view. float32 even under autocast. A collective.
    """
    with torch.autocast(anchors[0].device.type, enabled=False):
        anchors = [unit_rows(anchor) for anchor in anchors]
        gathered = [gather_rows(unit_rows(key)) for key in keys]
        candidates, total, n = torch.cat(gathered), len(gathered[0]), len(anchors[0])
        own = torch.arange(n, device=candidates.device)
        losses, hits = [], []
        for view, anchor in enumerate(anchors):
            logits = anchor @ candidates.T / temperature
            itself = torch.zeros_like(logits, dtype=torch.bool)
            itself[own, own + rank * n + view * total] = True
            logits = logits.masked_fill(itself, -torch.inf)
            positive = own + rank * n + (1 - view) * total
            losses.append(F.cross_entropy(logits, positive))
            hits.append((logits.argmax(dim=1) == positive).float().mean())
        return torch.stack(losses).mean(), torch.stack(hits).mean()
