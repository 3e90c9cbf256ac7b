"""The whole CPU loader against a rewrite of the official one: python benchmarks/loader_vs_official.py DATASET

The official loader is that of facebookresearch/simsiam's main_simsiam.py: an image folder, PIL, torchvision's
transforms with PIL's Gaussian blur, and a DataLoader with as many worker processes as cores. Both read the same images
with the same recipe on the same cores, in turn. Reported: source images per second and CPU milliseconds an image.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.locations import InputPath, LocalPath
from pipeline.common.system import share_of_cores
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.loader.loader import open_views
from pipeline.sampling.sampler import BatchSampler, World
from pipeline.sampling.views import ViewRecipe
from tools.common.measuring import Spread, alternate, describe_machine, ratio, write_results


@dataclass(frozen=True)
class Config:
    """Flags of loader_vs_official.py."""

    data: Annotated[InputPath, tyro.conf.Positional]
    """Dataset folder; its images are copied to a temporary image folder for the official loader."""
    samples: int = 1000
    """Largest number of images of a run."""
    batch: int = 64
    """Images a batch."""
    repeats: int = 5
    """Runs of each after a warm-up."""
    json: LocalPath | None = None
    """Write the results to this JSON file."""


class PilBlur:
    """Gaussian blur of a radius drawn from ``sigma``, as MoCo v2 and SimSiam do it."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        """``sigma``: from, to; px."""
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*self.sigma)))


class TwoViews:
    """Two draws of one transform."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        """``transform`` draws anew at each call."""
        self.transform = transform

    def __call__(self, image: Image.Image) -> list[torch.Tensor]:
        return [self.transform(image), self.transform(image)]


def official_loader(folder: Path, recipe: ViewRecipe, batch: int, workers: int) -> DataLoader:
    """The official loader: two views of ``recipe`` by PIL and torchvision."""
    jitter = transforms.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(recipe.image_size, scale=recipe.crop_scale),
            transforms.RandomApply([jitter], p=recipe.jitter_prob),
            transforms.RandomGrayscale(p=recipe.gray_prob),
            transforms.RandomApply([PilBlur(recipe.blur_sigma)], p=recipe.blur_prob),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean=recipe.mean, std=recipe.std),
        ]
    )
    dataset = datasets.ImageFolder(str(folder), TwoViews(transform))
    return DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, drop_last=True)


def write_folder(dataset: ShardSet, samples: int, folder: Path) -> None:
    """Write the images as the official loader reads them: files in a class folder."""
    (folder / "class").mkdir()
    for sample in range(samples):
        (folder / "class" / f"{sample:06d}.jpg").write_bytes(dataset.read(sample))


def main() -> None:
    """The command."""
    config = tyro.cli(Config, description=__doc__)
    dataset = ShardSet.open(config.data)
    samples = min(config.samples, dataset.num_samples) // config.batch * config.batch
    if samples == 0:
        raise UserError(f"{config.data} has {dataset.num_samples} samples, fewer than --batch {config.batch}")
    recipe, cores = ViewRecipe(), share_of_cores(1)
    folder = Path(tempfile.mkdtemp(prefix="official-"))

    def ours() -> None:
        with open_views(
            dataset,
            recipe,
            LoaderConfig(threads=cores),
            BatchSampler(seed=0, global_batch=config.batch, epochs=1),
            World.alone(torch.device("cpu")),
        ) as batches:
            for _, _views in zip(range(samples // config.batch), batches, strict=False):
                pass

    def official() -> None:
        for _ in official_loader(folder, recipe, config.batch, cores):
            pass

    print(describe_machine(), flush=True)
    try:
        write_folder(dataset, samples, folder)
        runs = alternate({"siamstream": ours, "official": official}, config.repeats)
    finally:
        shutil.rmtree(folder)
    rates = {name: Spread.of([samples / run.wall_s for run in of]) for name, of in runs.items()}
    cpu_ms = {name: Spread.of([1e3 * run.cpu_s / samples for run in of]) for name, of in runs.items()}
    faster, cheaper = ratio(runs, "siamstream", "official"), ratio(runs, "siamstream", "official", "cpu_s")
    print(f"{samples} images, {cores} cores, {config.repeats} runs each in turn; median (minimum .. maximum)")
    print(f"{'':12} {'images/s':>24} {'CPU ms/image':>24}")
    for name in runs:
        print(f"{name:12} {rates[name]!s:>24} {cpu_ms[name]!s:>24}")
    print(f"siamstream is {faster} times as fast, and {cheaper} times as cheap in CPU time")
    if config.json:
        write_results(config.json, {"images_per_s": rates, "cpu_ms_per_image": cpu_ms, "speed_ratio": faster})


if __name__ == "__main__":
    exit_on_user_error(main)
