"""Batch norm over the batches of all ranks, and of each view by itself where views share one pass.

``prepare_batch_norm(model, ...)`` puts ``SyncBatchNorm`` in the place of torch's layers; ``encode(module, views)`` then
takes several views through a module in one pass. Chen & He 2020, section 3, synchronise batch norm over the GPUs; the
official code takes one pass for each view, with batch statistics of its own.

torch.nn.SyncBatchNorm makes the host wait for the GPU at every layer of every pass, to leave out ranks without samples.
Here all ranks have equally many samples. torch's layer has no CPU kernels; this one has plain arithmetic, which is also
what torch.compile traces and fuses with the ReLU that follows.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.distributed as td
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PerChannel = Float[Tensor, " c"]
PerView = Float[Tensor, "views c"]

_TORCH_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of ``[views x n, c, ...]`` with the statistics of each view, over the batches of all ranks.

    Ranks must have equally many samples. Running statistics move once for each view, in the order of the views.
    Outside of training, and for one view on one process, this is torch's own batch norm.
    """

    over_ranks = True  # statistics of all ranks' batches; off: of this rank's
    one_pass = True  # ``encode`` may take several views at a time
    views = 1  # that lie one after the other in the batch; ``encode`` sets it

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input, in its shape and dtype."""
        ranks = td.get_world_size() if self.over_ranks and td.is_initialized() else 1
        if not self.training or (ranks == 1 and self.views == 1):
            return super().forward(input)
        if ranks == 1 and not (input.is_cuda and not torch.compiler.is_compiling()):
            return torch.cat([self._of_one_view(part) for part in input.chunk(self.views)])
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.views == 1:
            self._count()
        shape = _Shape(self.views, ranks, self.eps, self.momentum)
        running = self.running_mean, self.running_var
        if input.is_cuda and not torch.compiler.is_compiling():
            return _Fused.apply(input, self.weight, self.bias, *running, shape)
        output, means, variances = _Traceable.apply(input, self.weight, self.bias, self.views, ranks, self.eps)
        values = ranks * (input.numel() // input.shape[1] // self.views)
        with torch.no_grad():
            for mean, variance in zip(means.unbind(), variances.unbind(), strict=True):
                running[0].lerp_(mean, self.momentum)
                running[1].lerp_(variance * (values / (values - 1)), self.momentum)  # unbiased, as torch keeps it
        return output

    def _of_one_view(self, part: Tensor) -> Tensor:
        """As torch's layer, without counting: ``encode`` counts."""
        assert self.momentum is not None
        running = self.running_mean, self.running_var
        return nn.functional.batch_norm(part, *running, self.weight, self.bias, True, self.momentum, self.eps)

    def _count(self) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)

    def _check_input_dim(self, input: Tensor) -> None:
        """Images and vectors alike."""


class SyncBatchNormAct(SyncBatchNorm):
    """The same with dropout and activation after it, as timm's BatchNormAct2d has them as children."""

    def forward(self, input: Tensor) -> Tensor:
        """The activations, in the input's shape and dtype."""
        return self.act(self.drop(super().forward(input)))  # type: ignore[operator]


def prepare_batch_norm(module: nn.Module, *, over_ranks: bool = True, one_pass: bool = True) -> nn.Module:
    """``module`` with a SyncBatchNorm in place of each batch norm, of the same weights and buffers; in place.

    Args:
        module: its state_dict keeps names, order and memory.
        over_ranks: take statistics over the batches of all ranks.
        one_pass: let ``encode`` take several views through it at a time. A layer of a kind that is not known here stays
            as it is where it need not be replaced for ``over_ranks``; ``encode`` then takes one view after the other.

    Raises:
        ValueError: a layer of an unknown kind would have to be replaced for ``over_ranks``.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        kind = _kind(module)
        if kind is None and over_ranks:
            name = f"{type(module).__module__}.{type(module).__qualname__}"
            raise ValueError(f"the layer {name}, {module}, cannot take its statistics over ranks")
        return module if kind is None else _converted(module, kind, over_ranks, one_pass)
    for name, child in module.named_children():
        setattr(module, name, prepare_batch_norm(child, over_ranks=over_ranks, one_pass=one_pass))
    return module


def synchronise(module: nn.Module) -> nn.Module:
    """``module`` with batch norm over all ranks; in place."""
    return prepare_batch_norm(module)


def _kind(layer: nn.modules.batchnorm._BatchNorm) -> type[SyncBatchNorm] | None:
    """What can take the layer's place; None if nothing here can."""
    if layer.momentum is None or not layer.track_running_stats:
        return None
    if isinstance(layer, SyncBatchNorm):
        return type(layer)
    if type(layer) in _TORCH_LAYERS:
        return SyncBatchNorm
    if {name for name, _ in layer.named_children()} == {
        "drop",
        "act",
    }:  # timm's BatchNormAct2d, and what derives from it
        return SyncBatchNormAct
    return None


def _converted(
    layer: nn.modules.batchnorm._BatchNorm, kind: type[SyncBatchNorm], over_ranks: bool, one_pass: bool
) -> SyncBatchNorm:
    made = kind(layer.num_features, layer.eps, layer.momentum, layer.affine)
    made._parameters, made._buffers, made.training = layer._parameters, layer._buffers, layer.training
    made._modules.update(layer._modules)
    made.over_ranks, made.one_pass = over_ranks, one_pass
    return made


def encode(module: nn.Module, views: list[Tensor]) -> list[Tensor]:
    """What ``module`` makes of each view, in one pass over all of them where that gives the same.

    Args:
        module: the samples of a batch meet in its batch norm only.
        views: images ``[n, 3, h, w]``, or rows ``[n, d]``.

    Returns:
        Rows ``[n, d]`` of each view. In training the batch statistics are those of each view by itself (SimSiam, BYOL),
        and running statistics move once for each view, in their order. Views take passes of their own outside of
        training, where they differ in shape, and where ``prepare_batch_norm`` has not prepared the layers or has ruled
        one pass out.
    """
    layers = list(module.modules())
    norms = [layer for layer in layers if _takes_statistics(layer)]
    ours = [layer for layer in norms if isinstance(layer, SyncBatchNorm) and layer.one_pass]
    alike = len(ours) == len(norms) and len({view.shape for view in views}) == 1
    if len(views) == 1 or not alike or not all(layer.training for layer in layers):
        return [module(view) for view in views]
    for layer in ours:
        layer.views = len(views)
    try:
        output = module(torch.cat(views))
    finally:
        for layer in ours:
            layer.views = 1
    if ours:  # one kernel instead of one for each layer
        counters = [layer.num_batches_tracked for layer in ours if layer.num_batches_tracked is not None]
        torch._foreach_add_(counters, len(views))
    return list(output.chunk(len(views)))


def _takes_statistics(layer: nn.Module) -> bool:
    """Whether samples of a batch meet in the layer: a batch norm of torch's, of ours, or of another library."""
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) or layer._buffers.get("running_var") is not None


class _Shape(NamedTuple):
    """What ``_Fused`` needs to know besides tensors."""

    views: int
    ranks: int
    eps: float
    momentum: float


def _all_ranks(values: Tensor, ranks: int) -> Tensor:
    """``[ranks, ...]``: the values of each rank."""
    if ranks == 1:
        return values[None]
    gathered = torch.ops._c10d_functional.all_gather_into_tensor(values, ranks, _group_name())
    return torch.ops._c10d_functional.wait_tensor(gathered).unflatten(0, (ranks, -1))


def _sum_over_ranks(values: Tensor, ranks: int) -> Tensor:
    if ranks == 1:
        return values
    total = torch.ops._c10d_functional.all_reduce(values, "sum", _group_name())
    return torch.ops._c10d_functional.wait_tensor(total)


def _group_name() -> str:
    """Of all processes. The functional collectives take a name; unlike torch.distributed's, the compiler knows them."""
    assert td.group.WORLD is not None
    return td.group.WORLD.group_name


class _Traceable(torch.autograd.Function):
    """Forward: statistics of each rank, gathered and merged. Backward: two sums of each rank, added up.

    Plain arithmetic: for CPUs, for torch.compile, and the reference of ``_Fused``.
    """

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        weight: PerChannel | None,
        bias: PerChannel | None,
        views: int,
        ranks: int,
        eps: float,
    ) -> tuple[Tensor, PerView, PerView]:
        """Output, means and (biased) variances."""
        wide = _wide(x)
        variance, mean = torch.var_mean(_parted(wide, views), _over(x), correction=0)
        means, variances = _all_ranks(torch.stack((mean, variance)), ranks).unbind(dim=1)
        mean = means.mean(dim=0)
        variance = (variances + (means - mean) ** 2).mean(dim=0)
        inverse_std = (variance + eps).rsqrt()
        context.save_for_backward(x, mean, inverse_std, weight)
        context.views, context.ranks, context.has_bias = views, ranks, bias is not None
        context.mark_non_differentiable(mean, variance)
        made = (wide - _spread(mean, x)) * _spread(inverse_std if weight is None else inverse_std * weight, x)
        made = made if bias is None else made + _spread(bias[None], x)
        return _as(made, x.dtype), mean, variance

    @staticmethod
    def backward(context: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, mean, inverse_std, weight = context.saved_tensors
        slope, centred = _wide(gradient), _wide(x) - _spread(mean, x)
        own = torch.stack([_parted(v, context.views).sum(_over(x)) for v in (slope, slope * centred)])
        values = context.ranks * (x.numel() // mean.numel())
        total, times_centred = (_sum_over_ranks(own, context.ranks) / values).unbind()
        made = slope - _spread(total, x) - centred * _spread(inverse_std**2 * times_centred, x)
        made = made * _spread(inverse_std if weight is None else inverse_std * weight, x)
        # DDP averages the gradients of the weights.
        of_weight = None if weight is None else (own[1] * inverse_std).sum(dim=0)
        of_bias = own[0].sum(dim=0) if context.has_bias else None
        return _as(made, x.dtype), of_weight, of_bias, None, None, None


class _Fused(torch.autograd.Function):
    """The same with the kernels of torch's own SyncBatchNorm: for a GPU without torch.compile."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        weight: PerChannel | None,
        bias: PerChannel | None,
        running_mean: PerChannel,
        running_var: PerChannel,
        shape: _Shape,
    ) -> Tensor:
        x = _dense(x)
        parts = x.chunk(shape.views)
        values = parts[0].numel() // x.shape[1]
        own = torch.stack([value for part in parts for value in torch.batch_norm_stats(part, shape.eps)])
        gathered = _all_ranks(own.view(shape.views, 2, -1), shape.ranks)  # [ranks, views, mean and 1 / std, c]
        counts = _counts(shape.ranks, values, own.dtype, x.device)
        running = running_mean, running_var, shape.momentum, shape.eps
        output, merged = torch.empty_like(x), []
        for view, (part, out) in enumerate(zip(parts, output.chunk(shape.views), strict=True)):
            mean, inverse_std = gathered[:, view].unbind(dim=1)
            merged.append(torch.batch_norm_gather_stats_with_counts(part, mean, inverse_std, *running, counts))
            # Written where it belongs: a concatenation would read and write all activations once more.
            torch.ops.aten.batch_norm_elemt.out(part, weight, bias, *merged[-1], shape.eps, out=out)
        context.save_for_backward(x, weight, *(value for both in merged for value in both))
        context.shape, context.has_bias = shape, bias is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, *merged), shape = context.saved_tensors, context.shape
        parts, slopes = x.chunk(shape.views), _dense(gradient).chunk(shape.views)
        statistics = list(zip(merged[::2], merged[1::2], strict=True))
        sums = [
            torch.batch_norm_backward_reduce(slope, part, *both, weight, True, weight is not None, context.has_bias)
            for slope, part, both in zip(slopes, parts, statistics, strict=True)
        ]
        own = torch.stack([value for total, times_centred, *_ in sums for value in (total, times_centred)])
        totals = _sum_over_ranks(own, shape.ranks).view(shape.views, 2, -1)
        counts = _counts(shape.ranks, parts[0].numel() // x.shape[1], torch.int32, x.device)
        made = [
            torch.batch_norm_backward_elemt(slope, part, *both, weight, total, times_centred, counts)
            for slope, part, both, (total, times_centred) in zip(slopes, parts, statistics, totals, strict=True)
        ]
        # DDP averages the gradients of the weights.
        of_weight, of_bias = (_added([of[index] for of in sums]) for index in (2, 3))
        return (made[0] if len(made) == 1 else torch.cat(made)), of_weight, of_bias, None, None, None


def _added(parts: list[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None and part.numel() > 0]
    return sum(tensors[1:], tensors[0]) if tensors else None


@cache
def _counts(ranks: int, values: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``values`` of a channel on each rank; made once for each size of a layer's input."""
    return torch.full((ranks,), values, dtype=dtype, device=device)


def _dense(x: Tensor) -> Tensor:
    """Channels-last, or contiguous: what the kernels take."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _parted(x: Tensor, views: int) -> Tensor:
    """``[views x n, c, ...]`` as ``[views, n, c, ...]``."""
    return x.unflatten(0, (views, -1))


def _over(x: Tensor) -> list[int]:
    """All dimensions of ``[views, n, c, ...]`` but the views' and the channels', where x is ``[views x n, c, ...]``."""
    return [1, *range(3, x.dim() + 1)]


def _spread(values: PerView, x: Tensor) -> Tensor:
    """Values of each view for each of its samples: ``[views x n, c, 1, ...]``, or ``[1, c, 1, ...]`` of one view."""
    rows = values if len(values) == 1 else values.repeat_interleave(len(x) // len(values), dim=0)
    return rows.unflatten(1, (-1, *[1] * (x.dim() - 2)))


def _wide(x: Tensor) -> Tensor:
    """float32 where the input is narrower."""
    return x if x.dtype == torch.float64 else _as(x, torch.float32)


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in another format. torch 2.11 compiles a conversion that converts nothing to one without a gradient."""
    return x if x.dtype == dtype else x.to(dtype)
