"""Owns the weighted k-nearest-neighbour accuracy of an encoder: Wu et al. 2018 (arXiv:1805.01978), section 3.4."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.distributed as td
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.loader import open_pictures
from pipeline.loader_config import LoaderConfig
from pipeline.order import epoch_order
from pipeline.shards import ShardSet
from pipeline.views import ViewRecipe
from train.dist import Dist, gather_rows

BANK_SEED = 0  # which samples make the bank is the same in every run, so that accuracies compare
HELD_OUT = 0.1  # share of the bank's samples that become queries where no --knn-data is given
MAX_QUERIES_HELD_OUT = 10_000
PICTURES_PER_PASS = 256
SIMILARITIES_AT_ONCE = 1 << 27  # numbers of the similarity matrix held at a time: 512 MiB in float32


@dataclass(frozen=True)
class KnnConfig:
    """The online kNN accuracy of the backbone's features, where the dataset has labels."""

    # Labelled dataset to classify, of the same classes; None: a tenth of the bank, held out
    data: Annotated[Path | None, tyro.conf.arg(name="knn-data")] = None
    k: Annotated[int, tyro.conf.arg(name="knn-k")] = 20  # neighbours; Wu et al. take 200
    temperature: Annotated[float, tyro.conf.arg(name="knn-temperature")] = 0.07  # Wu et al., section 4
    bank_size: Annotated[int, tyro.conf.arg(name="knn-bank-size")] = 50_000  # training samples to compare with
    every: Annotated[int, tyro.conf.arg(name="knn-every")] = 1  # epochs between two evaluations; 0 = never


def knn_accuracy(
    train_feats: Float[Tensor, "n d"],
    train_labels: Int64[Tensor, " n"],
    test_feats: Float[Tensor, "m d"],
    test_labels: Int64[Tensor, " m"],
    k: int,
    temperature: float,
    num_classes: int,
) -> float:
    """Top-1 accuracy in percent of classifying the test features by their k nearest training features."""
    predicted = knn_predict(train_feats, train_labels, test_feats, k, temperature, num_classes)
    return 100.0 * (predicted == test_labels).double().mean().item()


@torch.no_grad()
def knn_predict(
    bank: Float[Tensor, "n d"],
    bank_labels: Int64[Tensor, " n"],
    queries: Float[Tensor, "m d"],
    k: int,
    temperature: float,
    num_classes: int,
) -> Int64[Tensor, " m"]:
    """The class with the largest sum of exp(cos / temperature) over the k nearest neighbours (all of them if n < k).

    Features are l2-normalised here. Computed in chunks of queries, so that memory grows with n alone.
    """
    bank = F.normalize(bank.float(), dim=1)
    queries = F.normalize(queries.float(), dim=1)
    parts = []
    for chunk in queries.split(max(1, SIMILARITIES_AT_ONCE // len(bank))):
        similarity, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        parts.append(votes.argmax(dim=1))
    return torch.cat(parts) if parts else bank_labels.new_empty(0)


@dataclass(frozen=True)
class PictureSource:
    """How features are made: from which pictures, through which loader, on how many ranks, in which number format."""

    recipe: ViewRecipe
    loader: LoaderConfig
    dist: Dist
    autocast: Callable[[], AbstractContextManager[object]]
    dtype: torch.dtype


@torch.no_grad()
def extract_features(
    backbone: nn.Module, dataset: ShardSet, ids: Int64[np.ndarray, " n"], source: PictureSource
) -> Float[Tensor, "part d"]:
    """This rank's part of the features of samples ``ids``: rows ``split_ids(...)``, float32, on its device.

    The backbone computes in evaluation mode and is given back in the mode it came in.
    """
    dist = source.dist
    mine = split_ids(ids, dist.world_size)[dist.rank]
    was_training = backbone.training
    backbone.eval()
    features = []
    with open_pictures(
        dataset,
        source.recipe,
        source.loader,
        ids=mine if len(mine) else ids[:1],  # a rank without pictures still learns how wide features are
        batch=PICTURES_PER_PASS,
        local_world_size=dist.local_world_size,
        device=dist.device,
        dtype=source.dtype,
    ) as batches:
        for x, _ in batches:
            with source.autocast():
                features.append(backbone(x).float())
    backbone.train(was_training)
    return torch.cat(features)[: len(mine)]


def split_ids(ids: Int64[np.ndarray, " n"], parts: int) -> list[Int64[np.ndarray, " part"]]:
    """Contiguous parts that differ by at most one in length; together they are ``ids``, none doubled or dropped."""
    return np.array_split(ids, parts)


class OnlineKnn:
    """The bank and the queries of a run, chosen once."""

    def __init__(self, train: ShardSet, config: KnnConfig, source: PictureSource) -> None:
        """Raises UserError if --knn-data does not fit the training set."""
        self._config, self._source, self._bank_set = config, source, train
        ids = bank_ids(train.num_samples, config.bank_size)
        if config.data is None:
            self._query_set = train
            queries = min(max(1, int(len(ids) * HELD_OUT)), MAX_QUERIES_HELD_OUT)
            self._bank, self._queries = ids[:-queries], ids[-queries:]
        else:
            self._query_set = _open_queries(train, config.data)
            self._bank, self._queries = ids, np.arange(self._query_set.num_samples)
        if len(self._bank) == 0:
            raise UserError(f"kNN needs more than {train.num_samples} sample(s) to compare with: take --knn-every 0")

    def describe(self) -> str:
        """What is compared with what, for people."""
        held_out = " held out of them (the encoder trains on their pictures)" if self._config.data is None else ""
        return (
            f"{len(self._queries):,} queries{held_out} against {len(self._bank):,} training samples, k {self._config.k}"
        )

    def evaluate(self, backbone: nn.Module) -> float:
        """Top-1 accuracy in percent, the same on every rank. A collective."""
        dist, source = self._source.dist, self._source
        counts = [len(part) for part in split_ids(self._bank, dist.world_size)]
        bank = gather_rows(dist, extract_features(backbone, self._bank_set, self._bank, source), counts)
        queries = extract_features(backbone, self._query_set, self._queries, source)
        my_queries = split_ids(self._queries, dist.world_size)[dist.rank]
        predicted = knn_predict(
            bank,
            _labels(self._bank_set, self._bank, dist.device),
            queries,
            self._config.k,
            self._config.temperature,
            len(self._bank_set.classes),
        )
        correct = (predicted == _labels(self._query_set, my_queries, dist.device)).sum()
        if dist.world_size > 1:
            td.all_reduce(correct)
        return 100.0 * correct.item() / len(self._queries)


def bank_ids(num_samples: int, bank_size: int) -> Int64[np.ndarray, " n"]:
    """At most ``bank_size`` samples, spread over the whole dataset, the same for every run."""
    return epoch_order(num_samples, BANK_SEED, 0, np.arange(min(bank_size, num_samples), dtype=np.int64))


def _labels(dataset: ShardSet, ids: Int64[np.ndarray, " n"], device: torch.device) -> Int64[Tensor, " n"]:
    return torch.from_numpy(dataset.labels(ids).astype(np.int64)).to(device)


def _open_queries(train: ShardSet, path: Path) -> ShardSet:
    queries = ShardSet.open(path)
    if not queries.has_labels:
        raise UserError(f"--knn-data {path} has no labels: shard it from class folders, or leave --knn-data away")
    if queries.classes != train.classes:
        only_there = sorted(set(queries.classes) - set(train.classes))
        only_here = sorted(set(train.classes) - set(queries.classes))
        raise UserError(
            f"--knn-data {path} has other classes than --data {train.path}: only in the first {only_there[:5]}, "
            f"only in the second {only_here[:5]}; both must be sharded from the same class names"
        )
    return queries
