"""Plot a pretraining run: python tools/plot_run.py RUN_DIR [OUT.png]

Three panels over the same steps: the loss (of other methods than SimSiam beside that of an encoder that tells no two
samples apart), z_std beside its healthy value 1/sqrt(d), and the kNN accuracy from the untrained encoder on. A run can
be plotted at any time, also while it trains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.locations import InputPath, LocalPath
from tools.common.plot_style import INK, QUIET, save_png
from train.storage.run_folder import RunHistory, read_run

LOSS_COLOUR, STD_COLOUR, KNN_COLOUR = "#1f5fa8", "#b4511d", "#1d7a4f"


@dataclass(frozen=True)
class PlotConfig:
    """Flags of plot_run.py."""

    run_dir: Annotated[InputPath, tyro.conf.Positional]
    """Run folder, as train/pretrain.py wrote it."""
    out: Annotated[LocalPath | None, tyro.conf.Positional] = None
    """PNG to write (default: RUN_DIR/plot.png)."""


def main() -> None:
    """The command."""
    config = tyro.cli(PlotConfig, description=__doc__)
    out = config.run_dir / "plot.png" if config.out is None else config.out
    if out.suffix.lower() != ".png":
        raise UserError(f"{out}: the plot is written as PNG; give a name that ends in .png")
    save_png(draw(read_run(config.run_dir)), out, dpi=130)
    print(out)


def draw(run: RunHistory) -> Figure:
    """Three panels over the steps; the third one is empty, with a note, if the run has no kNN accuracies."""
    figure = Figure(figsize=(8, 8.4), layout="constrained")
    figure.suptitle(f"{run.method} run {run.name}\n{run.title}", fontsize=11, color=INK)
    loss_axes, std_axes, knn_axes = figure.subplots(3, 1, sharex=True)
    _draw_loss(loss_axes, run)
    _draw_std(std_axes, run)
    _draw_knn(knn_axes, run)
    for axes in (loss_axes, std_axes, knn_axes):
        axes.grid(color="#e4e7ea", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    knn_axes.set_xlabel("optimizer steps")
    knn_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    knn_axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    per_epoch = run.steps_per_epoch
    epochs = loss_axes.secondary_xaxis("top", functions=(lambda s: s / per_epoch, lambda e: e * per_epoch))
    epochs.set_xlabel("epochs")
    epochs.spines["top"].set_visible(False)
    return figure


def _draw_loss(axes: Axes, run: RunHistory) -> None:
    axes.plot(run.steps, run.loss, color=LOSS_COLOUR, linewidth=1.6, marker="." if len(run.steps) < 3 else None)
    if run.method == "simsiam":
        axes.set_ylim(-1.04, max(0.04, 1.05 * _highest(run.loss)))
        axes.set_ylabel("loss\n(negative cosine, −1 to 1)")
        return
    axes.set_ylim(0, 1.05 * max(_highest(run.loss), run.stuck_loss or 0.0) or 1.0)
    axes.set_ylabel("loss")
    if run.stuck_loss is not None:
        axes.axhline(run.stuck_loss, color=QUIET, linestyle="--", linewidth=1.2)
        axes.set_title(f"dashed: no two samples told apart, {run.stuck_loss:.4g}", loc="right", fontsize=10, color=INK)


def _draw_std(axes: Axes, run: RunHistory) -> None:
    healthy = 1 / math.sqrt(run.dim)
    axes.axhline(healthy, color=QUIET, linestyle="--", linewidth=1.2)
    axes.plot(run.steps, run.z_std, color=STD_COLOUR, linewidth=1.6, marker="." if len(run.steps) < 3 else None)
    axes.set_ylim(0, 1.25 * max(healthy, _highest(run.z_std)))
    axes.set_ylabel("std of l2-normalised z\n(low = collapsed)")
    axes.set_title(f"dashed: healthy, 1/√{run.dim} = {healthy:.4f}", loc="right", fontsize=10, color=INK)


def _draw_knn(axes: Axes, run: RunHistory) -> None:
    axes.set_ylabel("kNN top-1 (%)")
    if not run.knn_top1:
        axes.set_yticks([])
        axes.text(
            0.5, 0.5, "no kNN accuracy in this run", ha="center", va="center", color=QUIET, transform=axes.transAxes
        )
        return
    axes.plot(run.knn_steps, run.knn_top1, color=KNN_COLOUR, linewidth=1.6, marker="o", markersize=4.5)
    axes.set_ylim(0, min(105.0, 1.15 * max(run.knn_top1)))
    first, last = run.knn_top1[0], run.knn_top1[-1]
    notes = [f"untrained {first:.1f} %"] if run.knn_steps[0] == 0 else []
    notes += [f"last {last:.1f} %"] if len(run.knn_top1) > len(notes) else []
    if run.classes:
        chance = 100 / run.classes
        axes.axhline(chance, color=QUIET, linestyle="--", linewidth=1.2)
        notes.append(f"dashed: chance {chance:.3g} %")
    axes.set_title(", ".join(notes), loc="right", fontsize=10, color=INK)


def _highest(values: tuple[float, ...]) -> float:
    """The highest finite value; a diverged run has others, which the curve leaves out."""
    return max((value for value in values if math.isfinite(value)), default=0.0)


if __name__ == "__main__":
    exit_on_user_error(main)
