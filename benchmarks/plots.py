"""Owns the pictures of what sharding and scale measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.ladder_plot import CHAIN_COLOUR, INK, LOADER_COLOUR, QUIET

OTHERS_COLOUR = "#b9c0c6"
ORDER_COLOURS = {"random": CHAIN_COLOUR, "blocks": "#c07f1c"}


def draw_sharding(results: Mapping[str, Mapping[str, Any]], subtitle: str) -> Figure:
    """Bars of images/s by wall clock, a diamond for a core's rate; whiskers from the slowest to the fastest run."""
    measured = {name: result for name, result in results.items() if "img_per_s" in result}
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(measured)), layout="constrained")
    axes = figure.subplots()
    matter = [result for name, result in measured.items() if name.startswith("ours") or "ShardWriter" in name]
    edge = 1.1 * max(max(result["img_per_s"].maximum, result["img_per_cpu_s"].median) for result in matter)
    for row, (name, result) in enumerate(measured.items()):
        _draw_contestant(axes, row, name, result, edge)
    axes.set_yticks(range(len(measured)), list(measured))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * edge)
    axes.set_xlabel("images per second; diamond: images per second of CPU time, that is, of one busy core")
    _finish(figure, axes, "Sharding: images per second", subtitle)
    return figure


def _draw_contestant(axes: Axes, row: int, name: str, result: Mapping[str, Any], edge: float) -> None:
    """Bars beyond ``edge`` are broken off: those who do next to nothing would hide the others."""
    rate, per_core = result["img_per_s"], result["img_per_cpu_s"].median
    colour = CHAIN_COLOUR if name.startswith("ours") else OTHERS_COLOUR
    axes.barh(row, min(rate.median, edge), color=LOADER_COLOUR if name.endswith(" 1 worker") else colour, height=0.62)
    end = min(max(rate.maximum, per_core), edge)
    if rate.median > edge:
        axes.text(edge, row, "»", ha="right", va="center", fontsize=14, color="white", fontweight="bold")
    else:
        whiskers = [[rate.median - rate.minimum], [max(min(rate.maximum, edge) - rate.median, 0)]]
        axes.errorbar(rate.median, row, xerr=whiskers, color=INK, linewidth=1, capsize=3)
        if per_core <= edge:
            axes.plot(per_core, row, marker="D", markersize=5, color=INK, markerfacecolor="white")
    text = f"{rate.median:,.0f}  ·  {result['mb_per_s']:,.0f} MB/s"
    if "times_one" in result:
        text += f"  ·  {result['times_one'].median:.2f} x one worker"
    axes.text(end + 0.02 * edge, row, text, va="center", fontsize=9, color=INK)


def _finish(figure: Figure, axes: Axes, title: str, subtitle: str) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.suptitle(title, fontsize=13, color=INK, x=0.02, ha="left")
    axes.set_title(subtitle, fontsize=9, color=QUIET, loc="left")
