"""Knn monitor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.common.errors import UserError, check_at_least_1, require
from pipeline.common.flags import own_flags
from pipeline.common.locations import OptionalDataset
from pipeline.dataset.dataset import ShardSet
from pipeline.dataset.mixture import Dataset, Mixture
from pipeline.sampling.order import epoch_order
from train.distributed.collectives import sum_over_ranks
from train.evaluation.features import (
    NOT_SEEN,
    ImageSource,
    Samples,
    check_same_classes,
    each_rank,
    labelled_features,
    open_labelled,
    split_ids,
)

BANK_SEED = 0  # which samples make the bank is the same in every run, so that accuracies compare
HELD_OUT = 0.1  # share of the bank's samples that become queries where no --knn-data is given
MAX_QUERIES_HELD_OUT = 10_000


@own_flags
@dataclass(frozen=True)
class KnnConfig:
    """The online kNN accuracy of the backbone's features, where the dataset has labels."""

    # Labelled dataset to classify, of the same classes as --data; default: a tenth of the compared samples, held out.
    data: Annotated[OptionalDataset, tyro.conf.arg(name="knn-data")] = None
    # Neighbours that vote; Wu et al. 2018 take 200.
    k: Annotated[int, tyro.conf.arg(name="knn-k")] = 20
    # Temperature of their weights [Wu et al. 2018, section 4].
    temperature: Annotated[float, tyro.conf.arg(name="knn-temperature")] = 0.07
    # Training samples to compare with.
    bank_size: Annotated[int, tyro.conf.arg(name="knn-bank-size")] = 50_000
    # Epochs between two evaluations; 0: never.
    every: Annotated[int, tyro.conf.arg(name="knn-every")] = 1

    def __post_init__(self) -> None:
        check_at_least_1("--knn-k", self.k)
        check_at_least_1("--knn-bank-size", self.bank_size)
        check_temperature("--knn-temperature", self.temperature)
        require("--knn-every", self.every, self.every >= 0, "it must be a number of epochs, or 0 for never")


@dataclass(frozen=True)
class Score:
    """Queries classified rightly, and how many there were."""

    correct: int
    total: int

    @property
    def top1(self) -> float:
        return 100.0 * self.correct / max(self.total, 1)


def score_neighbours(
    backbone: nn.Module,
    bank: Samples,
    queries: Samples,
    source: ImageSource,
    *,
    ks: list[int],
    temperature: float,
    dtype: torch.dtype = torch.float32,
    tolerant: bool = False,
) -> dict[int, Score]:
    """Classify ``queries`` by the k nearest of ``bank``, for each k; every rank gets the same scores. A collective.

    ``dtype``: how the bank's features are kept. ``tolerant``: leave out images that cannot be read, which otherwise
    raise SharedError.
    """
    dist = source.dist
    mine, my_labels = labelled_features(backbone, bank, source, dtype=dtype, tolerant=tolerant)
    asked, answers = labelled_features(backbone, queries, source, tolerant=tolerant)
    neighbours = Neighbours(asked, min(max(ks), len(bank.ids)))
    counts = [len(part) for part in split_ids(bank.ids, dist.world_size)]
    parts = zip(each_rank(dist, mine, counts), each_rank(dist, my_labels, counts), strict=True)
    with dist.status.waiting("comparing with the features of all ranks"):
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

    def __init__(self, train: ShardSet, config: KnnConfig, source: ImageSource) -> None:
        """Raises UserError if --knn-data does not fit the training set."""
        self._config, self._source = config, source
        if train.has_labels:
            ids = bank_ids(train.num_samples, config.bank_size)
        else:
            labelled = Samples.labelled(train).ids
            ids = labelled[bank_ids(len(labelled), config.bank_size)]
        if config.data is None:
            queries = min(max(1, int(len(ids) * HELD_OUT)), MAX_QUERIES_HELD_OUT)
            self._bank, self._queries = Samples.sorted(train, ids[:-queries]), Samples.sorted(train, ids[-queries:])
        else:
            query_set = open_labelled(config.data, "--knn-data", source.loader)
            check_same_classes("--knn-data", query_set, train)
            self._bank, self._queries = Samples.sorted(train, ids), Samples.labelled(query_set)
        if len(self._bank.ids) == 0:
            raise UserError(
                f"kNN has nothing to compare with: of {train.num_samples} samples, --knn-bank-size {config.bank_size} "
                "leaves one, which is to be classified; take more, or --knn-every 0"
            )

    def describe(self) -> str:
        """What is compared with what, for people."""
        queries, bank = len(self._queries.ids), len(self._bank.ids)
        held_out = " held out of them (the encoder trains on their images)" if self._config.data is None else ""
        return f"{queries:,} queries{held_out} against {bank:,} training samples, k {self._config.k}"

    def evaluate(self, backbone: nn.Module, asked_to_stop: Callable[[], bool] = lambda: False) -> float:
        """Top-1 accuracy in percent, the same on every rank. A collective.

        An image that can no longer be read is left out, and does not stop the training. Raises Abandoned if any rank
        is ``asked_to_stop``.
        """
        k, temperature = self._config.k, self._config.temperature
        source = replace(self._source, asked_to_stop=asked_to_stop)
        scores = score_neighbours(
            backbone, self._bank, self._queries, source, ks=[k], temperature=temperature, tolerant=True
        )
        return scores[k].top1


def open_knn(dataset: Dataset, config: KnnConfig, source: ImageSource) -> dict[str, OnlineKnn]:
    """The evaluation of a dataset, its name being "", or those of a mixture by the datasets' names.

    Each labelled dataset is classified by itself, into its own classes. With --knn-data it is the first one that has
    the same classes. Empty where nothing has labels. Raises UserError as ``OnlineKnn``.
    """
    parts = dataset.parts
    labelled = [number for number, part in enumerate(parts) if part.has_labels or len(Samples.labelled(part).ids)]
    if config.data is not None and labelled:
        classes = open_labelled(config.data, "--knn-data", source.loader).classes
        labelled = [next((number for number in labelled if parts[number].classes == classes), labelled[0])]
    names = [dataset.names[number] for number in labelled] if isinstance(dataset, Mixture) else [""] * len(labelled)
    return {name: OnlineKnn(parts[number], config, source) for name, number in zip(names, labelled, strict=True)}


def bank_ids(num_samples: int, bank_size: int) -> Int64[np.ndarray, " n"]:
    """At most ``bank_size`` samples, spread over the whole dataset, the same for every run."""
    return epoch_order(num_samples, BANK_SEED, 0, np.arange(min(bank_size, num_samples), dtype=np.int64))


# Memory beyond the features themselves is bounded by these two, whatever the size of the bank.
BANK_ROWS_AT_ONCE = 1 << 14  # of the bank, normalised in float32: 128 MiB at 2048 dimensions
SIMILARITIES_AT_ONCE = 1 << 27  # numbers of the similarity matrix: 512 MiB


class Neighbours:
    """The k most similar samples of a bank for each query; the bank comes in parts, in any number format."""

    def __init__(self, queries: Float[Tensor, "m d"], k: int) -> None:
        """Features are l2-normalised here."""
        self._queries = F.normalize(queries.float(), dim=1)
        # Places that no sample of the bank fills keep similarity -inf, and so no weight in the vote.
        self._similarity = torch.full((len(queries), k), -torch.inf, device=queries.device)
        self._labels = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)

    @torch.no_grad()
    def add(self, bank: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> None:
        """Compare with one part of the bank. ``labels`` are class numbers."""
        for start in range(0, len(bank), BANK_ROWS_AT_ONCE):
            rows = slice(start, start + BANK_ROWS_AT_ONCE)
            self._add_rows(F.normalize(bank[rows].float(), dim=1), labels[rows])

    def _add_rows(self, bank: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> None:
        k = self._similarity.shape[1]
        at_once = max(1, SIMILARITIES_AT_ONCE // len(bank))
        for start in range(0, len(self._queries), at_once):
            chunk = slice(start, start + at_once)
            similarity, nearest = (self._queries[chunk] @ bank.T).topk(min(k, len(bank)), dim=1)
            candidates = torch.cat([self._similarity[chunk], similarity], dim=1)
            their_labels = torch.cat([self._labels[chunk], labels[nearest]], dim=1)
            self._similarity[chunk], best = candidates.topk(k, dim=1)
            self._labels[chunk] = their_labels.gather(1, best)

    @torch.no_grad()
    def vote(self, k: int, temperature: float, num_classes: int) -> Int64[Tensor, " m"]:
        """The class with the largest sum of exp(cos / temperature) over the ``k`` nearest, at most those asked for."""
        similarity, labels = self._similarity[:, :k], self._labels[:, :k]
        # Less the largest, which changes no order between classes and lets no exponential overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(similarity), num_classes, device=similarity.device)
        return votes.scatter_add_(1, labels, weights).argmax(dim=1)


def check_temperature(flag: str, temperature: float) -> None:
    """Raise UserError for a temperature with which no neighbour can vote."""
    rule = "it must be above 0 and finite; Wu et al. take 0.07"
    require(flag, temperature, 0 < temperature < inf, rule)
