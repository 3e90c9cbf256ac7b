"""Teacher: a copy of the student that follows it by a moving average, or is renewed every so many steps.

Mean teachers, Tarvainen & Valpola 2017; MoCo's key encoder, BYOL's target network, DINO's teacher. Its weights are
parameters without gradient, so checkpoints and exports hold them like any other.
"""

from __future__ import annotations

import copy
import math
from typing import overload

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn


class Teacher(nn.Module):
    """``x -> module(x)`` without gradient. ``module`` starts as a copy of the student.

    In training mode its batch norm uses the statistics of its own batches, as the references do; its running
    statistics are its own, too.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    @torch.no_grad()
    def update(self, student: nn.Module, momentum: float | Float[Tensor, ""], applied: Shaped[Tensor, ""]) -> None:
        """Move the weights: ``t <- momentum t + (1 - momentum) s``, in their own dtype, which must be float32 or wider.

        In bfloat16 1 - 0.999 is lost to rounding. ``applied`` is 0 where the step was skipped; then nothing moves.
        Buffers are left alone.
        """
        own: list[Tensor] = list(self.module.parameters())
        new: list[Tensor] = list(student.parameters())
        assert all(weight.dtype in (torch.float32, torch.float64) for weight in own)
        change = torch._foreach_sub(new, own)
        torch._foreach_mul_(change, ((1 - momentum) * applied.float()).float())
        torch._foreach_add_(own, change)

    @torch.no_grad()
    def copy_every(self, student: nn.Module, step: int, steps: int) -> None:
        """Take the student's weights and statistics before every ``steps``-th step, ``step`` counting from 0."""
        if step % steps == 0:
            self.module.load_state_dict(student.state_dict())


@overload
def cosine_momentum(start: float, step: int, total_steps: int) -> float: ...
@overload
def cosine_momentum(start: float, step: Tensor, total_steps: int) -> Tensor: ...
def cosine_momentum(start: float, step: int | Tensor, total_steps: int) -> float | Tensor:
    """BYOL's schedule of tau: from ``start`` at step 0 along half a cosine to 1 at ``total_steps``.

    Grill et al. 2020, section 3.3: ``1 - (1 - start) (cos(pi k / K) + 1) / 2``. Of a tensor float64 on its device.
    """
    if isinstance(step, Tensor):
        return 1 - (1 - start) * (torch.cos(math.pi * step.double() / total_steps) + 1) / 2
    return 1 - (1 - start) * (math.cos(math.pi * step / total_steps) + 1) / 2
