"""Embeddings as unit vectors, and how widely they spread: z_std and effective rank, the signs of collapse.

z_std: Chen & He 2020, figure 2; effective rank: Roy & Vetterli 2007.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is where that is float64: what losses and statistics are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows of length 1, float32 or float64."""
    return F.normalize(wide(x), dim=1)


@torch.no_grad()
def z_std(z: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean over the dimensions of the standard deviation over the batch of l2-normalised z (figure 2, middle).

    About 1/sqrt(d) for outputs spread over the sphere, 0 where all are one vector; batch norm at the projector's
    output leaves a collapsed encoder 2 / sqrt(n) of 1/sqrt(d). float32; needs n >= 2.
    """
    return F.normalize(z.float(), dim=1).std(dim=0).mean()


def least_share(rows: int) -> float:
    """The least that z_std x sqrt(d) can be of ``rows`` samples that batch norm without affine parameters made.

    train/monitoring/collapse.py derives it.
    """
    return 2 / math.sqrt(rows)


RANK_ROWS = 256  # samples of z that the rank is computed from; takes milliseconds


@torch.no_grad()
def effective_rank(z: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """In how many directions z spreads: exp(entropy of the singular values) of l2-normalised, centred z.

    Between 1 (a line, or one point) and min(n - 1, d), computed from the first RANK_ROWS samples,
    on z's device. nan if z is not finite.
    """
    z = z[:RANK_ROWS].float()
    finite = torch.isfinite(z).all()
    z = F.normalize(torch.nan_to_num(z), dim=1)
    z = z - z.mean(dim=0)
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    # Values below float32's rounding are no directions; with none left, z is one point.
    singular = torch.where(singular > 1e-3 * singular.max().clamp_min(1e-3), singular, 0)
    share = singular / singular.sum().clamp_min(1e-12)
    rank = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
    return torch.where(finite, rank, torch.nan)
