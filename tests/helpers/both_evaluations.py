"""Runs one kNN and two linear evaluations on any number of ranks; torchrun runs this file, tests import it."""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import json
import sys
from dataclasses import replace
from pathlib import Path

from pipeline.common.locations import Url
from pipeline.dataset.remote_cache import CacheConfig
from pipeline.loader.config import LoaderConfig
from train import knn, linear
from train.distributed.process_group import DistContext, distributed
from train.evaluation.features import EncoderConfig
from train.evaluation.linear_probe import ProbeConfig

LINEAR = ("crops", "cached")


def evaluate_both(
    data: Path | Url, val: Path | Url, out: Path, dist: DistContext, cache: CacheConfig | None = None
) -> list[tuple[int, ...]]:
    """Everything that was counted, also written to ``out``."""
    encoder = EncoderConfig("untrained:resnet_tiny", image_size=16)
    loader = LoaderConfig("torchvision", threads=1, cache=cache or CacheConfig())
    probe = ProbeConfig(epochs=3, global_batch=12, lr_sweep="0.1,1,30")
    knn.evaluate(knn.KnnEvalConfig(data, val, encoder, k="1,5", json=out / "knn.json", loader=loader), dist)
    for name in LINEAR:
        config = linear.LinearConfig(data, val, encoder, out / name, probe=probe, loader=loader)
        linear.evaluate(replace(config, features_cache=name == "cached"), dist)
    return numbers(out)


def numbers(out: Path) -> list[tuple[int, ...]]:
    """What ``evaluate_both`` counted: (correct, total) of each k, (top 1, top 5, total) of each classifier."""
    rows = json.loads((out / "knn.json").read_text())["knn"]
    heads = [head for name in LINEAR for head in json.loads((out / name / "summary.json").read_text())["heads"]]
    return [(row["correct"], row["total"]) for row in rows] + [
        (head["correct1"], head["correct5"], head["total"]) for head in heads
    ]


if __name__ == "__main__":
    with distributed("cpu") as dist:
        evaluate_both(*map(Path, sys.argv[1:]), dist)
