"""Owns what a sweep's results look like: a page of markdown and a plot, each beside the paper's numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.common.files import atomic_file, disk_errors
from tools.common.plot_style import INK, QUIET
from tools.reproduction.paper_tables import PAPER_SCALE, PaperTable, Variant
from train.monitoring.collapse import least_share
from train.storage.run_folder import SUMMARY_FILE, RunHistory, read_run

COLOURS = ("#1f5fa8", "#b4511d", "#1d7a4f", "#7a3b9a", "#a8871f", "#3a8fa3", "#a33a5f")
PAPER_COLOUR = "#c9ced3"
SURE_AT = 2.0  # standard errors


@dataclass(frozen=True)
class Result:
    """One variant, here and in the paper."""

    variant: Variant
    history: RunHistory
    linear_top1: float  # percent

    @property
    def knn_top1(self) -> float:
        """After the last step, percent."""
        return self.history.knn_top1[-1]

    @property
    def spread(self) -> float:
        """z_std at the end as a share of the healthy 1/sqrt(d): near 1 spread evenly, low where it has collapsed."""
        return self.history.z_std[-1] * math.sqrt(self.history.dim)


def write_report(
    table: PaperTable,
    variants: Sequence[Variant],
    folders: Mapping[str, Path],
    *,
    folder: Path,
    name: str,
    recipe: str,
    val_samples: int,
    command: str,
) -> Path:
    """Write NAME.md and NAME.png into ``folder`` from finished runs; returns the page. UserError for a full disk."""
    results = [read_result(variant, folders[variant.name]) for variant in variants]
    plan = json.loads((folders[variants[0].name] / "plan.json").read_text(encoding="utf-8"))
    page = folder / f"{name}.md"
    text = describe(table, results, name=name, recipe=recipe, plan=plan, val_samples=val_samples, command=command)
    with disk_errors(f"writing {page}", f"cannot write {page}", "name another folder with --docs"):
        folder.mkdir(parents=True, exist_ok=True)
        draw(table, results, recipe, floor_of(results, plan)).savefig(page.with_suffix(".png"), dpi=120)
        with atomic_file(page) as file:
            file.write(text.encode())
    return page


def read_result(variant: Variant, run_dir: Path) -> Result:
    """What a finished variant left in its folders."""
    linear = json.loads((run_dir / "linear" / SUMMARY_FILE).read_text(encoding="utf-8"))
    return Result(variant, read_run(run_dir), linear["val_top1"])


def floor_of(results: Sequence[Result], plan: Mapping[str, Any]) -> float | None:
    """The least that z_std x sqrt(d) can be with batch norm at the projector's output, where it is one for all runs."""
    if plan["world_size"] > 1 or any(result.variant.batch is not None for result in results):
        return None
    return least_share(plan["micro_batch"])


def describe(
    table: PaperTable,
    results: Sequence[Result],
    *,
    name: str,
    recipe: str,
    plan: Mapping[str, Any],
    val_samples: int,
    command: str,
) -> str:
    """The page."""
    first, floor = results[0], floor_of(results, plan)
    least = "" if floor is None else f", here {floor:.2f}"
    chance = f"; chance is {100 / first.history.classes:.3g}" if first.history.classes else ""
    lines = [
        f"# {table.title}",
        "",
        f"Chen & He 2020, {table.source}. Made by",
        "",
        f"    {command}",
        "",
        f"**Scale.** Here: {recipe}, {plan['num_samples']:,} images, {_length(results, plan)}, one seed; accuracies "
        f"over {val_samples:,} images. The paper: {PAPER_SCALE}. "
        "What compares is which variant is ahead of which, not how far.",
        "",
        "| variant | paper, linear top-1 | linear top-1 | 20-NN top-1 | z_std x sqrt(d) at the end | loss at the end |",
        "|-|-|-|-|-|-|",
        *map(_row, results),
        "",
        f"An untrained encoder has 20-NN {first.history.knn_top1[0]:.1f}{chance}. z_std x sqrt(d) is near 1 where z is "
        "spread over the whole sphere. A collapsed encoder's falls toward 0, but batch norm at the projector's output "
        f"lets it come no nearer than 2/sqrt(batch){least} (why: train/monitoring/collapse.py). The linear accuracy is "
        "train/linear.py's on cached features, with the best of several learning rates, chosen alike for all variants.",
        "",
        f"## Against “{first.variant.label}”",
        "",
        *(verdict(first, other, val_samples) for other in results[1:]),
        "",
        f"![{table.title}]({name}.png)",
        "",
    ]
    return "\n".join(lines)


def _length(results: Sequence[Result], plan: Mapping[str, Any]) -> str:
    """Epochs and, where it is one for all runs, what an epoch is."""
    epochs = f"{plan['epochs']} epoch{'s' if plan['epochs'] > 1 else ''}"
    if any(result.variant.batch is not None for result in results):
        return epochs
    return f"{epochs} of {plan['steps_per_epoch']:,} steps, batch {plan['global_batch']}"


def _row(result: Result) -> str:
    variant, loss = result.variant, result.history.loss[-1]
    paper = "unstable" if variant.paper_top1 is None else f"{variant.paper_top1:.1f}"
    accuracies = f"{result.linear_top1:.1f} | {result.knn_top1:.1f}"
    return f"| {variant.label} | {paper} | {accuracies} | {result.spread:.2f} | {loss:.3f} |"


def verdict(first: Result, other: Result, val_samples: int) -> str:
    """One line: whether a variant stands to the first one as in the paper, by the linear accuracy and by kNN.

    Closer than two standard errors of the validation images' number counts as too close to tell.
    """
    label, paper = other.variant.label, other.variant.paper_top1
    here = [
        f"{name} {after - before:+.1f}"
        for name, before, after in (
            ("linear", first.linear_top1, other.linear_top1),
            ("20-NN", first.knn_top1, other.knn_top1),
        )
    ]
    if paper is None or first.variant.paper_top1 is None:
        return f"- {label}: unstable in the paper; here {', '.join(here)}"
    difference = paper - first.variant.paper_top1
    signs = [
        compare(difference, before, after, val_samples)
        for before, after in ((first.linear_top1, other.linear_top1), (first.knn_top1, other.knn_top1))
    ]
    told = "; ".join(f"{text} ({sign})" for text, sign in zip(here, signs, strict=True))
    return f"- {label}: {difference:+.1f} in the paper; here {told}"


def compare(paper_difference: float, before: float, after: float, samples: int) -> str:
    """``same sign``, ``opposite sign`` or ``too close to tell``; accuracies in percent over ``samples`` images."""
    error = 100 * math.sqrt(sum(p / 100 * (1 - p / 100) for p in (before, after)) / samples)
    difference = after - before
    if abs(difference) < SURE_AT * error:
        return "too close to tell"
    return "same sign" if difference * paper_difference > 0 else "opposite sign"


def draw(table: PaperTable, results: Sequence[Result], recipe: str, floor: float | None) -> Figure:
    """Loss, z_std and kNN over the epochs as in the paper's figure 2, and linear accuracies beside the paper's.

    ``floor``: the least that z_std x sqrt(d) can be, if it is known.
    """
    figure = Figure(figsize=(11, 7.6), layout="constrained")
    figure.suptitle(f"{table.title} (Chen & He 2020, {table.source})\nhere {recipe}", fontsize=12, color=INK)
    (loss_axes, std_axes), (knn_axes, bar_axes) = figure.subplots(2, 2)
    for result, colour in zip(results, COLOURS, strict=False):
        history, label = result.history, result.variant.label
        per_epoch = history.steps_per_epoch
        epochs = [step / per_epoch for step in history.steps]
        loss_axes.plot(epochs, history.loss, color=colour, linewidth=1.5, label=label)
        std_axes.plot(epochs, history.z_std, color=colour, linewidth=1.5)
        std_axes.axhline(1 / math.sqrt(history.dim), color=QUIET, linestyle="--", linewidth=1.0)
        knn_epochs = [step / per_epoch for step in history.knn_steps]
        knn_axes.plot(knn_epochs, history.knn_top1, color=colour, linewidth=1.5, marker="o", markersize=4)
    loss_axes.set_ylabel("loss")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    std_axes.set_ylabel("std of l2-normalised z")
    told = "dashed: 1/√d, spread over the whole sphere"
    if floor is not None:
        std_axes.axhline(floor / math.sqrt(results[0].history.dim), color=QUIET, linestyle=":", linewidth=1.0)
        told += "; dotted: 2/√batch of it"
    std_axes.set_title(told, loc="right", fontsize=9, color=INK)
    std_axes.set_ylim(bottom=0)
    knn_axes.set_ylabel("20-NN top-1 (%)")
    knn_axes.set_ylim(0, 1.08 * max(max(result.history.knn_top1) for result in results))
    if results[0].history.classes:
        knn_axes.axhline(100 / results[0].history.classes, color=QUIET, linestyle="--", linewidth=1.0)
        knn_axes.set_title("dashed: chance", loc="right", fontsize=9, color=INK)
    for axes in (loss_axes, std_axes, knn_axes):
        axes.set_xlabel("epochs")
    _draw_bars(bar_axes, results)
    for axes in (loss_axes, std_axes, knn_axes, bar_axes):
        axes.grid(color="#e4e7ea", linewidth=0.8, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_bars(axes: Axes, results: Sequence[Result]) -> None:
    for place, (result, colour) in enumerate(zip(results, COLOURS, strict=False)):
        paper = result.variant.paper_top1
        axes.bar(place - 0.2, paper or 0.0, width=0.36, color=PAPER_COLOUR)
        axes.bar(place + 0.2, result.linear_top1, width=0.36, color=colour)
        told = "unstable" if paper is None else f"{paper:.1f}"
        axes.text(place - 0.2, (paper or 0.0) + 1, told, ha="center", fontsize=8, color=QUIET)
        axes.text(place + 0.2, result.linear_top1 + 1, f"{result.linear_top1:.1f}", ha="center", fontsize=8, color=INK)
    axes.set_xticks(range(len(results)), [result.variant.label.replace(" ", "\n", 1) for result in results], fontsize=8)
    axes.set_ylim(
        0, 1.15 * max([result.linear_top1 for result in results] + [r.variant.paper_top1 or 0 for r in results])
    )
    axes.set_ylabel("linear top-1 (%)")
    axes.set_title("grey: the paper, ImageNet; colour: here", loc="right", fontsize=9, color=INK)
