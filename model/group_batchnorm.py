"""Batch norm over groups of a fixed number of images, which does not depend on the number of ranks (MoCo v2).

MoCo takes batch statistics on each GPU, 32 images at a time, and shuffles the key batch over the GPUs, so that a query
and its key have different companions: their common statistics would give the positive away (He et al. 2020, section
3.3; one mean over all ranks does not help). Here a group is 32 images wherever they are:

- the student's groups are images in a row, which one rank holds: nothing is exchanged;
- the teacher's groups are strided, image i of a pass over all ranks belonging to group i mod the number of groups. So
  each has equally many images of every group of the student, as a shuffled batch has on average, and no group of the
  teacher is one of the student's. The order of the samples is random already.

No image moves between ranks: each rank adds up its part of every group, and the ranks add up a table of
[2, groups, channels] in float64 at each batch norm of the teacher, which needs no gradient. The other way without
moving images, a loader that hands each rank the key views of a permuted batch, needs no collective before the keys are
gathered; but a rank would then decode other images for its keys than for its queries, each image twice. Here every
image is decoded once, at the price of one small sum over the ranks for each of these layers and passes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from model.embedding_stats import wide
from model.gather import rank_and_world, sum_over_ranks
from pipeline.common.errors import UserError

Kind = Literal["in a row", "strided"]
TORCH_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class GroupBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of ``[n, c, ...]`` over groups of ``images`` samples; outside of training torch's own.

    The running statistics move in ``update_running_statistics``, by the mean over the groups of a whole step.
    """

    images: int
    kind: Kind
    seen: list[Float[Tensor, "2 c"]]  # mean and unbiased variance of each pass since the last update

    def forward(self, input: Tensor) -> Tensor:
        """Normalised; the same shape and dtype."""
        if not self.training:
            made = super().forward(input)
        else:
            made = self._in_a_row(input) if self.kind == "in a row" else self._strided(input)
        for child in self.children():  # dropout and activation of timm's layers
            made = child(made)
        return made

    def _in_a_row(self, x: Tensor) -> Tensor:
        assert len(x) % self.images == 0, "checked by the method's configuration"
        made, statistics = [], []
        for part in x.split(self.images):
            # Their momentum of 1 leaves the group's own statistics in these.
            mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)  # type: ignore[arg-type]
            made.append(F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps))
            statistics.append(torch.stack((mean, variance)))
        self.seen.append(torch.stack(statistics).mean(dim=0))
        return torch.cat(made)

    @torch.no_grad()
    def _strided(self, x: Tensor) -> Tensor:
        rank, world = rank_and_world()
        groups = len(x) * world // self.images
        group = (torch.arange(len(x), device=x.device) + rank * len(x)) % groups
        pixels = wide(x).flatten(2) if x.dim() > 2 else wide(x)[..., None]
        variance, mean = torch.var_mean(pixels, dim=2, correction=0)  # of each image
        # In float64, as the mean square less the squared mean loses digits.
        sums = torch.stack((mean, variance + mean.square())).double()
        table = torch.zeros((2, groups, x.shape[1]), dtype=torch.float64, device=x.device).index_add_(1, group, sums)
        mean, square = sum_over_ranks(table) / self.images
        variance = square - mean.square()
        count = self.images * pixels.shape[2]
        self.seen.append(torch.stack((mean.mean(dim=0), variance.mean(dim=0) * count / (count - 1))).to(pixels.dtype))
        scale = (variance + self.eps).rsqrt() * (1.0 if self.weight is None else self.weight)
        shift = (0.0 if self.bias is None else self.bias) - mean * scale
        scale, shift = (
            part.to(pixels.dtype)[group].view(*x.shape[:2], *[1] * (x.dim() - 2)) for part in (scale, shift)
        )
        return (wide(x) * scale + shift).to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Images and vectors alike."""


def group_batch_norm(module: nn.Module, images: int, kind: Kind) -> nn.Module:
    """``module`` with a GroupBatchNorm in place of each batch norm, of the same weights and statistics; in place."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if module.momentum is None or not (type(module) in TORCH_LAYERS or set(module._modules) == {"drop", "act"}):
            raise UserError(f"batch norm in groups cannot take the place of {module}: take another --backbone")
        made = GroupBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        made._parameters, made._buffers, made.training = module._parameters, module._buffers, module.training
        made._modules.update(module._modules)
        made.images, made.kind, made.seen = images, kind, []
        return made
    for name, child in module.named_children():
        setattr(module, name, group_batch_norm(child, images, kind))
    return module


@torch.no_grad()
def update_running_statistics(module: nn.Module, applied: Shaped[Tensor, ""]) -> None:
    """Move the running statistics by the mean over all groups of this step, on all ranks, and forget them.

    ``applied`` is 0 where the step was skipped; then nothing moves. A collective.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, GroupBatchNorm) and layer.seen]
    if not layers:
        return
    _, world = rank_and_world()
    seen = torch.cat([torch.stack(layer.seen).mean(dim=0) for layer in layers], dim=1)
    parts = (sum_over_ranks(seen) / world).split([layer.num_features for layer in layers], dim=1)
    for layer, (mean, variance) in zip(layers, parts, strict=True):
        assert layer.momentum is not None
        assert layer.num_batches_tracked is not None
        for running, now in ((layer.running_mean, mean), (layer.running_var, variance)):
            assert running is not None
            running.copy_(torch.where(applied.bool(), running.lerp(now, layer.momentum), running))
        layer.num_batches_tracked.add_(applied.to(torch.int64))
        layer.seen = []
