"""What multi-crop costs the CPU loader: python benchmarks/multi_crop.py DATASET

Compares 2 x 224 px with 2 x 224 + 6 x 96 px (SwAV, Caron et al. 2020; crop scales of its official script): the whole
loader, and each of its stages alone. The recipes run in turn on the same images. Each image is decoded once for all its
views, so the decode stage is measured once and its cost does not depend on the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro

from pipeline.common.errors import UserError, check_at_least_1, exit_on_user_error
from pipeline.common.locations import InputPath, LocalPath
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_views
from pipeline.sampling.order import OrderConfig
from pipeline.sampling.sampler import BatchSampler, World
from pipeline.sampling.views import ViewGroup, ViewRecipe
from tools.common.measuring import Run, Spread, alternate, describe_machine, ratio, write_results
from tools.throughput.stages import Bench, make_stages

SMALL = ViewGroup(count=6, image_size=96, crop_scale=(0.05, 0.14))
RECIPES = {
    "2 x 224": ViewRecipe(crop_scale=(0.14, 1.0)),
    "2 x 224 + 6 x 96": ViewRecipe(crop_scale=(0.14, 1.0), more_views=(SMALL,)),
}


@dataclass(frozen=True)
class Config:
    """Flags of multi_crop.py."""

    data: Annotated[InputPath, tyro.conf.Positional]
    """Dataset folder of make_shards.py."""
    batch: int = 64
    """Images of a batch."""
    repeats: int = 5
    """Runs of each recipe and stage after a warm-up."""
    json: LocalPath | None = None
    """Write the results to this JSON file."""

    def __post_init__(self) -> None:
        for flag in ("batch", "repeats"):
            check_at_least_1(f"--{flag}", getattr(self, flag))


def measure(config: Config, dataset: ShardSet) -> dict[str, dict[str, list[Run]]]:
    """Runs by stage and recipe, all in turn."""
    batches = dataset.num_samples // config.batch
    with ExitStack() as opened:
        works: dict[str, Callable[[], None]] = {}
        for name, recipe in RECIPES.items():
            device = torch.device("cpu")
            bench = Bench(
                dataset, recipe, LoaderConfig(), OrderConfig(), config.batch, 0, 1, device=device, dtype=torch.float32
            )
            stages = make_stages(bench, None)
            for stage in ("crops", "photometric", *(("decode",) if name == "2 x 224" else ())):
                advance = opened.enter_context(stages[stage].open())  # type: ignore[index]
                works[f"{stage}, {name}"] = lambda advance=advance: advance(batches)  # type: ignore[misc]

            def load(recipe: ViewRecipe = recipe) -> None:
                """An epoch to its end, so that no batch is made that is not counted."""
                sampler = BatchSampler(seed=0, global_batch=config.batch, epochs=1)
                with open_views(dataset, recipe, LoaderConfig(), sampler, World.alone(torch.device("cpu"))) as views:
                    for _ in views:
                        pass

            works[f"loader, {name}"] = load
        runs = alternate(works, config.repeats)
    found: dict[str, dict[str, list[Run]]] = {}
    for key, measured in runs.items():
        stage, _, name = key.partition(", ")
        found.setdefault(stage, {})[name] = measured
    return found


def main() -> None:
    """The command."""
    config = tyro.cli(Config, description=__doc__)
    dataset = ShardSet.open(config.data)
    if dataset.num_samples < config.batch:
        raise UserError(f"{config.data} has {dataset.num_samples} samples, fewer than --batch {config.batch}")
    print(describe_machine(), flush=True)
    images, results = dataset.num_samples // config.batch * config.batch, {}
    two, multi = RECIPES
    print(f"{images} images a run, {config.repeats} runs each in turn; median (minimum .. maximum)")
    for stage, runs in measure(config, dataset).items():
        for name, of in runs.items():
            rate = Spread.of([images / run.wall_s for run in of])
            cpu_ms = Spread.of([1e3 * run.cpu_s / images for run in of])
            results[f"{stage}, {name}"] = {"images_per_s": rate, "cpu_ms_per_image": cpu_ms}
            print(f"{stage:12} {name:18} {rate!s:>28} images/s {cpu_ms!s:>28} CPU ms an image", flush=True)
        if len(runs) == 2:
            slower, dearer = ratio(runs, two, multi), ratio(runs, two, multi, "cpu_s")
            results[f"{stage}, ratio"] = {"time": slower, "cpu_time": dearer}
            print(f"{stage:12} {multi} takes {slower} times the time and {dearer} times the CPU time of {two}")
    if config.json:
        write_results(config.json, results)


if __name__ == "__main__":
    exit_on_user_error(main)
