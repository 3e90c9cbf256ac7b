"""Every module with annotated arrays has them checked under pytest, or is known here to be one that cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILED = {"pipeline.photometric_gpu"}  # Triton reads the kernels' source, and cannot call what wraps them


def test_annotated_modules_are_checked(pytestconfig: pytest.Config) -> None:
    annotated = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("model", "pipeline", "train", "tools")
        for path in (ROOT / package).rglob("*.py")
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    }
    checked = set(pytestconfig.getoption("--jaxtyping-packages").split(","))
    assert annotated - checked == COMPILED, "add what is missing to --jaxtyping-packages in pyproject.toml"
