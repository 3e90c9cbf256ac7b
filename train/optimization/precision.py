"""Number formats of a run: autocast, the loss scaler of fp16, and the views' dtype."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from pipeline.common.errors import UserError

PrecisionName = Literal["auto", "bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Precision:
    """What a run computes in. Weights, BN statistics, the loss and the optimizer stay float32."""

    name: str
    autocast: Callable[[], AbstractContextManager[object]]
    view_dtype: torch.dtype  # of the views that the loader makes
    scaler: torch.amp.GradScaler  # does nothing but for fp16


def choose_precision(name: PrecisionName, device: torch.device) -> Precision:
    """``auto`` is bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU. UserError for fp16 on a CPU."""
    on_gpu = device.type == "cuda"
    if name == "auto":  # which older GPUs emulate
        has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        name = ("bf16" if has_bf16 else "fp16") if on_gpu else "fp32"
    if name == "fp16" and not on_gpu:
        raise UserError("--precision fp16 needs a GPU: take fp32 or bf16 on a CPU")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    return Precision(
        name=name,
        autocast=lambda: torch.autocast(device.type, dtype=dtype, enabled=name != "fp32"),
        view_dtype=dtype if on_gpu else torch.float32,  # what the first convolution takes: autocast converts nothing
        scaler=torch.amp.GradScaler(device.type, enabled=name == "fp16"),
    )


class SkipNonFinite:
    """Lets the optimizer make a step only if all gradients are finite."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        """What a forward pass changes in ``model`` is guarded as well: a nan would stay in the running statistics."""
        self._optimizer = optimizer
        self._statistics = [
            buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))
        ]
        self._counters = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
        self._remembered = self._counted = torch.empty(0)
        self.skipped = torch.zeros((), device=device)  # steps of this session
        self._in_row = torch.zeros((), device=device)
        self._longest = torch.zeros((), device=device)  # row since the last look
        self._finite = torch.ones((), dtype=torch.bool, device=device)  # the gradients of this step
        # Whether the host may look at the gradients' flag for an optimizer that cannot: it would wait for a GPU.
        self.host_decides = device.type == "cpu"

    def remember(self) -> None:
        """To be called before the step's first forward pass."""
        if self._statistics:
            self._remembered = torch.cat([buffer.flatten() for buffer in self._statistics])
        if self._counters:
            self._counted = torch.stack(self._counters)

    def step(self, scaler: torch.amp.GradScaler) -> Tensor:
        """Make the optimizer's step, or none; returns 1 or 0, float32 on the device. ``scaler`` has unscaled."""
        self.look()
        self.update(scaler)
        return self.settle()

    def look(self) -> None:
        """The first part of ``step``: whether all gradients are finite."""
        gradients = [p.grad for p in self._moved() if p.grad is not None]
        self._finite = torch.isfinite(nn.utils.get_total_norm(gradients))

    def settle(self) -> Tensor:
        """The last part of ``step``, after ``update``: statistics and counters stay where the step was skipped."""
        finite = self._finite
        if self._statistics:
            now = torch.cat([buffer.flatten() for buffer in self._statistics])
            kept = torch.where(finite, now, self._remembered).split([buffer.numel() for buffer in self._statistics])
            # A few kernels instead of one for each of the 114 buffers of SimSiam with ResNet-50.
            torch._foreach_copy_(self._statistics, [v.view_as(b) for b, v in zip(self._statistics, kept, strict=True)])
        if self._counters:
            counts = torch.where(finite, torch.stack(self._counters), self._counted)
            torch._foreach_copy_(self._counters, list(counts.unbind()))
        # In place, as a CUDA graph finds them again.
        self._in_row.copy_(torch.where(finite, 0.0, self._in_row + 1))
        self._longest.copy_(torch.maximum(self._longest, self._in_row))
        self.skipped.add_(~finite)
        return finite.float()

    def longest_row(self) -> Tensor:
        """The most steps skipped in a row since the last call, on the device."""
        longest = self._longest.clone()
        self._longest.copy_(self._in_row)
        return longest

    def _moved(self) -> list[nn.Parameter]:
        """The parameters that have a gradient in this step."""
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]

    def update(self, scaler: torch.amp.GradScaler) -> None:
        """The middle part of ``step``: the optimizer's step, or none."""
        optimizer, finite = self._optimizer, self._finite
        if scaler.is_enabled():  # looks for itself, with the same outcome
            scaler.step(optimizer)
            scaler.update()
        elif optimizer.param_groups[0].get("fused"):  # torch's fused kernels look at this tensor
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif hasattr(optimizer, "_dummy_overflow_buf"):  # and Apex's kernels at this one
            optimizer._dummy_overflow_buf.copy_(~finite)
            optimizer.step()
        elif not self.host_decides:
            self._step_and_undo(finite)
        elif finite:  # a CPU has nothing to wait for
            optimizer.step()

    @torch.no_grad()
    def _step_and_undo(self, finite: Tensor) -> None:
        """For an optimizer that does not look at a flag: step, and take back what should not have been.

        Costs a copy of weights and momenta. Momenta that the step creates are zeros where it is taken back, which the
        first step leaves as if they did not exist.
        """

        def kept() -> dict[int, Tensor]:
            states = (self._optimizer.state[p] for p in self._moved())
            momenta = [value for state in states for value in state.values() if isinstance(value, Tensor)]
            return {id(tensor): tensor for tensor in (*self._moved(), *momenta)}

        before = kept()
        copies = {key: tensor.clone() for key, tensor in before.items()}
        self._optimizer.step()
        for key, tensor in kept().items():
            former = copies[key] if key in copies else torch.zeros_like(tensor)
            tensor.copy_(torch.where(finite, tensor, former))


def diagnosis(row: int, limit: int, step: int, lr: float, precision: str, checkpoint: str) -> str:
    """What to tell the user when ``row`` steps in a row were skipped, the last of them not after ``step``."""
    narrow = ", or a number format too narrow for this model (take --precision fp32)" if precision == "fp16" else ""
    return (
        f"{row} steps in a row up to step {step} had gradients that are not finite, and --max-bad-steps is {limit}. "
        "They changed nothing: the weights are those of before. Likely causes: a learning rate that is too high (it is "
        f"{lr:.3g} now; start a run with a smaller --base-lr){narrow}, or hardware that computes wrongly (go on with "
        f"--resume on another machine). The newest checkpoint is {checkpoint}"
    )
