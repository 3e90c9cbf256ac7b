"""The heads have the layers of the paper's section 3, and of its table 3 when asked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.heads import Predictor, Projector


def kinds(head: nn.Sequential) -> str:
    return " ".join(type(m).__name__ for m in head)


def test_projector_is_the_papers() -> None:
    head = Projector(512, 2048, 2048)
    assert kinds(head) == "Linear BatchNorm1d ReLU Linear BatchNorm1d ReLU Linear BatchNorm1d"
    assert [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)] == [
        (512, 2048),
        (2048, 2048),
        (2048, 2048),
    ]
    assert all(m.bias is None for m in head if isinstance(m, nn.Linear))
    assert [m.affine for m in head if isinstance(m, nn.BatchNorm1d)] == [True, True, False]


def test_projector_output_is_normalised_over_the_batch() -> None:
    z = Projector(16, 32, 8)(torch.randn(64, 16) * 5 + 3)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var(dim=0, unbiased=False), torch.ones(8), atol=1e-3, rtol=0)


def test_two_layers_for_cifar() -> None:
    assert kinds(Projector(512, 2048, 2048, layers=2)) == "Linear BatchNorm1d ReLU Linear BatchNorm1d"
    with pytest.raises(ValueError, match="0 layers"):
        Projector(8, 8, 8, layers=0)


def test_predictor_is_the_papers_bottleneck() -> None:
    head = Predictor(2048, 512)
    assert kinds(head) == "Linear BatchNorm1d ReLU Linear"
    assert head[0].bias is None
    assert head[3].bias is not None
    assert (head[0].in_features, head[0].out_features, head[3].out_features) == (2048, 512, 2048)


@pytest.mark.parametrize(
    ("projector_bn", "predictor_bn", "counts"),
    [("none", "none", (0, 0)), ("hidden", "hidden", (2, 1)), ("all", "hidden", (3, 1)), ("all", "all", (3, 2))],
    ids=["a none", "b hidden-only", "c default", "d all"],
)
def test_batch_norm_by_place_as_in_table_3(projector_bn: str, predictor_bn: str, counts: tuple[int, int]) -> None:
    heads = Projector(8, 8, 8, batch_norm=projector_bn), Predictor(8, 4, batch_norm=predictor_bn)
    assert tuple(sum(isinstance(m, nn.BatchNorm1d) for m in head) for head in heads) == counts
    for head in heads:
        for layer, following in zip(head, [*list(head)[1:], None], strict=True):
            if isinstance(layer, nn.Linear):
                assert (layer.bias is None) == isinstance(following, nn.BatchNorm1d)
