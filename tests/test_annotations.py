"""Every module with annotated arrays has its shapes and dtypes checked under pytest."""

from __future__ import annotations

import importlib

import pytest
import torch

from model.embedding_stats import z_std
from tests.helpers.annotated import annotated_modules


@pytest.mark.parametrize("module", annotated_modules())
def test_annotated_modules_are_checked(module: str) -> None:
    loader = importlib.import_module(module).__loader__
    assert "jaxtyping" in type(loader).__module__, f"{module} was imported before tests/conftest.py set the checks up"


def test_a_wrong_shape_is_an_error() -> None:
    with pytest.raises(Exception, match="z_std"):
        z_std(torch.zeros(3))
