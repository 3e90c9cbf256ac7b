"""Owns batch norm over all ranks: one mean and variance for the whole batch (Chen & He 2020, section 3).

torch.nn.SyncBatchNorm lets the host wait for the GPU at every layer of every pass, to leave out ranks without samples;
ResNet-50 with its heads has 57 layers, passed twice a step. Here all ranks have equally many samples, so nothing has to
be looked at. torch's has no CPU part either; this one has, and so a run gives the same losses on any number of
processes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as td
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PerChannel = Float[Tensor, " c"]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of ``[n, c, ...]`` over the batches of all ranks, which must be equally large.

    Outside of training, and where there is one process, torch's own batch norm.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalised; the same shape and dtype."""
        if not (self.training and td.is_initialized() and td.get_world_size() > 1):
            return super().forward(input)
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return _synchronised(
            input, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum
        )

    def _check_input_dim(self, input: Tensor) -> None:
        """Images and vectors alike."""


def synchronise(module: nn.Module) -> nn.Module:
    """``module`` with a SyncBatchNorm in place of each batch norm, of the same weights and statistics; in place."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        made = SyncBatchNorm(
            module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
        )
        made._parameters, made._buffers, made.training = module._parameters, module._buffers, module.training
        return made
    for name, child in module.named_children():
        setattr(module, name, synchronise(child))
    return module


@torch.compiler.disable  # the compiler does not know the kernels; and torch 2.11's gives the weights no gradient
def _synchronised(*arguments: Any) -> Tensor:
    return _Synchronised.apply(*arguments)


class _Layer(NamedTuple):
    """A layer's own values."""

    weight: PerChannel | None
    bias: PerChannel | None
    running_mean: PerChannel
    running_var: PerChannel
    eps: float
    momentum: float


class _Seen(NamedTuple):
    """What the backward pass needs of the forward pass."""

    x: Tensor  # of this rank
    mean: PerChannel  # over all ranks, as is what follows
    inverse_std: PerChannel
    counts: Float[Tensor, " ranks"]  # values of a channel on each rank
    weight: PerChannel | None = None


class _Sums(NamedTuple):
    """What the backward pass adds up over one rank's samples."""

    gradient: PerChannel
    gradient_times_centred: PerChannel  # gradient x (input - mean)
    weight: PerChannel | None  # the gradient of the weight; None without one
    bias: PerChannel | None


class _Synchronised(torch.autograd.Function):
    """Forward: statistics of each rank, gathered and merged. Backward: two sums of each rank, added up."""

    @staticmethod
    def forward(context: Any, x: Tensor, *of_layer: Any) -> Tensor:
        x, layer = _dense(x), _Layer(*of_layer)
        kernels = _Cuda if x.is_cuda else _Plain
        own = torch.stack(kernels.statistics(x, layer))
        gathered = own.new_empty((td.get_world_size() * 2, own.shape[1]))
        td.all_gather_into_tensor(gathered, own)
        means, inverse_stds = gathered.unflatten(0, (-1, 2)).unbind(dim=1)
        counts = torch.full((len(means),), x.numel() // x.shape[1], dtype=own.dtype, device=x.device)
        merged = kernels.merge(x, means, inverse_stds, counts, layer)
        context.save_for_backward(x, *merged, counts, *([] if layer.weight is None else [layer.weight]))
        return kernels.normalise(x, *merged, layer)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient, seen = _dense(gradient), _Seen(*context.saved_tensors)
        kernels = _Cuda if gradient.is_cuda else _Plain
        sums = kernels.sums(gradient, seen)
        total = torch.stack((sums.gradient, sums.gradient_times_centred))
        td.all_reduce(total)
        # DDP averages the gradients of the weights.
        return kernels.grad_input(gradient, seen, *total), sums.weight, sums.bias, None, None, None, None


class _Cuda:
    """The kernels of torch's own SyncBatchNorm."""

    @staticmethod
    def statistics(x: Tensor, layer: _Layer) -> tuple[PerChannel, PerChannel]:
        """Mean and 1 / sqrt(variance + eps) of this rank, float32."""
        return torch.batch_norm_stats(x, layer.eps)

    @staticmethod
    def merge(
        x: Tensor, means: Tensor, inverse_stds: Tensor, counts: Tensor, layer: _Layer
    ) -> tuple[PerChannel, PerChannel]:
        """Those of all ranks; the running statistics are moved."""
        running = (layer.running_mean, layer.running_var, layer.momentum, layer.eps)
        return torch.batch_norm_gather_stats_with_counts(x, means, inverse_stds, *running, counts)

    @staticmethod
    def normalise(x: Tensor, mean: PerChannel, inverse_std: PerChannel, layer: _Layer) -> Tensor:
        """The output."""
        return torch.batch_norm_elemt(x, layer.weight, layer.bias, mean, inverse_std, layer.eps)

    @staticmethod
    def sums(gradient: Tensor, seen: _Seen) -> _Sums:
        """Those of this rank."""
        affine = seen.weight is not None
        total, times_centred, *of_weights = torch.batch_norm_backward_reduce(
            gradient, seen.x, seen.mean, seen.inverse_std, seen.weight, True, affine, affine
        )
        return _Sums(total, times_centred, *(of_weights if affine else (None, None)))

    @staticmethod
    def grad_input(gradient: Tensor, seen: _Seen, total: PerChannel, times_centred: PerChannel) -> Tensor:
        """The gradient of the input, from the sums over all ranks."""
        x, mean, inverse_std, counts, weight = seen
        return torch.batch_norm_backward_elemt(
            gradient, x, mean, inverse_std, weight, total, times_centred, counts.to(torch.int32)
        )


class _Plain:
    """The same in torch's arithmetic: for CPUs, and what the kernels are tested against."""

    @staticmethod
    def statistics(x: Tensor, layer: _Layer) -> tuple[PerChannel, PerChannel]:
        """As _Cuda's."""
        variance, mean = torch.var_mean(_wide(x), _over(x), correction=0)
        return mean, (variance + layer.eps).rsqrt()

    @staticmethod
    def merge(
        x: Tensor, means: Tensor, inverse_stds: Tensor, counts: Tensor, layer: _Layer
    ) -> tuple[PerChannel, PerChannel]:
        """As _Cuda's."""
        share = (counts / counts.sum())[:, None]
        mean = (means * share).sum(dim=0)
        variance = ((inverse_stds**-2 - layer.eps + (means - mean) ** 2) * share).sum(dim=0)
        unbiased = variance * counts.sum() / (counts.sum() - 1)  # as torch keeps it
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(unbiased, layer.momentum)
        return mean, (variance + layer.eps).rsqrt()

    @staticmethod
    def normalise(x: Tensor, mean: PerChannel, inverse_std: PerChannel, layer: _Layer) -> Tensor:
        """As _Cuda's."""
        scale = inverse_std if layer.weight is None else inverse_std * layer.weight
        made = (_wide(x) - _spread(mean, x)) * _spread(scale, x)
        return (made if layer.bias is None else made + _spread(layer.bias, x)).to(x.dtype)

    @staticmethod
    def sums(gradient: Tensor, seen: _Seen) -> _Sums:
        """As _Cuda's."""
        x = seen.x
        total = _wide(gradient).sum(_over(x))
        times_centred = (_wide(gradient) * (_wide(x) - _spread(seen.mean, x))).sum(_over(x))
        if seen.weight is None:
            return _Sums(total, times_centred, None, None)
        return _Sums(total, times_centred, times_centred * seen.inverse_std, total)

    @staticmethod
    def grad_input(gradient: Tensor, seen: _Seen, total: PerChannel, times_centred: PerChannel) -> Tensor:
        """As _Cuda's."""
        x, mean, inverse_std, counts, weight = seen
        scale = inverse_std if weight is None else inverse_std * weight
        slope = inverse_std**2 * times_centred / counts.sum()
        centred = (_wide(x) - _spread(mean, x)) * _spread(slope, x)
        made = (_wide(gradient) - _spread(total / counts.sum(), x) - centred) * _spread(scale, x)
        return made.to(x.dtype)


def _dense(x: Tensor) -> Tensor:
    """Channels-last, or contiguous: what the kernels take."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _over(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [dimension for dimension in range(x.dim()) if dimension != 1]


def _spread(values: PerChannel, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _wide(x: Tensor) -> Tensor:
    """float32 where the input is narrower."""
    return x if x.dtype == torch.float64 else x.float()
