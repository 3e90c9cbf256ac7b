"""The MLP heads that methods put on a backbone. Projector and Predictor are those of Chen & He 2020, section 3."""

from __future__ import annotations

from typing import Literal

from torch import nn

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


def _hidden_layer(in_dim: int, out_dim: int, batch_norm: bool) -> list[nn.Module]:
    linear = nn.Linear(in_dim, out_dim, bias=not batch_norm)
    return [linear, *([nn.BatchNorm1d(out_dim)] if batch_norm else []), nn.ReLU(inplace=True)]
