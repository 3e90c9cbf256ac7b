"""Draw images and all their views as training makes them, with the drawn parameters beneath.

    python tools/preview_views.py DATA OUT.png
    python tools/preview_views.py DATA OUT.png --run-dir RUN                  views, seed and mean colours of a run
    python tools/preview_views.py DATA OUT.png --recipe cifar10-800ep         views of a recipe of train/pretrain.py
    python tools/preview_views.py DATA OUT.png --method simclr --hue 0.2      any flag of the views overrides
    python tools/preview_views.py DATA OUT.png --compare                      DALI, torchvision and their difference

A view's parameters are its crop (width x height + left + top, px of the image), the colour operations in the order
in which they were applied, gray, the blur's standard deviation in px, solarize and flip.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.backends.reference import decode
from pipeline.backends.select import choose_backend
from pipeline.common.errors import UserError, check_seed, exit_on_user_error, require
from pipeline.common.flags import group
from pipeline.common.locations import DatasetPlace, InputPath, LocalPath
from pipeline.dataset.dataset import ShardSet, require_rgb
from pipeline.dataset.remote_cache import CacheConfig
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import ViewBatch, open_views
from pipeline.sampling.sampler import BatchSampler, World
from pipeline.sampling.views import PAIR_EPOCHS, ViewParams, ViewRecipe, draw_views
from pipeline.sharding.index_cache import with_index
from tools.common.plot_style import save_png
from train.config.config_file import config_from, read_settings
from train.config.recipes import parse_config
from train.config.run_config import PretrainConfig, RecipeName
from train.storage.run_folder import CONFIG_FILE

DIFFERENCE_GAIN = 16  # differences are a few of 255, too small to see
CHARACTERS_PER_INCH = 19  # of the footer
CELL_INCHES = 1.5
TEXT_INCHES = 0.55  # height of the parameters beneath a view
OPERATIONS = ("brightness", "contrast", "saturation", "hue")  # as numbered in ViewParams.order
BackendName = Literal["dali", "torchvision"]


@dataclass(frozen=True)
class PreviewConfig:
    """Flags of preview_views.py."""

    data: Annotated[DatasetPlace, tyro.conf.Positional]
    """Dataset folder of make_shards.py."""
    out: Annotated[LocalPath, tyro.conf.Positional]
    """PNG to write."""
    run_dir: InputPath | None = None
    """Show the views of this run: its recipe and its seed."""
    recipe: RecipeName | None = None
    """Show the views of this recipe of train/pretrain.py."""
    method: str | None = None
    """Show the views of this method, as --method of train/pretrain.py."""
    samples: int = 8
    """Number of images, from the beginning of the epoch's order."""
    seed: int = 0
    """Seed of the order and the views (default: that of the run or recipe, else 0)."""
    epoch: int = 0
    """Epoch whose views are shown, from 0."""
    compare: bool = False
    """Show each view by DALI and by torchvision, and their difference."""
    backend: Literal["auto", "dali", "torchvision"] = "auto"
    """Back end that makes the views; auto: DALI where it is installed."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device of DALI."""
    views: Annotated[ViewRecipe, group("views")] = field(default_factory=ViewRecipe)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        require("--epoch", self.epoch, 0 <= self.epoch < PAIR_EPOCHS, f"epochs are numbered 0 .. {PAIR_EPOCHS - 1}")
        one = self.run_dir is None or (self.recipe is None and self.method is None)
        require("--run-dir", self.run_dir, one, "a run has its own recipe and method; leave out --recipe and --method")
        rule = "it shows both back ends; leave out --backend"
        require("--compare with --backend", self.backend, not self.compare or self.backend == "auto", rule)


def main() -> None:
    """The command."""
    config = tyro.cli(PreviewConfig, default=defaults_of(sys.argv[1:]), description=__doc__)
    rule = "the image is written as PNG; give a name that ends in .png"
    require("OUT", config.out, config.out.suffix.lower() == ".png", rule)
    dataset = ShardSet.open(with_index(config.data, CacheConfig()))
    if not 1 <= config.samples <= dataset.num_samples:
        raise UserError(f"--samples {config.samples}: {config.data} has {dataset.num_samples}; choose 1 up to that")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible here; use --device cpu")
    names = backends_of(config)
    require_rgb(dataset, "a preview of views")
    batches = {name: first_views(dataset, config, name) for name in names}
    first = batches[names[0]]
    params = draw_views(config.views, config.seed, config.epoch, first.ids, dataset.sizes(first.sources))
    save_png(draw(dataset, config.views, batches, params), config.out, dpi=110)
    print(f"{config.out}: {config.samples} images and their views by {' and '.join(names)}")


def defaults_of(words: list[str]) -> PreviewConfig:
    """Defaults of the flags: those of the run, recipe or method that ``words`` name. Raises UserError for a bad run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--run-dir", "--recipe", "--method"):
        parser.add_argument(flag)
    try:
        given, _ = parser.parse_known_args(words)
    except argparse.ArgumentError:  # a flag without its value, which tyro reports
        given = argparse.Namespace(run_dir=None, recipe=None, method=None)
    views, seed = ViewRecipe(), 0
    if given.run_dir is not None:
        views, seed = views_of_run(Path(given.run_dir))
    elif given.recipe is not None or given.method is not None:
        named = {"--recipe": given.recipe, "--method": given.method}
        flags = [word for flag, value in named.items() if value is not None for word in (flag, value)]
        run = parse_config(["--data", "unused", "--run-dir", "unused", *flags])
        views, seed = run.views, run.seed
    return PreviewConfig(tyro.MISSING, tyro.MISSING, seed=seed, views=views)


def views_of_run(run_dir: Path) -> tuple[ViewRecipe, int]:
    """Recipe and seed in the config.json of a run. Raises UserError if there is none, or none that is understood."""
    source = f"--run-dir {run_dir}: {run_dir / CONFIG_FILE}"
    settings = read_settings(run_dir / CONFIG_FILE, source)
    if "views" not in settings:
        raise UserError(f"{source} has no views: name the folder of a run")
    # The model would need the run's backbone, which may be code of the user's own.
    known = {name: value for name, value in settings.items() if name in ("method", "views", "seed")}
    run = config_from(known, PretrainConfig(data=Path(), run_dir=run_dir), source)
    return run.views, run.seed


def backends_of(config: PreviewConfig) -> list[BackendName]:
    """The back ends that make the views. Raises UserError where one is not installed."""
    if config.compare:
        return [choose_backend("dali")[0], "torchvision"]
    return [choose_backend(config.backend)[0]]


def first_views(dataset: ShardSet, config: PreviewConfig, backend: BackendName) -> ViewBatch:
    """The views of the first samples of the epoch."""
    device = torch.device(config.device if backend == "dali" else "cpu")
    with open_views(
        dataset,
        config.views,
        LoaderConfig(backend=backend),
        BatchSampler(config.seed, config.samples, config.epoch + 1, start_epoch=config.epoch),
        World.alone(device),
    ) as batches:
        return next(batches)


def to_bytes(view: Tensor, recipe: ViewRecipe) -> np.ndarray:
    """Undo the normalisation: float ``[n, 3, s, s]`` to uint8 ``[n, s, s, 3]``."""
    std, mean = (torch.tensor(values)[:, None, None] for values in (recipe.std, recipe.mean))
    pixels = (view.float().cpu() * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def describe(params: ViewParams, recipe: ViewRecipe, sample: int, view: int) -> str:
    """The drawn parameters of one view, a line for each kind."""
    top, left, height, width = params.crop[sample, view].tolist()
    lines = [f"{width}x{height}+{left}+{top}{' flip' if params.flip[sample, view] else ''}"]
    if params.jitter[sample, view]:
        factors = params.factors[sample, view]
        lines.append(" ".join(f"{OPERATIONS[of][0]}{factors[of]:.2f}" for of in params.order[sample, view].tolist()))
    more = ["gray"] if params.gray[sample, view] else []
    more += [f"blur {params.sigma[sample, view]:.1f}"] if params.sigma[sample, view] > 0 else []
    more += ["solarize"] if params.solarize[sample, view] else []
    drawn = params.extra[sample, view]
    more += [name.replace("_", " ") for name, (at, one) in recipe.extra.active().items() if drawn[at, 0] < one.prob]
    return "\n".join([*lines, " ".join(more)]).strip()


def draw(dataset: ShardSet, recipe: ViewRecipe, batches: dict[BackendName, ViewBatch], params: ViewParams) -> Figure:
    """A row for each sample: the original, then each view by each back end, and with two of them their difference."""
    first = next(iter(batches.values()))
    originals = [decode(dataset.read(int(source))).permute(1, 2, 0).numpy() for source in first.sources]
    columns: list[tuple[str, list[np.ndarray], int | None]] = [("original", originals, None)]
    for view, own in enumerate(recipe.per_view):
        title = f"view {view + 1}, {own.image_size} px"
        pixels = {name: to_bytes(made.views[view], recipe) for name, made in batches.items()}
        several = len(pixels) > 1
        columns += [(f"{title}\n{name}" if several else title, list(made), view) for name, made in pixels.items()]
        if several:
            one, other = (made.astype(np.int16) for made in pixels.values())
            gained = np.minimum(np.abs(one - other) * DIFFERENCE_GAIN, 255).astype(np.uint8)
            columns.append((f"{title}\n|difference| x {DIFFERENCE_GAIN}", list(gained), None))
    rows = len(first.ids)
    size = (CELL_INCHES * len(columns), (CELL_INCHES + TEXT_INCHES) * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, images, of) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=8)
        for row, image in enumerate(images):
            cell = axes[row, column]
            cell.imshow(image, interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            cell.spines[:].set_visible(False)
            text = f"sample {first.ids[row]}" if of is None else describe(params, recipe, row, of)
            if of is not None or column == 0:
                cell.set_xlabel(text, fontsize=6, linespacing=1.3)
    footer = (
        "crop: width x height + left + top, px; b c s h: brightness, contrast, saturation, hue in the order applied"
    )
    footer = textwrap.fill(footer, int(size[0] * CHARACTERS_PER_INCH))
    figure.supxlabel(footer, fontsize=6, x=0.01, ha="left")
    return figure


if __name__ == "__main__":
    exit_on_user_error(main)
