"""The example of docs/adding-a-method.md is a method: it trains, its loss is the paper's, its parts are in groups."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from model.methods.base import BatchShape
from pipeline.sampling.views import ViewRecipe
from tests.helpers.method_ranks import GLOBAL_BATCH, images, info_of, train_step

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-method.md"


@pytest.fixture(scope="module")
def barlow() -> Iterator[ModuleType]:
    (source,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    module = ModuleType("barlow_of_the_page")
    sys.modules[module.__name__] = module  # where dataclass looks for its annotations
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]


def test_it_trains(barlow: ModuleType) -> None:
    torch.manual_seed(0)
    config = barlow.BarlowConfig("resnet_tiny", dim=16, projector_hidden=16)
    config.check(BatchShape(GLOBAL_BATCH, GLOBAL_BATCH, 1), ViewRecipe())
    method = config.build().train()
    optimizer = torch.optim.SGD(method.parameters(), 0.01, momentum=0.9)
    losses = [train_step(method, method, optimizer, 0, applied=True).item() for _ in range(8)]
    assert losses[-1] < losses[0]
    groups = method.parameter_groups()
    assert sum(len(group.params) for group in groups) == len(list(method.parameters()))
    assert (
        method.collapse(BatchShape(GLOBAL_BATCH, GLOBAL_BATCH, 1)).dim
        == method(images(0), info_of(0)).embedding.shape[1]
    )


def test_its_loss_is_the_papers(barlow: ModuleType) -> None:
    z1, z2 = (torch.randn(6, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(2))
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        for j in range(3):
            a, b = z1[:, i] - z1[:, i].mean(), z2[:, j] - z2[:, j].mean()
            correlation = (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())
            expected = expected + ((1 - correlation) ** 2 if i == j else 0.01 * correlation**2)
    torch.testing.assert_close(barlow.barlow_loss(z1, z2, 0.01), expected)
    perfect = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert barlow.barlow_loss(perfect, perfect, 0.01).item() == pytest.approx(0.0, abs=1e-6)  # the identity
