"""Classify images with a fine-tuned classifier: python tools/predict.py RUN FILES > predictions.csv

RUN is the --run-dir of train/finetune.py. FILES are images or folders of them. One line of CSV for each image: the
file, then class and probability of the --top most likely classes. A file that is no image gets a line that says so on
stderr, and the command ends with exit code 1.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from pipeline.backends.reference import centre_crop, decode, normalise
from pipeline.common.errors import UserError, check_at_least_1, exit_on_user_error
from pipeline.common.files import read_regular
from pipeline.common.locations import InputPath
from pipeline.sampling.views import centre_crops
from pipeline.sources.listing import IMAGE_SUFFIXES
from tools.embedding.store import escaped
from train.evaluation.classifier import LoadedClassifier, load_classifier

IMAGES_PER_PASS = 64


@dataclass(frozen=True)
class PredictConfig:
    """Classify images."""

    model: Annotated[InputPath, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The --run-dir of train/finetune.py, or its classifier folder."""
    files: Annotated[tuple[InputPath, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILES")]
    """Images, or folders of images."""
    top: int = 1
    """Classes to give for each image, the most likely first."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device that computes; auto: a GPU if there is one."""

    def __post_init__(self) -> None:
        check_at_least_1("--top", self.top)
        if not self.files:
            raise UserError("name at least one image or folder")


def main() -> None:
    """Parse the command line and print the predictions."""
    config = tyro.cli(PredictConfig, description=__doc__)
    classifier = load_classifier(config.model)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible here; use --device cpu")
    gpu = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    top = min(config.top, len(classifier.classes))
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["file", *(f"{name}{i}" for i in range(1, top + 1) for name in ("class", "probability"))])
    bad = 0
    paths = list_files(config.files)
    classifier.model.to(device)
    while part := list(islice(paths, IMAGES_PER_PASS)):
        read = [(path, view) for path in part if (view := read_view(path, classifier)) is not None]
        bad += len(part) - len(read)
        if not read:
            continue
        with torch.no_grad():
            logits = classifier.model(torch.stack([view for _, view in read]).to(device))
        best = logits.softmax(dim=1).topk(top, dim=1)
        for (path, _), probabilities, labels in zip(read, best.values.tolist(), best.indices.tolist(), strict=True):
            cells = [
                cell
                for p, label in zip(probabilities, labels, strict=True)
                for cell in (escaped(classifier.classes[label]), f"{p:.4f}")
            ]
            table.writerow([escaped(str(path)), *cells])
    if bad:
        print(f"{bad} files are no images that can be read", file=sys.stderr)
        sys.exit(1)


def list_files(named: tuple[Path, ...]) -> Iterator[Path]:
    """The files themselves, and the images below folders in sorted order. Raises UserError for what is not there."""
    for path in named:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix[1:].lower() in IMAGE_SUFFIXES and p.is_file())
            if not found:
                raise UserError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise UserError(f"{path} is not there: name image files or folders of them")


def read_view(path: Path, classifier: LoadedClassifier) -> Float[Tensor, "c s s"] | None:
    """The evaluation view of an image; None, after a line on stderr, if it cannot be read."""
    pixels = classifier.pixels
    recipe = pixels.recipe
    try:
        image = decode(read_regular(path))
        if len(image) != recipe.channels:
            raise ValueError(f"{len(image)} channels, and the classifier takes {recipe.channels}")
    except (OSError, ValueError, SyntaxError) as error:
        print(f"{escaped(str(path))}: {error}", file=sys.stderr)
        return None
    crops = centre_crops(pixels.image_size, np.array([image.shape[1:]], np.int32))
    return normalise(centre_crop(image, crops, 0, pixels.image_size), recipe)


if __name__ == "__main__":
    exit_on_user_error(main)
