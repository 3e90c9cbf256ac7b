"""Owns the number formats of a run: autocast, the loss scaler of fp16, and the views' dtype."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from pipeline.errors import UserError

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
