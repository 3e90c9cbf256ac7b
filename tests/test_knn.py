"""Weighted kNN against a vote counted by hand and a slow reference; the online monitor counts every sample once."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.loader_config import LoaderConfig
from pipeline.options import ShardingOptions
from pipeline.shards import ShardSet
from pipeline.views import ViewRecipe
from pipeline.writer import make_dataset
from train import knn as knn_module
from train.dist import Dist
from train.knn import (
    KnnConfig,
    OnlineKnn,
    PictureSource,
    bank_ids,
    extract_features,
    knn_accuracy,
    knn_predict,
    split_ids,
)

CPU = torch.device("cpu")
ALONE = Dist(0, 1, 0, 1, CPU)
SOURCE = PictureSource(
    ViewRecipe(image_size=16), LoaderConfig(backend="torchvision"), ALONE, nullcontext, torch.float32
)


def on_circle(*degrees: float) -> Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def test_votes_counted_by_hand() -> None:
    bank, labels = on_circle(0, 40, 50, 180), torch.tensor([0, 1, 1, 0])
    query = on_circle(15)
    # Cosines: 15 deg .966, 25 deg .906, 35 deg .819. Sharp: exp(.966/.07) = 985k against 418k + 121k, so class 0.
    assert knn_predict(bank, labels, query, k=3, temperature=0.07, num_classes=2).tolist() == [0]
    # Nearly flat weights: two votes for class 1 against one.
    assert knn_predict(bank, labels, query, k=3, temperature=10.0, num_classes=2).tolist() == [1]
    assert knn_predict(bank, labels, query, k=1, temperature=10.0, num_classes=2).tolist() == [0]


def test_accuracy_is_in_percent_and_features_are_normalised() -> None:
    bank, labels = on_circle(0, 90) * torch.tensor([[100.0], [0.01]]), torch.tensor([0, 1])
    queries = on_circle(10, 80, 20) * 7
    assert knn_accuracy(bank, labels, queries, torch.tensor([0, 1, 1]), 1, 0.07, 2) == pytest.approx(200 / 3)


def reference(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, k: int, temperature: float, classes: int
) -> list[int]:
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    predicted = []
    for query in queries:
        cosines = bank @ query
        votes = np.zeros(classes)
        for i in np.argsort(-cosines)[:k]:
            votes[labels[i]] += math.exp(cosines[i] / temperature)
        predicted.append(int(votes.argmax()))
    return predicted


@pytest.mark.parametrize("chunk_numbers", [1, 500, 1 << 27])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk_numbers: int) -> None:
    monkeypatch.setattr(knn_module, "SIMILARITIES_AT_ONCE", chunk_numbers)
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(90, 8)), rng.normal(size=(33, 8))
    labels = rng.integers(0, 5, 90)
    predicted = knn_predict(torch.from_numpy(bank), torch.from_numpy(labels), torch.from_numpy(queries), 20, 0.07, 5)
    assert predicted.tolist() == reference(bank, labels, queries, 20, 0.07, 5)


def test_k_larger_than_the_bank() -> None:
    assert knn_predict(on_circle(0, 90), torch.tensor([0, 1]), on_circle(10), 20, 0.07, 2).tolist() == [0]


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_ranks_share_ids_without_doubling_or_dropping(parts: int) -> None:
    split = split_ids(np.arange(5), parts)
    assert len(split) == parts
    assert np.concatenate(split).tolist() == list(range(5))


def test_bank_is_a_fixed_spread_subset() -> None:
    ids = bank_ids(1000, 100)
    assert len(set(ids.tolist())) == 100
    assert ids.tolist() == bank_ids(1000, 100).tolist()
    assert sorted(bank_ids(50, 100).tolist()) == list(range(50))


class MeanColour(nn.Module):
    """A stand-in for a trunk: 4 x 4 mean colours."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def test_features_of_all_ranks_together_are_those_of_one(photo_dataset: ShardSet) -> None:
    ids = bank_ids(photo_dataset.num_samples, 10)
    whole = extract_features(MeanColour(), photo_dataset, ids, SOURCE)
    parts = [
        extract_features(MeanColour(), photo_dataset, ids, replace(SOURCE, dist=Dist(rank, 12, rank, 12, CPU)))
        for rank in range(12)
    ]
    assert [len(part) for part in parts] == [1] * 10 + [0, 0]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_features_leave_the_mode_of_the_backbone(photo_dataset: ShardSet) -> None:
    trunk = nn.Sequential(MeanColour(), nn.BatchNorm1d(48)).train()
    extract_features(trunk, photo_dataset, bank_ids(photo_dataset.num_samples, 4), SOURCE)
    assert trunk.training
    assert trunk[1].num_batches_tracked == 0


def test_online_accuracy_of_held_out_samples(photo_dataset: ShardSet) -> None:
    knn = OnlineKnn(photo_dataset, KnnConfig(k=5, bank_size=30), SOURCE)
    ids = bank_ids(photo_dataset.num_samples, 30)
    features = extract_features(MeanColour(), photo_dataset, ids, SOURCE)
    labels = torch.from_numpy(photo_dataset.labels(ids).astype(np.int64))
    expected = knn_accuracy(features[:27], labels[:27], features[27:], labels[27:], 5, 0.07, 4)
    assert knn.evaluate(MeanColour()) == pytest.approx(expected)
    assert "3 queries held out" in knn.describe()


def test_online_accuracy_with_the_training_set_as_queries(photo_dataset: ShardSet) -> None:
    knn = OnlineKnn(photo_dataset, KnnConfig(data=photo_dataset.path, k=1), SOURCE)
    assert knn.evaluate(MeanColour()) == 100.0  # each sample is its own nearest neighbour


def test_query_set_must_have_the_same_classes(photo_dataset: ShardSet, photo_folder: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer"
    fewer.mkdir()
    for name in photo_dataset.classes[1:]:
        (fewer / name).symlink_to(photo_folder / name)
    make_dataset(str(fewer), tmp_path / "set", ShardingOptions(workers=1), quiet=True)
    with pytest.raises(UserError, match=rf"other classes than --data.*{photo_dataset.classes[0]}"):
        OnlineKnn(photo_dataset, KnnConfig(data=tmp_path / "set"), SOURCE)


def test_query_set_must_have_labels(photo_dataset: ShardSet, photo_folder: Path, tmp_path: Path) -> None:
    flat = photo_folder / photo_dataset.classes[0]
    make_dataset(str(flat), tmp_path / "set", ShardingOptions(workers=1), quiet=True)
    with pytest.raises(UserError, match="no labels"):
        OnlineKnn(photo_dataset, KnnConfig(data=tmp_path / "set"), SOURCE)
