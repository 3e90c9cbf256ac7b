"""Owns the picture of the ladder: a bar a rung, of equal scale, so that the shortest one is seen at a glance."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tools.ladder_report import LOADER_PARTS, TITLES, RungResult, Verdict

INK, QUIET = "#22313f", "#8a949e"
LOADER_COLOUR, CHAIN_COLOUR, END_COLOUR, WARN_COLOUR = "#8fb3d9", "#1f5fa8", "#1d7a4f", "#b4511d"
MODEL_COLOURS = {"forward": "#d9a441", "backward": "#c07f1c", "optimizer": "#7a4f10"}
FAR = 3.0  # times the rate of the model: bars beyond are broken off, or the short ones could not be compared


def draw_ladder(results: dict[str, RungResult], verdict: Verdict, subtitle: str) -> Figure:
    """Bars of images/s from bytes (top) to end to end (bottom); whiskers from the slowest to the fastest turn."""
    figure = Figure(figsize=(9, 1.6 + 0.55 * len(results)), layout="constrained")
    axes = figure.subplots()
    medians = {name: result.img_per_s.median for name, result in results.items()}
    matter = [medians[name] for name in ("model", "end_to_end") if name in medians]
    edge = FAR * max(matter) if matter else max(medians.values())
    edge = min(edge, 1.05 * max(medians.values()))
    for row, (name, result) in enumerate(results.items()):
        _draw_bar(axes, row, name, result, edge, limits=name == verdict.limiter)
    if "model" in medians:
        axes.axvline(medians["model"], color=INK, linewidth=1, linestyle="--", zorder=0)
    axes.set_yticks(range(len(results)), [TITLES.get(name, name) for name in results])
    for label, name in zip(axes.get_yticklabels(), results, strict=True):
        label.set_fontweight("bold" if name not in LOADER_PARTS else "normal")
    axes.invert_yaxis()
    axes.set_xlim(0, edge * 1.28)
    axes.set_xlabel(
        "source images per second; dashed: the model alone" if "model" in medians else "source images per second"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    bound = "" if verdict.gpu_bound is None else f"gpu_bound {verdict.gpu_bound:.2f}, "
    figure.suptitle(
        f"{bound}limiter: {TITLES.get(verdict.limiter, verdict.limiter)}", fontsize=13, color=INK, x=0.02, ha="left"
    )
    axes.set_title(subtitle, fontsize=9, color=QUIET, loc="left")
    return figure


def _draw_bar(axes: Axes, row: int, name: str, result: RungResult, edge: float, limits: bool) -> None:
    rate = result.img_per_s
    shown = min(rate.median, edge)
    broken = rate.median > edge
    if name == "model" and result.parts:
        whole = sum(result.parts.values())
        start = 0.0
        for part, seconds in result.parts.items():
            width = shown * seconds / whole
            axes.barh(row, width, left=start, color=MODEL_COLOURS[part], height=0.62)
            if width > 0.09 * edge:
                axes.text(start + width / 2, row, part, ha="center", va="center", fontsize=8, color="white")
            start += width
    else:
        colour = {"loader": CHAIN_COLOUR, "end_to_end": END_COLOUR}.get(name, LOADER_COLOUR)
        axes.barh(row, shown, color=WARN_COLOUR if limits else colour, height=0.62)
    if broken:
        axes.text(shown, row, "»", ha="right", va="center", fontsize=14, color="white", fontweight="bold")
    else:
        whiskers = [[rate.median - rate.minimum], [max(min(rate.maximum, edge) - rate.median, 0)]]
        axes.errorbar(shown, row, xerr=whiskers, color=INK, linewidth=1, capsize=3)
    text = f"{rate.median:,.0f}  ·  {result.cores.median:.1f} cores"
    if result.gpu_busy is not None:
        text += f"  ·  GPU {result.gpu_busy:.0%}"
    axes.text(max(shown, min(rate.maximum, edge)) + 0.012 * edge, row, text, va="center", fontsize=9, color=INK)
