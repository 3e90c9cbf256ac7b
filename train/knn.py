"""kNN accuracy of an encoder's features: weighted vote of the nearest neighbours, Wu et al. 2018 (arXiv:1805.01978).

    torchrun --standalone --nproc-per-node=8 train/knn.py --data DIR --val-data DIR --checkpoint FILE
    python train/knn.py --data DIR --val-data DIR --checkpoint RUN_DIR --k 1,20,200                     (one process)

Owns what is compared with what: as a script, and as the monitor that pretraining calls. Each rank keeps its share of
the training features and sees the others' one share at a time. Memory of a rank in bytes: 4 x dimensions x (2 shares of
the training features, or 1 in one process + its share of the validation features); half of the training part with
--feature-dtype float16; about 1 GB beside them. ImageNet's 1.28 M x 2048 are 10.5 GB in one process (5.2 GB in float16)
and 2.6 GB (1.3 GB) on each of eight GPUs.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from jaxtyping import Int64
from torch import nn

from pipeline.disk import disk_errors, write_json
from pipeline.errors import UserError, exit_on_user_error
from pipeline.loader_config import LoaderConfig
from pipeline.location import LocalPath, Location
from pipeline.order import epoch_order
from pipeline.shards import ShardSet
from train.dist import Dist, distributed, on_main, say, sum_over_ranks, together, told_once
from train.features import (
    NOT_SEEN,
    EncoderConfig,
    PictureSource,
    Samples,
    check_same_classes,
    each_rank,
    labelled_features,
    open_frozen,
    open_labelled,
    split_ids,
)
from train.neighbours import Neighbours
from train.precision import PrecisionName, choose_precision
from train.rules import check_at_least_1, check_temperature

BANK_SEED = 0  # which samples make the bank is the same in every run, so that accuracies compare
HELD_OUT = 0.1  # share of the bank's samples that become queries where no --knn-data is given
MAX_QUERIES_HELD_OUT = 10_000


@dataclass(frozen=True)
class KnnConfig:
    """The online kNN accuracy of the backbone's features, where the dataset has labels."""

    # Labelled dataset to classify, of the same classes; None: a tenth of the bank, held out
    data: Annotated[Location | None, tyro.conf.arg(name="knn-data")] = None
    k: Annotated[int, tyro.conf.arg(name="knn-k")] = 20  # neighbours; Wu et al. take 200
    temperature: Annotated[float, tyro.conf.arg(name="knn-temperature")] = 0.07  # Wu et al., section 4
    bank_size: Annotated[int, tyro.conf.arg(name="knn-bank-size")] = 50_000  # training samples to compare with
    every: Annotated[int, tyro.conf.arg(name="knn-every")] = 1  # epochs between two evaluations; 0 = never


@dataclass(frozen=True)
class Score:
    """Queries classified rightly, and how many there were."""

    correct: int
    total: int

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100.0 * self.correct / max(self.total, 1)


def score_neighbours(
    backbone: nn.Module,
    bank: Samples,
    queries: Samples,
    source: PictureSource,
    *,
    ks: list[int],
    temperature: float,
    dtype: torch.dtype = torch.float32,
    tolerant: bool = False,
) -> dict[int, Score]:
    """Classify ``queries`` by the k nearest of ``bank``, for each k; every rank gets the same scores. A collective.

    ``dtype``: how the bank's features are kept. ``tolerant``: leave out pictures that cannot be read, which otherwise
    raise SharedError.
    """
    dist = source.dist
    mine, my_labels = labelled_features(backbone, bank, source, dtype=dtype, tolerant=tolerant)
    asked, answers = labelled_features(backbone, queries, source, tolerant=tolerant)
    neighbours = Neighbours(asked, min(max(ks), len(bank.ids)))
    counts = [len(part) for part in split_ids(bank.ids, dist.world_size)]
    parts = zip(each_rank(dist, mine, counts), each_rank(dist, my_labels, counts), strict=True)
    with dist.activity.waiting("comparing with the features of all ranks"):
        for features, labels in parts:
            seen = labels != NOT_SEEN
            if not tolerant or bool(seen.all()):
                neighbours.add(features, labels)
            else:
                neighbours.add(features[seen], labels[seen])
        classes = len(bank.dataset.classes)
        right = [(neighbours.vote(k, temperature, classes) == answers).sum() for k in ks]
        *correct, total = sum_over_ranks(dist, torch.stack([*right, (answers != NOT_SEEN).sum()])).tolist()
    return {k: Score(n, total) for k, n in zip(ks, correct, strict=True)}


class OnlineKnn:
    """The bank and the queries of a run, chosen once."""

    def __init__(self, train: ShardSet, config: KnnConfig, source: PictureSource) -> None:
        """Raises UserError if --knn-data does not fit the training set."""
        self._config, self._source = config, source
        ids = bank_ids(train.num_samples, config.bank_size)
        if config.data is None:
            queries = min(max(1, int(len(ids) * HELD_OUT)), MAX_QUERIES_HELD_OUT)
            self._bank, self._queries = Samples.sorted(train, ids[:-queries]), Samples.sorted(train, ids[-queries:])
        else:
            query_set = open_labelled(config.data, "--knn-data", source.loader)
            check_same_classes("--knn-data", query_set, train)
            self._bank, self._queries = Samples.sorted(train, ids), Samples.all_of(query_set)
        if len(self._bank.ids) == 0:
            raise UserError(
                f"kNN has nothing to compare with: of {train.num_samples} samples, --knn-bank-size {config.bank_size} "
                "leaves one, which is to be classified; take more, or --knn-every 0"
            )

    def describe(self) -> str:
        """What is compared with what, for people."""
        queries, bank = len(self._queries.ids), len(self._bank.ids)
        held_out = " held out of them (the encoder trains on their pictures)" if self._config.data is None else ""
        return f"{queries:,} queries{held_out} against {bank:,} training samples, k {self._config.k}"

    def evaluate(self, backbone: nn.Module) -> float:
        """Top-1 accuracy in percent, the same on every rank. Raises Abandoned as the source says. A collective.

        A picture that rotted since it was sharded is left out, and does not stop the training.
        """
        k, temperature = self._config.k, self._config.temperature
        scores = score_neighbours(
            backbone, self._bank, self._queries, self._source, ks=[k], temperature=temperature, tolerant=True
        )
        return scores[k].top1


def bank_ids(num_samples: int, bank_size: int) -> Int64[np.ndarray, " n"]:
    """At most ``bank_size`` samples, spread over the whole dataset, the same for every run."""
    return epoch_order(num_samples, BANK_SEED, 0, np.arange(min(bank_size, num_samples), dtype=np.int64))


@dataclass(frozen=True)
class KnnEvalConfig:
    """Weighted kNN accuracy of an encoder: the pictures of --val-data are classified by their neighbours in --data."""

    data: Location  # labelled dataset to compare with
    val_data: Location  # labelled dataset to classify, of the same classes; every picture counts exactly once
    encoder: Annotated[EncoderConfig, tyro.conf.arg(name="")]
    k: str = "20"  # neighbours; several separated by commas cost one pass
    temperature: float = 0.07  # Wu et al. 2018, section 4
    bank_size: int | None = None  # take only so many samples of --data, spread over it; None: all
    feature_dtype: Literal["float32", "float16"] = "float32"  # float16 halves the memory of the training features
    json: LocalPath | None = None  # write the accuracies to this file as well
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: the GPUs if there are any
    # Of the forward pass; auto: bf16 on a GPU, fp16 on one older than Ampere, fp32 on a CPU
    precision: PrecisionName = "auto"
    loader: Annotated[LoaderConfig, tyro.conf.arg(name="")] = field(default_factory=LoaderConfig)


def main() -> None:
    """The script."""
    config = tyro.cli(KnnEvalConfig, prog="knn.py")
    with told_once(), distributed(config.device) as dist:
        evaluate(config, dist)


def evaluate(config: KnnEvalConfig, dist: Dist) -> dict[int, Score]:
    """Print the accuracies and write them. Raises UserError for mistakes. A collective."""
    ks = together(dist, lambda: _check(config))
    bank, queries = together(dist, lambda: _open(config))
    encoder = together(dist, lambda: open_frozen(config.encoder, dist.device))
    precision = together(dist, lambda: choose_precision(config.precision, dist.device))
    source = PictureSource(encoder.recipe, config.loader, dist, precision.autocast, precision.view_dtype)
    say(
        dist, f"encoder      {encoder.weights.describe()}, pictures of {encoder.pixels.image_size} px, {precision.name}"
    )
    say(dist, f"kNN          {len(queries.ids):,} queries against {len(bank.ids):,} samples")
    if bank.dataset.fingerprint == queries.dataset.fingerprint:
        say(dist, "note: --data and --val-data are the same pictures, and each is its own nearest neighbour")
    if max(ks) > len(bank.ids):
        say(dist, f"note: --k {max(ks)} is more than there are samples to compare with: all of them vote")
    dtype = torch.float16 if config.feature_dtype == "float16" else torch.float32
    scores = score_neighbours(encoder.trunk, bank, queries, source, ks=ks, temperature=config.temperature, dtype=dtype)
    for k, score in scores.items():
        say(dist, f"k {k:<10} top-1 {score.top1:.2f} % ({score.correct:,} of {score.total:,})")
    if config.json is not None:
        on_main(dist, lambda: _write(config, config.json, scores))
    return scores


def _check(config: KnnEvalConfig) -> list[int]:
    """The numbers of neighbours. Raises UserError for values that make no sense."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", config.k):
        raise UserError(f"--k {config.k}: write whole numbers from 1 up, separated by commas, as in 10,20,200")
    check_temperature("--temperature", config.temperature)
    if config.bank_size is not None:
        check_at_least_1("--bank-size", config.bank_size)
    return sorted({int(k) for k in config.k.split(",")})


def _open(config: KnnEvalConfig) -> tuple[Samples, Samples]:
    train = open_labelled(config.data, "--data", config.loader)
    val = open_labelled(config.val_data, "--val-data", config.loader)
    check_same_classes("--val-data", val, train)
    bank = Samples.all_of(train)
    if config.bank_size is not None:
        bank = Samples.sorted(train, bank_ids(train.num_samples, config.bank_size))
    return bank, Samples.all_of(val)


def _write(config: KnnEvalConfig, path: Path | None, scores: dict[int, Score]) -> None:
    assert path is not None
    values: dict[str, Any] = {"checkpoint": config.encoder.checkpoint, "temperature": config.temperature}
    rows = [{"k": k, "top1": score.top1, "correct": score.correct, "total": score.total} for k, score in scores.items()]
    with disk_errors(f"writing {path}", f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**values, "knn": rows})


if __name__ == "__main__":
    exit_on_user_error(main)
