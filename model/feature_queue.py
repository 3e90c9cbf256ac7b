"""FeatureQueue: the newest embeddings of earlier steps, as MoCo's dictionary and SwAV's queue keep them.

Rows are written at ``step x rows mod size``: the place follows from the step alone, so a checkpoint holds the rows and
needs no pointer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn


class FeatureQueue(nn.Module):
    """``rows`` is a buffer ``[size, dim]``, float32, of random unit vectors at the start (as moco/builder.py).

    All ranks hold the same rows if all push the same.
    """

    rows: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))

    @torch.no_grad()
    def push(self, rows: Float[Tensor, "n d"], step: int | Int64[Tensor, ""], applied: Shaped[Tensor, ""]) -> None:
        """Replace the oldest rows by those of step ``step`` (from 0); ``n`` must divide the size.

        ``applied`` is 0 where the step was skipped; then the old rows stay.
        """
        assert len(self.rows) % len(rows) == 0, "checked by the method's configuration"
        start = step * len(rows) % len(self.rows)
        if isinstance(start, Tensor):  # in a CUDA graph
            places = start + torch.arange(len(rows), device=rows.device)
            kept = self.rows.index_select(0, places)
            self.rows.index_copy_(0, places, torch.where(applied.bool(), rows.to(kept.dtype), kept))
            return
        kept = self.rows[start : start + len(rows)]
        kept.copy_(torch.where(applied.bool(), rows.to(kept.dtype), kept))

    def age(self, step: int, pushed: int) -> int:
        """Steps since the oldest row was written, before step ``step``, with ``pushed`` rows a step."""
        return min(step, len(self.rows) // pushed)
