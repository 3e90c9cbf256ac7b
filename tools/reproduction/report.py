"""The page and the plot of a sweep: every variant's accuracies beside the paper's, and whether the differences agree.

A difference between two variants counts once it exceeds its 95 % interval. The interval holds both errors: that of the
number of validation images, and the spread from run to run, which several seeds measure (reproduce.py --seeds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from model.embedding_stats import least_share
from pipeline.common.files import atomic_file, disk_errors, read_object
from tools.common.plot_style import INK, PALETTE, QUIET, save_png
from tools.reproduction.paper_tables import PAPER_SCALE, PaperTable, Variant
from train.storage.run_folder import SUMMARY_FILE, RunHistory, read_run

COLOURS, PAPER_COLOUR = (*PALETTE, "#2a2f8f"), "#c9ced3"
# Standard deviation of one run's accuracy, points: assumed where a sweep has one seed and cannot measure it. Equal
# variants of the committed one-seed pages differ by up to 1.5 points, which is 1.5 / sqrt(2) for one run.
ONE_SEED_SPREAD = 1.1
# Two-sided 95 % quantiles of Student's t by degrees of freedom; 2.0 beyond
T_QUANTILES = dict(enumerate((12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23), 1)) | {15: 2.13, 20: 2.09}


@dataclass(frozen=True)
class Result:
    """One variant, here and in the paper; one run for each seed."""

    variant: Variant
    histories: tuple[RunHistory, ...]
    linear: tuple[float, ...]  # top-1 of each run, percent

    @property
    def history(self) -> RunHistory:
        """The first seed's run, which is drawn."""
        return self.histories[0]

    @property
    def knn(self) -> tuple[float, ...]:
        """20-NN top-1 of each run after the last step, percent."""
        return tuple(history.knn_top1[-1] for history in self.histories)

    @property
    def spread(self) -> float:
        """Mean final z_std as a share of the healthy 1/sqrt(d): near 1 spread evenly, low where it has collapsed."""
        return fmean(history.z_std[-1] * math.sqrt(history.dim) for history in self.histories)


@dataclass(frozen=True)
class Interval:
    """A mean or a difference of means, and half its 95 % interval; nan where one run leaves it unknown."""

    value: float
    half: float

    def __str__(self) -> str:
        return f"{self.value:.1f}" if math.isnan(self.half) else f"{self.value:.1f} ± {self.half:.1f}"


def mean_of(accuracies: Sequence[float]) -> Interval:
    """Mean over the seeds, percent, with the interval of the spread from run to run."""
    runs = len(accuracies)
    half = _quantile(runs - 1) * stdev(accuracies) / math.sqrt(runs) if runs > 1 else math.nan
    return Interval(fmean(accuracies), half)


def difference_of(before: Sequence[float], after: Sequence[float], samples: int) -> Interval:
    """``after`` - ``before``, percent over ``samples`` validation images, one accuracy for each seed.

    The interval adds the variances of the runs and of the images (binomial); with one seed ONE_SEED_SPREAD stands in.
    """
    runs, means = len(before), (fmean(before), fmean(after))
    spreads = [stdev(side) if runs > 1 else ONE_SEED_SPREAD for side in (before, after)]
    images = 100**2 * sum(mean / 100 * (1 - mean / 100) for mean in means) / samples
    error = math.sqrt(sum(spread**2 for spread in spreads) / runs + images)
    return Interval(means[1] - means[0], error * (_quantile(2 * (runs - 1)) if runs > 1 else 2.0))


def _quantile(freedom: int) -> float:
    """Student's t: of the largest tabulated number of degrees of freedom that is not above ``freedom``."""
    return 2.0 if freedom >= 30 else T_QUANTILES[max(known for known in T_QUANTILES if known <= freedom)]


def write_report(
    table: PaperTable,
    variants: Sequence[Variant],
    folders: Mapping[str, Sequence[Path]],
    *,
    folder: Path,
    name: str,
    recipe: str,
    val_samples: int,
    command: str,
) -> Path:
    """Write NAME.md and NAME.png into ``folder`` from finished runs (``folders``: a run of each seed for each variant).

    Returns the page. Raises UserError for a full disk.
    """
    results = [read_result(variant, folders[variant.name]) for variant in variants]
    plan = read_object(folders[variants[0].name][0] / "plan.json")
    page = folder / f"{name}.md"
    text = describe(table, results, name=name, recipe=recipe, plan=plan, val_samples=val_samples, command=command)
    remedy = "name another folder with --docs"
    with disk_errors(f"writing {page}", f"cannot write {page}", remedy):
        folder.mkdir(parents=True, exist_ok=True)
        save_png(draw(table, results, recipe, floor_of(results, plan)), page.with_suffix(".png"), 120, remedy)
        with atomic_file(page) as file:
            file.write(text.encode())
    return page


def read_result(variant: Variant, run_dirs: Sequence[Path]) -> Result:
    """The finished runs of a variant, one for each seed."""
    summaries = [read_object(run / "linear" / SUMMARY_FILE) for run in run_dirs]
    return Result(variant, tuple(map(read_run, run_dirs)), tuple(summary["val_top1"] for summary in summaries))


def floor_of(results: Sequence[Result], plan: Mapping[str, Any]) -> float | None:
    """Lower bound of z_std x sqrt(d) with batch norm at the projector's output; None where the runs differ in it."""
    if plan["world_size"] > 1 or any(result.variant.batch or result.variant.method for result in results):
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
    seeds = "one seed" if len(first.linear) == 1 else f"{len(first.linear)} seeds"
    chance = f"; chance is {100 / first.history.classes:.3g}" if first.history.classes else ""
    lines = [
        f"# {table.title}",
        "",
        f"Chen & He 2020, {table.source}. Made by",
        "",
        f"    {command}",
        "",
        f"**Scale.** Here: {recipe}, {plan['num_samples']:,} images, {_length(results, plan)}, {seeds}; accuracies "
        f"over {val_samples:,} images. The paper: {PAPER_SCALE}. "
        "Only the order of the variants compares, not the distances.",
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
        _criterion(len(first.linear)),
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
    variant, loss = result.variant, fmean(history.loss[-1] for history in result.histories)
    paper = variant.paper_text if variant.paper_top1 is None else f"{variant.paper_top1:.1f}"
    accuracies = f"{mean_of(result.linear)} | {mean_of(result.knn)}"
    return f"| {variant.label} | {paper} | {accuracies} | {result.spread:.2f} | {loss:.3f} |"


def _criterion(seeds: int) -> str:
    spread = (
        f"a standard deviation of {ONE_SEED_SPREAD} points from run to run is assumed, as one seed does not show it"
        if seeds == 1
        else f"the spread from run to run is that of the {seeds} seeds, with Student's t"
    )
    return (
        "A difference has a sign where it exceeds its 95 % interval (after ±), which holds the number of validation "
        f"images and the spread of both variants; {spread}."
    )


def verdict(first: Result, other: Result, val_samples: int) -> str:
    """One line: whether a variant differs from the first one as in the paper, by the linear accuracy and by kNN."""
    label, paper = other.variant.label, other.variant.paper_top1
    here = {
        "linear": difference_of(first.linear, other.linear, val_samples),
        "20-NN": difference_of(first.knn, other.knn, val_samples),
    }
    texts = [f"{name} {found.value:+.1f} ± {found.half:.1f}" for name, found in here.items()]
    if paper is None or first.variant.paper_top1 is None:
        return f"- {label}: {other.variant.paper_text} in the paper; here {', '.join(texts)}"
    difference = paper - first.variant.paper_top1
    signs = [compare(difference, found) for found in here.values()]
    told = "; ".join(f"{text} ({sign})" for text, sign in zip(texts, signs, strict=True))
    return f"- {label}: {difference:+.1f} in the paper; here {told}"


def compare(paper_difference: float, here: Interval) -> str:
    """``same sign``, ``opposite sign`` or ``too close to tell``."""
    if abs(here.value) <= here.half:
        return "too close to tell"
    return "same sign" if here.value * paper_difference > 0 else "opposite sign"


def draw(table: PaperTable, results: Sequence[Result], recipe: str, floor: float | None) -> Figure:
    """Loss, z_std and kNN of the first seed as in the paper's figure 2, and mean linear accuracies beside the paper's.

    ``floor``: the lower bound of z_std x sqrt(d), if it is known.
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
    note = "dashed: 1/√d, spread over the whole sphere"
    if floor is not None:
        std_axes.axhline(floor / math.sqrt(results[0].history.dim), color=QUIET, linestyle=":", linewidth=1.0)
        note += "; dotted: 2/√batch of it"
    std_axes.set_title(note, loc="right", fontsize=9, color=INK)
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
    means = [mean_of(result.linear) for result in results]
    for place, (result, mean, colour) in enumerate(zip(results, means, COLOURS, strict=False)):
        paper = result.variant.paper_top1
        axes.bar(place - 0.2, paper or 0.0, width=0.36, color=PAPER_COLOUR)
        axes.bar(place + 0.2, mean.value, width=0.36, color=colour)
        if not math.isnan(mean.half):
            axes.errorbar(place + 0.2, mean.value, yerr=mean.half, color=INK, linewidth=1, capsize=3)
        text = result.variant.paper_text if paper is None else f"{paper:.1f}"
        axes.text(place - 0.2, (paper or 0.0) + 1, text, ha="center", fontsize=8, color=QUIET)
        top = mean.value + (0.0 if math.isnan(mean.half) else mean.half)
        axes.text(place + 0.2, top + 1, f"{mean.value:.1f}", ha="center", fontsize=8, color=INK)
    axes.set_xticks(range(len(results)), [result.variant.label.replace(" ", "\n", 1) for result in results], fontsize=8)
    highest = [mean.value for mean in means] + [result.variant.paper_top1 or 0.0 for result in results]
    axes.set_ylim(0, 1.15 * max(highest))
    axes.set_ylabel("linear top-1 (%)")
    axes.set_title("grey: the paper, ImageNet; colour: here", loc="right", fontsize=9, color=INK)
