"""Plots of benchmarks/sharding.py and benchmarks/scale.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# As in tools/throughput/report.py, whose import would load torch
INK, QUIET, LIGHT, STRONG, OTHERS = "#22313f", "#8a949e", "#8fb3d9", "#1f5fa8", "#b9c0c6"
ORDER_COLOURS = (STRONG, "#c07f1c", "#1d7a4f", "#7a4f10")
RANK_MARKERS = "osD^vP"
SCALE_PANELS = {
    "start_up_s": "start-up, s",
    "batch_ms": "order + parameters, ms a batch",
    "lookup_ms": "index, ms a batch",
}


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


def draw_scale(cases: Sequence[Mapping[str, Any]], subtitle: str) -> Figure:
    """A panel for each cost, the datasets side by side in it; whiskers from the slowest to the fastest process."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    sizes, ranks, orders = ([*dict.fromkeys(case[key] for case in cases)] for key in ("samples", "ranks", "order"))
    kinds = [(order, rank) for order in orders for rank in ranks]
    for axes, (quantity, title) in zip(figure.subplots(1, len(SCALE_PANELS)), SCALE_PANELS.items(), strict=True):
        for number, (order, rank) in enumerate(kinds):
            mine = [case for case in cases if (case["order"], case["ranks"]) == (order, rank)]
            at = [sizes.index(case["samples"]) + 0.7 * ((number + 0.5) / len(kinds) - 0.5) for case in mine]
            spreads = [case[quantity] for case in mine]
            medians = [spread["median"] for spread in spreads]
            low = [spread["median"] - spread["minimum"] for spread in spreads]
            high = [spread["maximum"] - spread["median"] for spread in spreads]
            axes.errorbar(
                at,
                medians,
                yerr=[low, high],
                color=ORDER_COLOURS[orders.index(order) % len(ORDER_COLOURS)],
                marker=RANK_MARKERS[ranks.index(rank) % len(RANK_MARKERS)],
                markersize=5,
                linestyle="none",
                linewidth=1,
                label=f"{order}, {rank:,} rank{'s' if rank > 1 else ''}",
            )
        axes.set_xticks(range(len(sizes)), [f"{size:.0e}" for size in sizes])
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("samples")
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(f"What a rank costs as work grows: {subtitle}", fontsize=10, color=INK, x=0.02, ha="left")
    return figure


def _draw_contestant(axes: Axes, row: int, name: str, result: Mapping[str, Any], edge: float) -> None:
    """Bars beyond ``edge`` are broken off: those who do next to nothing would hide the others."""
    rate, per_core = result["img_per_s"], result["img_per_cpu_s"].median
    colour = STRONG if name.startswith("ours") else OTHERS
    axes.barh(row, min(rate.median, edge), color=LIGHT if name.endswith(" 1 worker") else colour, height=0.62)
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
