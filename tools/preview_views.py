"""Draw originals and their views, as training will see them: python tools/preview_views.py DATA OUT.png

With --backend both (the default where DALI is installed) each view is shown by DALI and by torchvision, with their
difference, so that a person can see that they agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from jaxtyping import UInt8
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.backends.reference import decode
from pipeline.backends.select import choose_backend
from pipeline.common.errors import UserError, check_seed, exit_on_user_error, require
from pipeline.common.locations import Location
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import ViewBatch, open_views
from pipeline.sampling.sampler import BatchSampler, World
from pipeline.sampling.views import PAIR_EPOCHS, ViewRecipe

DIFFERENCE_GAIN = 16  # differences are a few of 255; shown as they are, nobody would see them
CELL_INCHES = 1.5


@dataclass(frozen=True)
class PreviewConfig:
    """Originals and their views in one image."""

    data: Annotated[Location, tyro.conf.Positional]
    """Dataset folder, as tools/make_shards.py wrote it."""
    out: Annotated[Path, tyro.conf.Positional]
    """The PNG to write."""
    samples: int = 8
    """Images to show: the first of the epoch's order."""
    seed: int = 0
    """The run's seed."""
    epoch: int = 0
    """The epoch whose views are shown, from 0."""
    backend: Literal["both", "dali", "torchvision"] | None = None
    """Who makes the views; default: both where DALI is installed, else torchvision."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where DALI works."""
    recipe: Annotated[ViewRecipe, tyro.conf.arg(name="")] = field(default_factory=ViewRecipe)


def main() -> None:
    """The command."""
    config = tyro.cli(PreviewConfig, description=__doc__)
    dataset = ShardSet.open(config.data)
    check(config, dataset)
    names = backends_of(config)
    figure = draw(dataset, config.recipe, {name: first_views(dataset, config, name) for name in names})
    try:
        figure.savefig(config.out, dpi=110)
    except OSError as error:
        raise UserError(f"cannot write {config.out}: {error.strerror}; choose another place") from error
    print(f"{config.out}: {config.samples} images and their views by {' and '.join(names)}")


def check(config: PreviewConfig, dataset: ShardSet) -> None:
    """Raise UserError for what cannot be shown."""
    check_seed(config.seed)
    require("--epoch", config.epoch, 0 <= config.epoch < PAIR_EPOCHS, f"epochs are numbered 0 .. {PAIR_EPOCHS - 1}")
    if not 1 <= config.samples <= dataset.num_samples:
        raise UserError(f"--samples {config.samples}: {config.data} has {dataset.num_samples}; choose 1 up to that")
    if config.out.suffix.lower() != ".png":
        raise UserError(f"{config.out}: the image is written as PNG; give a name that ends in .png")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible here; use --device cpu")


def backends_of(config: PreviewConfig) -> list[Literal["dali", "torchvision"]]:
    """Who makes the views."""
    match config.backend:
        case "both":
            choose_backend("dali")  # an error where it is not installed
            return ["dali", "torchvision"]
        case None:
            return ["dali", "torchvision"] if choose_backend("auto")[0] == "dali" else ["torchvision"]
        case name:
            return [choose_backend(name)[0]]


def first_views(dataset: ShardSet, config: PreviewConfig, backend: Literal["dali", "torchvision"]) -> ViewBatch:
    """The views of the first samples of the epoch."""
    device = torch.device(config.device if backend == "dali" else "cpu")
    with open_views(
        dataset,
        config.recipe,
        LoaderConfig(backend=backend),
        BatchSampler(config.seed, config.samples, config.epoch + 1, start_epoch=config.epoch),
        World.alone(device),
    ) as batches:
        return next(batches)


def to_bytes(view: Tensor, recipe: ViewRecipe) -> UInt8[np.ndarray, "n s s 3"]:
    """Undo the normalisation."""
    std, mean = (torch.tensor(values)[:, None, None] for values in (recipe.std, recipe.mean))
    pixels = (view.float().cpu() * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def draw(dataset: ShardSet, recipe: ViewRecipe, views: dict[str, ViewBatch]) -> Figure:
    """One row a sample: the original, then each view by each back end, then how far they differ."""
    first = next(iter(views.values()))
    columns: list[tuple[str, list[np.ndarray]]] = [
        ("original", [decode(dataset.read(int(source))).permute(1, 2, 0).numpy() for source in first.sources])
    ]
    for view in range(len(first.views)):
        title = f"view {view + 1}"
        pixels = {name: to_bytes(made.views[view], recipe) for name, made in views.items()}
        columns += [(f"{title}\n{name}", list(made)) for name, made in pixels.items()]
        if len(pixels) == 2:
            one, other = (made.astype(np.int16) for made in pixels.values())
            gained = np.minimum(np.abs(one - other) * DIFFERENCE_GAIN, 255).astype(np.uint8)
            columns.append((f"{title}\n|difference| x {DIFFERENCE_GAIN}", list(gained)))
    rows = len(first.ids)
    figure = Figure(figsize=(CELL_INCHES * len(columns), CELL_INCHES * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=8)
        for row, image in enumerate(images):
            axes[row, column].imshow(image, interpolation="nearest")
            axes[row, column].set_axis_off()
    for row, sample in enumerate(first.ids):
        axes[row, 0].set_title(f"{'original' if row == 0 else ''}\nsample {sample}".strip(), fontsize=8)
    return figure


if __name__ == "__main__":
    exit_on_user_error(main)
