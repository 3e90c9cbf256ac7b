"""Checks the jaxtyping annotations of all modules at every call while the tests run: importing this file is enough."""

from __future__ import annotations

from pathlib import Path

from jaxtyping import install_import_hook

ROOT = Path(__file__).resolve().parents[2]
COMPILED = {"pipeline.backends.photometric_gpu"}  # Triton compiles the kernels' source and cannot call a wrapper


def annotated_modules() -> list[str]:
    """Dotted names of all modules that import jaxtyping, without the compiled ones."""
    annotated = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("model", "pipeline", "train", "tools")
        for path in (ROOT / package).rglob("*.py")
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    }
    return sorted(annotated - COMPILED)


install_import_hook(annotated_modules(), "beartype.beartype")
