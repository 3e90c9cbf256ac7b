"""The MLP heads that methods put on a backbone. Projector and Predictor are those of Chen & He 2020, section 3."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from model.embedding_stats import wide

BatchNormPlaces = Literal["none", "hidden", "all"]


class Projector(nn.Sequential):
    """``[n, in_dim]`` -> ``[n, out_dim]``.

    "The projection MLP (in f) has BN applied to each fully-connected (fc) layer, including its output fc. Its output
    fc has no ReLU. The hidden fc is 2048-d. This MLP has 3 layers." From the official code: the output's BN has no
    affine parameters, a linear layer has no bias where a BN follows it, children are numbered as in ``encoder.fc``.
    """

    def __init__(
        self, in_dim: int, hidden_dim: int, out_dim: int, layers: int = 3, batch_norm: BatchNormPlaces = "all"
    ) -> None:
        """``batch_norm`` says after which layers a BN stands. Raises ValueError for less than one layer."""
        if layers < 1:
            raise ValueError(f"a projector of {layers} layers; it needs at least 1")
        widths = [in_dim, *[hidden_dim] * (layers - 1)]
        modules: list[nn.Module] = []
        for width in widths[:-1]:
            modules += _hidden_layer(width, hidden_dim, batch_norm != "none")
        modules.append(nn.Linear(widths[-1], out_dim, bias=batch_norm != "all"))
        if batch_norm == "all":
            modules.append(nn.BatchNorm1d(out_dim, affine=False))
        super().__init__(*modules)


class Predictor(nn.Sequential):
    """``[n, dim]`` -> ``[n, dim]``, a bottleneck.

    "The prediction MLP (h) has BN applied to its hidden fc layers. Its output fc does not have BN or ReLU. This MLP has
    2 layers. The dimension of h's input and output (z and p) is d = 2048, and h's hidden layer's dimension is 512."
    """

    def __init__(self, dim: int, hidden_dim: int, batch_norm: BatchNormPlaces = "hidden") -> None:
        """``batch_norm`` says after which layers a BN stands."""
        modules = _hidden_layer(dim, hidden_dim, batch_norm != "none")
        modules.append(nn.Linear(hidden_dim, dim, bias=batch_norm != "all"))
        if batch_norm == "all":
            modules.append(nn.BatchNorm1d(dim))  # unstable: Chen & He 2020, table 3 (d)
        super().__init__(*modules)


def mlp(widths: Sequence[int], batch_norm: bool, hidden_bias: bool, out_bias: bool) -> nn.Sequential:
    """``[n, widths[0]]`` -> ``[n, widths[-1]]``: linear layers with ReLU, and BN where asked, between them.

    The methods' papers differ in which layers have a bias.
    """
    modules: list[nn.Module] = []
    for in_dim, out_dim in itertools.pairwise(widths[:-1]):
        modules.append(nn.Linear(in_dim, out_dim, bias=hidden_bias))
        modules += [nn.BatchNorm1d(out_dim)] if batch_norm else []
        modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules, nn.Linear(widths[-2], widths[-1], bias=out_bias))


class Prototypes(nn.Module):
    """``[n, dim]`` -> scores ``[n, count]``: a linear layer without bias, in float32 whatever the precision.

    ``weight`` holds a prototype a row. ``normalised``: each row is divided by its length in the forward pass, which is
    DINO's weight-normalised layer with its scale fixed at 1; otherwise the caller keeps the rows at length 1 (SwAV).
    """

    def __init__(self, dim: int, count: int, normalised: bool) -> None:
        """Rows start as nn.Linear's do, at length 1."""
        super().__init__()
        bound = dim**-0.5
        self.weight = nn.Parameter(F.normalize(torch.empty(count, dim).uniform_(-bound, bound), dim=1))
        self._normalised = normalised

    def forward(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n count"]:
        """The scores, float32."""
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(wide(z), F.normalize(self.weight, dim=1) if self._normalised else self.weight)

    @torch.no_grad()
    def normalise(self, applied: Shaped[Tensor, ""]) -> None:
        """Bring the rows back to length 1, unless ``applied`` is 0."""
        self.weight.copy_(torch.where(applied.bool(), F.normalize(self.weight, dim=1), self.weight))


def _hidden_layer(in_dim: int, out_dim: int, batch_norm: bool) -> list[nn.Module]:
    linear = nn.Linear(in_dim, out_dim, bias=not batch_norm)
    return [linear, *([nn.BatchNorm1d(out_dim)] if batch_norm else []), nn.ReLU(inplace=True)]
