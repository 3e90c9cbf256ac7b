"""The number formats: what ``auto`` takes on which device, and what cannot be had."""

from __future__ import annotations

import pytest
import torch

from pipeline.common.errors import UserError
from train.optimization.precision import choose_precision


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
@pytest.mark.parametrize(("native", "name", "dtype"), [(True, "bf16", torch.bfloat16), (False, "fp16", torch.float16)])
def test_auto_takes_bf16_only_where_the_gpu_has_it_itself(
    monkeypatch: pytest.MonkeyPatch, native: bool, name: str, dtype: torch.dtype
) -> None:
    """torch says of GPUs that emulate bf16, too, that they support it, unless it is asked not to."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    precision = choose_precision("auto", torch.device("cuda"))
    assert precision.name == name
    assert precision.view_dtype == dtype


def test_a_cpu_computes_in_fp32_and_has_no_fp16() -> None:
    assert choose_precision("auto", torch.device("cpu")).name == "fp32"
    with pytest.raises(UserError, match="--precision fp16 needs a GPU"):
        choose_precision("fp16", torch.device("cpu"))
