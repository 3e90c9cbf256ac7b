"""SimSiam: one encoder for both views, a predictor, a stop-gradient. Chen & He 2020 (arXiv:2011.10566), algorithm 1.

    SimSiam(SimSiamConfig(backbone="resnet50"))(x1, x2) -> p1, p2, z1, z2        and simsiam_loss of these

In training it is called as any method is (base.py), with a list of views. Section 5 explains SimSiam as an alternation
between the weights and targets eta; the two other kinds of targets are the experiments of section 5.2.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import assert_never

from model.backbone import build_backbone
from model.embedding_stats import least_share, wide
from model.heads import BatchNormPlaces, Predictor, Projector
from model.methods.base import (
    BatchShape,
    CollapseProfile,
    Method,
    MethodConfig,
    MethodOutput,
    ParamGroup,
    StepInfo,
    check_counts,
    encode,
    mean_z_std,
    trained,
)
from model.momentum import Teacher
from pipeline.common.errors import UserError, require

Similarity = Literal["cosine", "cross-entropy"]
# Switches that the first checkpoints lack; at their defaults they change nothing for them.
NEWER_SWITCHES = ("pairs", "targets", "target_steps", "target_momentum")


@dataclass(frozen=True)
class SimSiamConfig(MethodConfig):
    """The architecture and the method's switches. The defaults are the paper's (arXiv:2011.10566)."""

    name: ClassVar[str] = "simsiam"

    # Width d of z and p [section 3].
    dim: int = 2048
    # Layers of the projector [section 3]; appendix D takes 2 for CIFAR-10.
    projector_layers: int = 3
    # Width of the projector's hidden layers [section 3].
    projector_hidden: int = 2048
    # Width of the predictor's hidden layer; default: a quarter of --dim. Section 3 has 512 of 2048; with a quarter, dim
    # 256, 512, 1024, 2048 give 65.3, 67.2, 67.5, 68.1 (appendix B).
    predictor_hidden: int | None = None
    # Kind of predictor: learned, identity, or fixed at its random weights (table 1: 67.7, 0.1, 1.5)
    predictor: Literal["mlp", "none", "fixed-random"] = "mlp"
    # The predictor's learning rate: at its peak throughout, or following the cosine (table 1: 68.1 and 67.7)
    predictor_lr: Literal["constant", "cosine"] = "constant"
    # Layers of the projector that a BN follows; table 3 (projector/predictor): none/none 34.6, hidden/hidden 67.4,
    # all/hidden 68.1.
    projector_bn: BatchNormPlaces = "all"
    # Layers of the predictor that a BN follows; table 3: all/all is unstable.
    predictor_bn: BatchNormPlaces = "hidden"
    # Detach the target z (default; without it the encoder collapses: section 4.1, figure 2).
    stop_gradient: bool = True
    # Similarity of p and z; section 4.5: cosine 68.1, cross-entropy 63.2.
    similarity: Similarity = "cosine"
    # Predict each view from the other; section 4.6: symmetric 68.1, one side only 64.8.
    symmetric: bool = True
    # Pairs of views of each image in a step. Section 4.6: "sampling two pairs for each image in the asymmetric
    # version (2x)" 67.3. Each pair is a pass of its own, their gradients are averaged
    pairs: int = 1
    # Target of a prediction (section 5.2). encoder: the other view's z. frozen: the z of a copy of the encoder, renewed
    # every --target-steps steps. moving-average: a mean with the image's earlier z; for --predictor none.
    targets: Literal["encoder", "frozen", "moving-average"] = "encoder"
    # Steps between copies for --targets frozen; section 5.2: 1 (as encoder) 68.1, 10 68.7, 100 68.9, an epoch 67.0
    target_steps: int | Literal["epoch"] = 1
    # Weight of the past for --targets moving-average; section 5.2: without predictor 55.0, where encoder gives 0.1
    target_momentum: float = 0.8
    # Place of the moving averages, num_samples x dim x 4 bytes in each process.
    target_memory: Literal["ram", "disk"] = "ram"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dim", "projector_layers", "projector_hidden", "predictor_hidden", "pairs", "target_steps"):
            number = getattr(self, name)
            if isinstance(number, int):
                check_counts(self, name)
        rule = "it must be at least 0 and below 1; the paper's is 0.8"
        require("--target-momentum", self.target_momentum, 0 <= self.target_momentum < 1, rule)
        rule = "only --targets encoder has a gradient to let through (--no-stop-gradient)"
        require("--targets", self.targets, self.targets == "encoder" or self.stop_gradient, rule)
        if self.target_steps != 1 and self.targets != "frozen":
            raise UserError(f"--target-steps {self.target_steps} is for --targets frozen, not for {self.targets}")

    def build(self) -> SimSiam:
        return SimSiam(self)

    @property
    def predictor_width(self) -> int:
        """Width of the predictor's hidden layer."""
        return max(1, self.dim // 4) if self.predictor_hidden is None else self.predictor_hidden

    @property
    def passes_per_batch(self) -> int:
        """One for each pair of views."""
        return self.pairs

    @property
    def memory_place(self) -> Literal["ram", "disk"]:
        """As --target-memory says."""
        return self.target_memory

    def identity(self) -> dict[str, Any]:
        """Named as in the first checkpoints, which hold no other method, and in which switches of later are absent."""
        fields = {f"model.{name}": value for name, value in asdict(self).items()}
        fields["model.predictor_hidden"] = self.predictor_width
        fields["optim.predictor_lr"] = fields.pop("model.predictor_lr")
        del fields["model.target_memory"]
        for name in NEWER_SWITCHES:
            if getattr(self, name) == getattr(SimSiamConfig, name):
                del fields[f"model.{name}"]
        return fields


class SimSiamOutput(NamedTuple):
    """Predictions and projections of both views, each ``[n, dim]``; z is detached unless ``stop_gradient`` is off."""

    p1: Tensor
    p2: Tensor
    z1: Tensor
    z2: Tensor


class SimSiam(Method):
    """``backbone`` and ``projector`` are the paper's encoder f, ``predictor`` is h."""

    config: SimSiamConfig
    capturable = True

    def __init__(self, config: SimSiamConfig) -> None:
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
        self.frozen = Teacher(self._encoder()) if config.targets == "frozen" else None
        self.memory_dim = config.dim if config.targets == "moving-average" else None

    def forward(  # type: ignore[override]  # the method alone is called with its two views
        self, views: list[Tensor] | Tensor, info: StepInfo | Tensor
    ) -> MethodOutput | SimSiamOutput:
        """The loss of a pass over two views; or, of two tensors ``[n, 3, h, w]``, predictions and projections."""
        if isinstance(info, Tensor):
            assert isinstance(views, Tensor)
            return self.predict(views, info)
        x1, x2 = views
        out = self.predict(x1, x2)
        target1, target2, memory = self._targets(out, [x1, x2], info)
        loss = simsiam_loss(out.p1, out.p2, target1, target2, self.config.similarity, self.config.symmetric)
        return MethodOutput(loss, out.z1.detach(), {"z_std": mean_z_std([out.z1, out.z2])}, memory)

    def predict(self, x1: Float[Tensor, "n c h w"], x2: Float[Tensor, "n c h w"]) -> SimSiamOutput:
        """Both views through encoder and predictor. BN takes its statistics of each view alone (official code)."""
        z1, z2 = encode(self._encoder(), [x1, x2])
        p1, p2 = encode(self.predictor, [z1, z2])
        if self.config.stop_gradient:
            z1, z2 = z1.detach(), z2.detach()
        return SimSiamOutput(p1, p2, z1, z2)

    def parameter_groups(self) -> list[ParamGroup]:
        """Encoder and predictor, so that their rates can differ; weight decay on everything (section 3)."""
        predictor = trained(self.predictor)
        apart = {id(parameter) for parameter in predictor}
        encoder = [parameter for parameter in trained(self) if id(parameter) not in apart]
        groups = [
            ParamGroup("encoder", encoder),
            ParamGroup("predictor", predictor, constant_lr=self.config.predictor_lr == "constant"),
        ]
        return [group for group in groups if group.params]

    def before_step(self, info: StepInfo) -> None:
        """Renew the frozen copy when it is due."""
        if self.frozen is not None:
            steps = info.steps_per_epoch if self.config.target_steps == "epoch" else self.config.target_steps
            self.frozen.copy_every(self._encoder(), int(info.step), steps)

    def collapse(self, batch: BatchShape) -> CollapseProfile:
        """What is unlike the paper's recipe comes first among the causes."""
        config, causes = self.config, []
        if not config.stop_gradient:
            causes.append("the stop-gradient is off (--no-stop-gradient)")
        if config.predictor != "mlp":
            causes.append(f"there is no trained predictor (--predictor {config.predictor})")
        if config.projector_bn == "none":
            causes.append("the heads have no batch norm (--projector-bn none)")
        if config.projector_bn == "all":
            return CollapseProfile(config.dim, least_share, tuple(causes))
        return CollapseProfile(config.dim, causes=tuple(causes))

    def _encoder(self) -> nn.Sequential:
        return nn.Sequential(self.backbone, self.projector)

    def _targets(self, out: SimSiamOutput, views: list[Tensor], info: StepInfo) -> tuple[Tensor, Tensor, Tensor | None]:
        """Targets of p2 and p1, and what to remember of these images."""
        match self.config.targets:
            case "encoder":
                return out.z1, out.z2, None
            case "frozen":
                assert self.frozen is not None
                z1, z2 = encode(self.frozen, views)
                return z1, z2, None
            case "moving-average":
                assert info.memory is not None
                return averaged_targets(self.config, out.z1, out.z2, info.memory)
            case unreachable:
                assert_never(unreachable)


@torch.no_grad()
def averaged_targets(
    config: SimSiamConfig, z1: Float[Tensor, "n d"], z2: Float[Tensor, "n d"], past: Float[Tensor, "n d"]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """The targets of section 5.2's "expectation over augmentations", and the images' new averages eta; float32.

    ``eta_x <- m eta_x + (1 - m) F(T'(x))``; the other view is drawn to it, with no predictor between. Where the loss is
    symmetric, each view's target leaves its own projection out, and eta becomes the mean of both. A row of zeros in
    ``past`` means an image without a past: its first target is F(T'(x)). A projection that is not finite is not
    remembered.
    """
    momentum = config.target_momentum * past.ne(0).any(dim=1, keepdim=True)
    target1, target2 = (momentum * past + (1 - momentum) * wide(z.detach()) for z in (z1, z2))
    eta = (target1 + target2) / 2 if config.symmetric else target2
    return target1, target2, torch.where(eta.isfinite().all(dim=1, keepdim=True), eta, past)


def simsiam_loss(
    p1: Float[Tensor, "n d"],
    p2: Float[Tensor, "n d"],
    z1: Float[Tensor, "n d"],
    z2: Float[Tensor, "n d"],
    similarity: Similarity = "cosine",
    symmetric: bool = True,
) -> Float[Tensor, ""]:
    """Equation 2: ``D(p1, z2) / 2 + D(p2, z1) / 2``, or ``D(p1, z2)`` alone; float32 even under autocast.

    Gradients flow through z as well; ``SimSiam`` detaches it.
    """
    with torch.autocast(p1.device.type, enabled=False):
        loss = negative_similarity(wide(p1), wide(z2), similarity)
        if not symmetric:
            return loss
        return loss / 2 + negative_similarity(wide(p2), wide(z1), similarity) / 2


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
