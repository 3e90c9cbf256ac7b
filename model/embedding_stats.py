"""Z_std and effective rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def z_std(z: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Mean over the dimensions of the standard deviation over the batch of l2-normalised z (figure 2, middle).

    About 1/sqrt(d) for outputs spread over the sphere, 0 where all are one vector; batch norm at the projector's
    output leaves a collapsed encoder 2 / sqrt(n) of 1/sqrt(d). float32; needs n >= 2.
    """
    return F.normalize(z.float(), dim=1).std(dim=0).mean()


RANK_ROWS = 256  # samples of z that the rank is computed from, a matter of milliseconds


@torch.no_grad()
def effective_rank(z: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """exp(entropy of the singular values) of l2-normalised z without its mean: in how many directions z spreads.

    Roy & Vetterli 2007. Between 1 (a line, or one point) and min(n - 1, d); of the first RANK_ROWS samples. nan if z
    is not finite. On z's device.
    """
    z = z[:RANK_ROWS].float()
    finite = torch.isfinite(z).all()
    z = F.normalize(torch.nan_to_num(z), dim=1)
    z = z - z.mean(dim=0)
    gram = z @ z.T if len(z) < z.shape[1] else z.T @ z
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    # What is below the rounding of float32 is no direction; without a direction left, z is one point.
    singular = torch.where(singular > 1e-3 * singular.max().clamp_min(1e-3), singular, 0)
    share = singular / singular.sum().clamp_min(1e-12)
    rank = torch.exp(-(share * share.clamp_min(1e-12).log()).sum())
    return torch.where(finite, rank, torch.nan)
