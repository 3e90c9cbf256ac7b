"""Colours shared by all plots, and how they are written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.common.files import atomic_file, disk_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, QUIET = "#22313f", "#8a949e"
PALETTE = ("#1f5fa8", "#b4511d", "#1d7a4f", "#7d3f98", "#8a6d00", "#b3265f", "#3a7d8c", "#5b6b2f", "#a33b3b", "#555f6b")


def save_png(figure: Figure, path: Path, dpi: int, remedy: str = "choose another place") -> None:
    """Write a plot, in the place of a link, not through it. Raises UserError with ``remedy`` if the disk refuses."""
    with disk_errors(f"writing {path}", f"cannot write {path}", remedy), atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=dpi)
