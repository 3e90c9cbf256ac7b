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
        """Pictures and vectors alike."""


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


class _Synchronised(torch.autograd.Function):
    """Forward: statistics of each rank, gathered and merged. Backward: two sums of each rank, added up."""

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        weight: PerChannel | None,
        bias: PerChannel | None,
        running_mean: PerChannel,
        running_var: PerChannel,
        eps: float,
        momentum: float,
    ) -> Tensor:
        x = _dense(x)
        kernels = _Cuda if x.is_cuda else _Plain
        own = torch.stack(kernels.statistics(x, eps))
        gathered = own.new_empty((td.get_world_size() * 2, own.shape[1]))
        td.all_gather_into_tensor(gathered, own)
        means, inverse_stds = gathered.unflatten(0, (-1, 2)).unbind(dim=1)
        counts = torch.full((len(means),), x.numel() // x.shape[1], dtype=own.dtype, device=x.device)
        merged = kernels.merge(x, means, inverse_stds, counts, running_mean, running_var, momentum, eps)
        context.save_for_backward(x, *merged, counts, *([] if weight is None else [weight]))
        return kernels.normalise(x, weight, bias, *merged, eps)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inverse_std, counts, *weights = context.saved_tensors
        weight = weights[0] if weights else None
        kernels = _Cuda if x.is_cuda else _Plain
        gradient = _dense(gradient)
        sums = kernels.sums(gradient, x, mean, inverse_std, weight)
        total = torch.stack((sums.gradient, sums.gradient_times_centred))
        td.all_reduce(total)
        sum_gradient, sum_times_centred = total
        grad_input = kernels.grad_input(gradient, x, mean, inverse_std, weight, sum_gradient, sum_times_centred, counts)
        return grad_input, sums.weight, sums.bias, None, None, None, None  # DDP averages those of the weights


@torch.compiler.disable  # the compiler does not know the kernels; and torch 2.11's gives the weights no gradient
def _synchronised(*arguments: Any) -> Tensor:
    return _Synchronised.apply(*arguments)


class _Sums(NamedTuple):
    """What the backward pass adds up over one rank's samples."""

    gradient: PerChannel
    gradient_times_centred: PerChannel  # gradient x (input - mean)
    weight: PerChannel | None  # the gradient of the weight; None without one
    bias: PerChannel | None


class _Cuda:
    """The kernels of torch's own SyncBatchNorm."""

    @staticmethod
    def statistics(x: Tensor, eps: float) -> tuple[PerChannel, PerChannel]:
        """Mean and 1 / sqrt(variance + eps) of this rank, float32."""
        return torch.batch_norm_stats(x, eps)

    @staticmethod
    def merge(
        x: Tensor,
        means: Tensor,
        inverse_stds: Tensor,
        counts: Tensor,
        running_mean: PerChannel,
        running_var: PerChannel,
        momentum: float,
        eps: float,
    ) -> tuple[PerChannel, PerChannel]:
        """Those of all ranks; the running statistics are moved."""
        return torch.batch_norm_gather_stats_with_counts(
            x, means, inverse_stds, running_mean, running_var, momentum, eps, counts
        )

    @staticmethod
    def normalise(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse_std: Tensor, eps: float
    ) -> Tensor:
        """The output."""
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)

    @staticmethod
    def sums(gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor | None) -> _Sums:
        """Those of this rank."""
        affine = weight is not None
        total, times_centred, *of_weights = torch.batch_norm_backward_reduce(
            gradient, x, mean, inverse_std, weight, True, affine, affine
        )
        return _Sums(total, times_centred, *(of_weights if affine else (None, None)))

    @staticmethod
    def grad_input(
        gradient: Tensor,
        x: Tensor,
        mean: Tensor,
        inverse_std: Tensor,
        weight: Tensor | None,
        sum_gradient: Tensor,
        sum_times_centred: Tensor,
        counts: Tensor,
    ) -> Tensor:
        """The gradient of the input."""
        return torch.batch_norm_backward_elemt(
            gradient, x, mean, inverse_std, weight, sum_gradient, sum_times_centred, counts.to(torch.int32)
        )


class _Plain:
    """The same in torch's arithmetic: for CPUs, and what the kernels are tested against."""

    @staticmethod
    def statistics(x: Tensor, eps: float) -> tuple[PerChannel, PerChannel]:
        """As _Cuda's."""
        variance, mean = torch.var_mean(_wide(x), _over(x), correction=0)
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def merge(
        x: Tensor,
        means: Tensor,
        inverse_stds: Tensor,
        counts: Tensor,
        running_mean: PerChannel,
        running_var: PerChannel,
        momentum: float,
        eps: float,
    ) -> tuple[PerChannel, PerChannel]:
        """As _Cuda's."""
        share = (counts / counts.sum())[:, None]
        mean = (means * share).sum(dim=0)
        variance = ((inverse_stds**-2 - eps + (means - mean) ** 2) * share).sum(dim=0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(variance * counts.sum() / (counts.sum() - 1), momentum)  # unbiased, as torch keeps it
        return mean, (variance + eps).rsqrt()

    @staticmethod
    def normalise(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, inverse_std: Tensor, eps: float
    ) -> Tensor:
        """As _Cuda's."""
        scale = inverse_std if weight is None else inverse_std * weight
        made = (_wide(x) - _spread(mean, x)) * _spread(scale, x)
        return (made if bias is None else made + _spread(bias, x)).to(x.dtype)

    @staticmethod
    def sums(gradient: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor | None) -> _Sums:
        """As _Cuda's."""
        total = _wide(gradient).sum(_over(x))
        times_centred = (_wide(gradient) * (_wide(x) - _spread(mean, x))).sum(_over(x))
        if weight is None:
            return _Sums(total, times_centred, None, None)
        return _Sums(total, times_centred, times_centred * inverse_std, total)

    @staticmethod
    def grad_input(
        gradient: Tensor,
        x: Tensor,
        mean: Tensor,
        inverse_std: Tensor,
        weight: Tensor | None,
        sum_gradient: Tensor,
        sum_times_centred: Tensor,
        counts: Tensor,
    ) -> Tensor:
        """As _Cuda's."""
        scale = inverse_std if weight is None else inverse_std * weight
        slope = inverse_std**2 * sum_times_centred / counts.sum()
        centred = (_wide(x) - _spread(mean, x)) * _spread(slope, x)
        made = (_wide(gradient) - _spread(sum_gradient / counts.sum(), x) - centred) * _spread(scale, x)
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
