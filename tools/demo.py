"""The whole job at laptop size, command by command: python tools/demo.py [--images SOURCE] [--method NAME]

Shards a training and a test set, pretrains a small ResNet at 32 px with the demo's recipe, measures 20-NN accuracy
before and after, and draws a preview of the views and a plot of the run. Every command is printed before it runs and
can be used on a real job. About 600 steps of 128 images, some minutes on 2 CPU cores; a GPU is used if there is one.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from model.methods.registry import method_config
from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.locations import WDS, LocalPath, PathText
from pipeline.dataset.dataset import ShardSet
from tools.common.own_commands import after_python
from tools.reproduction.method_flags import method_flags, view_flags

MAKE_SHARDS = "python tools/make_shards.py"
TRAIN_NAMES, TEST_NAMES = ("train", "training"), ("test", "val", "valid", "validation")
TEST_IMAGES = 1024  # of the synthetic source; at 50 % accuracy its standard error is 1.6 points
TEST_LIMIT = 2000  # images taken from the user's test set
TEST_SEED = 1  # the synthetic training set has seed 0
LARGEST_BATCH = 128  # small batches make many steps of few images; the paper's table 2: 67.3 at 128, 68.1 at 256
FEWEST_IMAGES = 16
EVALUATIONS = 12  # kNN accuracies along the run, besides the untrained one


@dataclass(frozen=True)
class DemoConfig:
    """Flags of demo.py."""

    images: PathText = ""
    """Your images, as SOURCE of tools/make_shards.py: a folder, a tar, parquet files. Empty: synthetic images."""
    out: LocalPath = Path("demo")
    """Folder for all output; the output of an earlier demo is replaced."""
    subtree: str = ""
    """Folder inside --images to train on. Empty: train/ if there are train/ and test/ or val/, else all."""
    test_subtree: str = ""
    """Folder inside --images for the kNN accuracy. Empty: test/ or val/ if there is one, else a tenth is held out."""
    labels: PathText = "auto"
    """Source of the labels, as --labels of tools/make_shards.py; without labels there is no kNN accuracy."""
    limit: int = 20_000
    """Largest number of your images, drawn at random, so that the demo takes minutes."""
    num_images: int = 6144
    """Synthetic images to train on."""
    method: str = ""
    """Method to train: simsiam, simclr, moco-v2, byol, swav or dino (default: simsiam, by its recipe "demo")."""
    steps: int = 576
    """Approximate number of optimizer steps; whole epochs are run, at least one."""
    image_size: int = 32
    """Side of the views, px."""


@dataclass(frozen=True)
class Schedule:
    """Batch and length of the run."""

    batch: int
    epochs: int
    knn_every: int  # epochs


def main() -> None:
    """The command."""
    config = tyro.cli(DemoConfig, description=__doc__)
    check(config)
    start = time.perf_counter()
    if config.images and not config.subtree and not config.test_subtree:
        train_tree, test_tree = find_splits(Path(config.images))
        config = replace(config, subtree=train_tree, test_subtree=test_tree)
    has_test = make_datasets(config)
    preview(config)
    pretrain(config, has_test)
    run_command("python tools/plot_run.py", str(config.out / "run"), str(config.out / "plot.png"))
    print(report(config, has_test, time.perf_counter() - start))


def check(config: DemoConfig) -> None:
    """Raise UserError for settings that the demo cannot run."""
    for name in ("limit", "num_images", "steps", "image_size"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    if config.method:
        method_config(config.method)  # refuses unknown ones
    if config.test_subtree and not config.subtree:
        raise UserError(f"--test-subtree {config.test_subtree}: name the training images too, with --subtree")
    if config.images.startswith(WDS):
        raise UserError(
            f"--images {config.images}: index WebDataset tars with tools/make_shards.py and pretrain on them"
        )


def find_splits(source: Path) -> tuple[str, str]:
    """Names of the training and the test folder at the top of a folder or a tar; two empty names unless both exist."""
    if source.is_dir():
        return _pick({path.name for path in source.iterdir() if path.is_dir()})
    if source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            return _splits_in(tar)
    return "", ""


def _splits_in(tar: tarfile.TarFile) -> tuple[str, str]:
    tops: set[str] = set()
    for member in tar:
        parts = member.name.removeprefix("./").split("/")
        if len(parts) > 1 or member.isdir():
            tops.add(parts[0])
        if _pick(tops) != ("", ""):
            break
    return _pick(tops)


def _pick(tops: set[str]) -> tuple[str, str]:
    train = next((name for name in TRAIN_NAMES if name in tops), "")
    test = next((name for name in TEST_NAMES if name in tops), "")
    return (train, test) if train and test else ("", "")


def make_datasets(config: DemoConfig) -> bool:
    """Write out/train and, where there are images for it, out/test; returns whether there is a test set."""
    train, test = str(config.out / "train"), str(config.out / "test")
    if not config.images:
        heading("Shards: synthetic textures of twelve classes, and a test set of other ones")
        run_command(MAKE_SHARDS, f"synthetic:{config.num_images}", train, "--overwrite")
        seed = ("--seed", str(TEST_SEED))
        run_command(MAKE_SHARDS, f"synthetic:{min(TEST_IMAGES, config.num_images)}", test, *seed, "--overwrite")
        return True
    heading(f"Shards: at most {config.limit:,} images of {config.images}, none larger than the demo needs")
    shared = ("--shorter-side", str(2 * config.image_size), "--labels", config.labels, "--overwrite")
    tree = ("--subtree", config.subtree) if config.subtree else ()
    run_command(MAKE_SHARDS, config.images, train, *tree, "--limit", str(config.limit), *shared)
    if not config.test_subtree:
        return False
    test_tree = ("--subtree", config.test_subtree, "--limit", str(min(TEST_LIMIT, config.limit)))
    same_classes = ("--classes-from", train) if dataset_of(config).has_labels else ()
    run_command(MAKE_SHARDS, config.images, test, *test_tree, *same_classes, *shared)
    return True


def preview(config: DemoConfig) -> None:
    """Draw some images and their views into out/preview.png."""
    heading("Views: what the encoder will see")
    out = str(config.out / "preview.png")
    samples = str(min(8, dataset_of(config).num_samples))
    size = ("--image-size", str(config.image_size))
    views = ("--method", config.method, *view_flags(config.method, config.image_size, on_cpu=True))
    words = ("--samples", samples, *(views if config.method else ("--recipe", "demo", *size)))
    run_command("python tools/preview_views.py", str(config.out / "train"), out, *words)


def pretrain(config: DemoConfig, has_test: bool) -> None:
    """Train into out/run; the run of an earlier demo is deleted first."""
    dataset, run_dir = dataset_of(config), config.out / "run"
    schedule = plan(dataset.num_samples, config.steps)
    heading(f"Pretraining: {schedule.epochs} epochs over {dataset.num_samples:,} images")
    if run_dir.exists():
        if not (run_dir / "config.json").is_file():
            raise UserError(f"{run_dir} exists and is no run folder: choose another --out")
        shutil.rmtree(run_dir)
    arguments = ["--data", str(dataset.path), "--run-dir", str(run_dir), *recipe_of(config)]
    arguments += ["--epochs", str(schedule.epochs), "--global-batch", str(schedule.batch)]
    arguments += ["--knn-every", str(schedule.knn_every)]
    if config.method == "moco-v2":  # batch norm's groups, 32 images by default: a batch needs two
        arguments += ["--bn-images", str(min(32, schedule.batch // 2))]
    if has_test and dataset.has_labels:
        arguments += ["--knn-data", str(config.out / "test")]
    run_command("python train/pretrain.py", *arguments)


def recipe_of(config: DemoConfig) -> list[str]:
    """Flags of train/pretrain.py: the recipe "demo", or that of the method."""
    recipe = method_flags(config.method, "cpu", 1) if config.method else ("--recipe", "demo")
    return [*recipe, "--image-size", str(config.image_size)]


def plan(images: int, steps: int) -> Schedule:
    """Whole epochs of about ``steps`` steps together. Raises UserError for too few images."""
    if images < FEWEST_IMAGES:
        raise UserError(f"{images} images are too few to train on: give at least {FEWEST_IMAGES}")
    batch = min(LARGEST_BATCH, 1 << (images // 2).bit_length() - 1)  # two steps an epoch at least
    epochs = max(1, round(steps / (images // batch)))
    return Schedule(batch, epochs, max(1, epochs // EVALUATIONS))


def report(config: DemoConfig, has_test: bool, seconds: float) -> str:
    """The results, and the files that hold them."""
    from train.storage.run_folder import read_run

    history = read_run(config.out / "run")
    lines = ["", "Results", f"  loss {history.loss[0]:.3f} -> {history.loss[-1]:.3f} in {history.steps[-1]:,} steps"]
    lines += [
        f"  z_std {history.z_std[-1]:.4f}; healthy is 1/sqrt({history.dim}) = {history.dim**-0.5:.4f}, less is collapse"
    ]
    if history.knn_top1:
        chance = 100 / len(dataset_of(config).classes)
        raw = raw_pixel_accuracy(config, has_test)
        before, after = history.knn_top1[0], history.knn_top1[-1]
        lines += ["", "  20-NN top-1 on " + ("the test set" if has_test else "a tenth held out")]
        rows = (("chance", chance), ("raw pixels", raw), ("untrained encoder", before), ("trained encoder", after))
        lines += [f"    {name:<18} {value:5.1f} %" for name, value in rows]
        if len(history.knn_top1) > 1:
            lines += [f"    gained by training {after - before:+.1f} points over the untrained encoder"]
    else:
        lines += ["", "  no 20-NN accuracy: the images have no labels (class sub-folders would give them)"]
    files = {
        "preview.png": "images and their two views",
        "plot.png": "loss, z_std and kNN over the run",
        "run/checkpoints/": "the trained weights",
        "run/metrics.jsonl": "every logged number",
    }
    lines += ["", "Files", *(f"  {config.out}/{name:<17}  {what}" for name, what in files.items())]
    return "\n".join([*lines, "", f"Done in {seconds // 60:.0f} min {seconds % 60:.0f} s."])


def raw_pixel_accuracy(config: DemoConfig, has_test: bool) -> float:
    """20-NN accuracy of raw pixels, percent, on the images of the run's own kNN."""
    import torch

    from pipeline.loader.config import LoaderConfig
    from pipeline.sampling.views import ViewRecipe
    from train.distributed.process_group import DistContext
    from train.evaluation.features import ImageSource
    from train.evaluation.knn_monitor import KnnConfig, OnlineKnn
    from train.optimization.precision import choose_precision

    cpu = torch.device("cpu")
    precision = choose_precision("fp32", cpu)
    recipe = ViewRecipe(image_size=config.image_size)
    source = ImageSource(recipe, LoaderConfig(), DistContext.alone(cpu), precision.autocast, precision.view_dtype)
    knn = OnlineKnn(dataset_of(config), KnnConfig(data=config.out / "test" if has_test else None), source)
    return knn.evaluate(torch.nn.Flatten())


def dataset_of(config: DemoConfig) -> ShardSet:
    """The training set."""
    return ShardSet.open(config.out / "train")


def heading(text: str) -> None:
    """Print the heading of a part."""
    print(f"\n== {text}", flush=True)


def run_command(command: str, *arguments: str) -> None:
    """Print a command and run it. If it fails, its message stands, and the demo exits with its code."""
    words = [*after_python(command), *arguments]
    print(f"$ {shlex.join(['python', *words])}", flush=True)
    code = subprocess.run([sys.executable, *words], check=False).returncode
    if code:
        print(
            f"the demo stops: the command above failed with exit code {code}\n"
            'flags that its message names can be given to make as DEMO_ARGS="--subtree NAME", if the demo has them',
            file=sys.stderr,
        )
        sys.exit(code if code > 0 else 128 - code)  # a signal, as the shell reports it


if __name__ == "__main__":
    exit_on_user_error(main)
