"""The scale of an experiment on this machine: which encoder, what an epoch costs, how many epochs the budget allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.system import duration
from pipeline.dataset.dataset import ShardSet
from tools.reproduction.paper_tables import PaperTable, Variant

PILOT_STEPS = 24
KNN_ALONG = 4  # kNN accuracies along a run, besides the untrained one
RESERVE = 0.9  # share of the budget that is planned; the rest is for runs that are slower than the pilot
SMALL_IMAGE = 64  # px; larger images get resnet50 at 224 px


@dataclass(frozen=True)
class Recipe:
    """Settings shared by all variants of a sweep, for a kind of machine and image."""

    name: str
    pretrain: tuple[str, ...]  # flags, beside those for epochs, batch and kNN
    batch: int
    linear: tuple[str, ...]
    most_epochs: int  # the paper's; more would be another experiment


RECIPES = {
    # The predictor stays a quarter as wide as z, also where a table varies --dim.
    "cpu": Recipe(
        "resnet_tiny at 32 px",
        ("--recipe", "demo", "--predictor-hidden", "None", "--knn-bank-size", "5000"),
        batch=128,
        linear=("--features-cache", "--fraction", "0.4", "--epochs", "30", "--global-batch", "256"),
        most_epochs=800,
    ),
    "gpu-small": Recipe(
        "resnet18 with the CIFAR stem at 32 px",
        ("--recipe", "cifar10-800ep"),
        batch=512,
        linear=("--features-cache", "--epochs", "90", "--global-batch", "256"),
        most_epochs=800,
    ),
    # The paper's; a tenth of the labels keeps the cached features small.
    "gpu-large": Recipe(
        "resnet50 at 224 px",
        ("--backbone", "resnet50"),
        batch=512,
        linear=("--features-cache", "--fraction", "0.1", "--epochs", "90", "--global-batch", "1024"),
        most_epochs=100,
    ),
}
# Learning rates of the linear classifiers, trained in one pass over the features; the best is reported.
LINEAR_RATES = "0.1,0.3,1.0,3.0,10.0,30.0,100.0"


@dataclass(frozen=True)
class Pilot:
    """Measured times of a few steps and one evaluation, s."""

    step_s: float
    start_s: float
    knn_s: float
    linear_s: float

    @property
    def whole_s(self) -> float:
        """Time of the pilot itself."""
        return self.start_s + self.knn_s + PILOT_STEPS * self.step_s + self.linear_s


@dataclass(frozen=True)
class Scale:
    """Fixed when the sweep begins, and kept in scale.json."""

    table: str
    data: str  # fingerprints
    val_data: str
    budget: float
    device: str
    seed: int
    recipe: str  # key of RECIPES
    epochs: int
    seeds: int = 1


def choose_recipe(device: str, train: ShardSet) -> str:
    """Key of RECIPES, by the device and the median size of the images."""
    if device == "cpu":
        return "cpu"
    some = np.linspace(0, train.num_samples - 1, min(1000, train.num_samples)).astype(np.int64)
    side = float(np.median(train.sizes(some).min(axis=1)))
    return "gpu-small" if side <= SMALL_IMAGE else "gpu-large"


def fitting(table: PaperTable, num_samples: int) -> list[Variant]:
    """The variants whose batch leaves at least two steps an epoch."""
    return [variant for variant in table.variants if (variant.batch or 0) * 2 <= num_samples]


def knn_every(epochs: int) -> int:
    """Epochs between two kNN accuracies of a run."""
    return math.ceil(epochs / KNN_ALONG)


def fit_epochs(table: PaperTable, pilot: Pilot, recipe: Recipe, num_samples: int, budget: float, seeds: int) -> int:
    """Epochs with which all variants and seeds end within ``budget`` minutes. Raises UserError if too few remain."""
    variants = fitting(table, num_samples)
    runs = f"{len(variants)} variants" + (f" with {seeds} seeds each" if seeds > 1 else "")
    epoch_s = pilot.step_s * (num_samples // recipe.batch)

    def seconds(epochs: int) -> float:
        along_s = (1 + math.ceil(epochs / knn_every(epochs))) * pilot.knn_s
        fixed_s = seeds * len(variants) * (pilot.start_s + along_s + pilot.linear_s)
        return (pilot.whole_s + fixed_s + epochs * epoch_s * seeds * sum(v.cost for v in variants)) / RESERVE

    epochs = max((n for n in range(1, recipe.most_epochs + 1) if seconds(n) <= 60 * budget), default=0)
    print(
        f"pilot: a step takes {pilot.step_s:.3g} s, an epoch {duration(epoch_s)}, a kNN accuracy "
        f"{duration(pilot.knn_s)}, a linear one {duration(pilot.linear_s)}; {runs} of {epochs} epochs "
        f"fit into {budget:g} minutes"
    )
    if epochs < table.least_epochs:
        least = math.ceil(seconds(table.least_epochs) / 60)
        raise UserError(
            f"--budget {budget:g} minutes is too little: {runs} of at least {table.least_epochs} "
            f"epoch(s) over {num_samples:,} images need {least} minutes here; take --budget {least} or more, or "
            "fewer images (make_shards.py --limit)"
        )
    return epochs
