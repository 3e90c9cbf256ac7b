"""Weighted kNN against a vote counted by hand and a slow reference; the online monitor counts every sample once."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.loader.config import LoaderConfig
from pipeline.sampling.views import ViewRecipe
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers import toy_runs
from train import knn
from train.distributed.process_group import DistContext
from train.evaluation import knn_monitor as neighbours_module
from train.evaluation.features import ImageSource, Samples, extract_features, split_ids
from train.evaluation.knn_monitor import KnnConfig, Neighbours, OnlineKnn, bank_ids, score_neighbours

CPU = torch.device("cpu")
ALONE = DistContext.alone(CPU)
SOURCE = ImageSource(ViewRecipe(image_size=16), LoaderConfig(backend="torchvision"), ALONE, nullcontext, torch.float32)


def on_circle(*degrees: float) -> Tensor:
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, num_classes: int) -> Tensor:
    """The vote over a whole bank."""
    neighbours = Neighbours(queries, k)
    neighbours.add(bank, labels)
    return neighbours.vote(k, temperature, num_classes)


def knn_accuracy(
    bank: Tensor, labels: Tensor, queries: Tensor, expected: Tensor, k: int, temperature: float, num_classes: int
) -> float:
    """Percent of ``queries`` whose vote is as expected."""
    predicted = knn_predict(bank, labels, queries, k, temperature, num_classes)
    return 100.0 * (predicted == expected).double().mean().item()


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


@pytest.mark.parametrize(("chunk_numbers", "rows"), [(1, 7), (500, 90), (500, 33), (1 << 27, 1 << 14)])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk_numbers: int, rows: int) -> None:
    monkeypatch.setattr(neighbours_module, "SIMILARITIES_AT_ONCE", chunk_numbers)
    monkeypatch.setattr(neighbours_module, "BANK_ROWS_AT_ONCE", rows)
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
    """A stand-in for a backbone: 4 x 4 mean colours."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)


def test_features_of_all_ranks_together_are_those_of_one(photo_dataset: ShardSet) -> None:
    ids = bank_ids(photo_dataset.num_samples, 10)
    whole = extract_features(MeanColour(), photo_dataset, ids, SOURCE)
    parts = [
        extract_features(MeanColour(), photo_dataset, ids, replace(SOURCE, dist=DistContext(rank, 12, rank, 12, CPU)))
        for rank in range(12)
    ]
    assert [len(part) for part in parts] == [1] * 10 + [0, 0]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_features_leave_the_mode_of_the_backbone(photo_dataset: ShardSet) -> None:
    backbone = nn.Sequential(MeanColour(), nn.BatchNorm1d(48)).train()
    extract_features(backbone, photo_dataset, bank_ids(photo_dataset.num_samples, 4), SOURCE)
    assert backbone.training
    assert backbone[1].num_batches_tracked == 0


def test_online_accuracy_of_held_out_samples(photo_dataset: ShardSet) -> None:
    monitor = OnlineKnn(photo_dataset, KnnConfig(k=5, bank_size=30), SOURCE)
    ids = bank_ids(photo_dataset.num_samples, 30)
    features = extract_features(MeanColour(), photo_dataset, ids, SOURCE)
    labels = torch.from_numpy(photo_dataset.labels(ids).astype(np.int64))
    expected = knn_accuracy(features[:27], labels[:27], features[27:], labels[27:], 5, 0.07, 4)
    assert monitor.evaluate(MeanColour()) == pytest.approx(expected)
    assert "3 queries held out" in monitor.describe()


def test_online_accuracy_with_the_training_set_as_queries(photo_dataset: ShardSet) -> None:
    monitor = OnlineKnn(photo_dataset, KnnConfig(data=photo_dataset.path, k=1), SOURCE)
    assert monitor.evaluate(MeanColour()) == 100.0  # each sample is its own nearest neighbour


def test_a_bank_of_one_sample_has_nothing_to_compare_with(photo_dataset: ShardSet) -> None:
    with pytest.raises(UserError, match=r"of 48 samples, --knn-bank-size 1 leaves one.*--knn-every 0"):
        OnlineKnn(photo_dataset, KnnConfig(bank_size=1), SOURCE)


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


def rot(dataset: ShardSet, sample_id: int) -> None:
    """Change a byte of an image where it lies."""
    row = dataset.samples[sample_id]
    with open(dataset.shard_path(int(row["shard"])), "r+b") as file:
        file.seek(int(row["offset"]) + int(row["length"]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def rotten(photo_dataset: ShardSet, tmp_path: Path) -> ShardSet:
    """A copy of the dataset in which sample 7 has rotted."""
    shutil.copytree(photo_dataset.path, tmp_path / "rotten")
    dataset = ShardSet.open(tmp_path / "rotten")
    rot(dataset, 7)
    return dataset


def test_an_evaluation_refuses_images_that_have_rotted(rotten: ShardSet) -> None:
    with pytest.raises(UserError, match=r"(?s)sample 7 \(key .*checksum differs.*counts every image once"):
        extract_features(MeanColour(), rotten, np.arange(rotten.num_samples), SOURCE)
    extract_features(MeanColour(), rotten, np.arange(7), SOURCE)


def test_the_monitor_leaves_rotten_images_out(photo_dataset: ShardSet, rotten: ShardSet, capsys: Any) -> None:
    good = np.delete(np.arange(photo_dataset.num_samples), 7)
    ids = np.arange(photo_dataset.num_samples)
    scores = [
        score_neighbours(
            MeanColour(), Samples(bank, kept), Samples(asked, kept), SOURCE, ks=[3], temperature=0.07, tolerant=True
        )[3]
        for bank, asked, kept in ((photo_dataset, photo_dataset, good), (rotten, rotten, ids))
    ]
    assert scores[0] == scores[1]
    assert scores[1].total == len(good)
    assert "left out of the accuracy: sample 7" in capsys.readouterr().out


def test_half_precision_and_several_k(photo_dataset: ShardSet) -> None:
    samples = Samples.all_of(photo_dataset)
    whole, half = (
        score_neighbours(MeanColour(), samples, samples, SOURCE, ks=[1, 5, 999], temperature=0.07, dtype=dtype)
        for dtype in (torch.float32, torch.float16)
    )
    assert whole == half
    assert whole[1].correct == whole[1].total == photo_dataset.num_samples
    features = extract_features(MeanColour(), photo_dataset, samples.ids, SOURCE)
    labels = torch.from_numpy(photo_dataset.labels(samples.ids).astype(np.int64))
    for k in (5, 999):
        assert whole[k].top1 == pytest.approx(knn_accuracy(features, labels, features, labels, k, 0.07, 4))


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return toy_runs.call(monkeypatch, knn, *toy_runs.CPU, "--backend", "torchvision", *arguments)


def test_the_script(photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    data = ["--data", photo_dataset_path, "--val-data", photo_dataset_path, "--checkpoint", "untrained:resnet_tiny"]
    out = tmp_path / "knn.json"
    assert run_script(monkeypatch, *data, "--image-size", 16, "--k", "5,1", "--json", out) == 0
    assert "each is its own nearest neighbour" in (said := capsys.readouterr().out)
    assert "more than there are samples" not in said
    assert "k 1          top-1 100.00 % (48 of 48)" in said
    result = json.loads(out.read_text())
    assert [row["k"] for row in result["knn"]] == [1, 5]
    assert result["knn"][0] == {"k": 1, "top1": 100.0, "correct": 48, "total": 48}
    assert run_script(monkeypatch, *data, "--image-size", 16, "--k", "49") == 0
    assert "note: --k 49 is more than there are samples to compare with" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--k", "20;200"], "--k 20;200: write whole numbers"),
        (["--temperature", "0"], "--temperature 0.0: it must be above 0"),
        (["--temperature", "nan"], "--temperature nan: it must be above 0"),
        (["--bank-size", "0"], "--bank-size 0: it must be at least 1"),
        (["--seed", "-1"], "--seed -1: it must lie in 0 .. 2**64 - 1"),
        (["--val-data", "/nowhere"], "no dataset at /nowhere"),
        (["--checkpoint", "/nowhere"], "cannot read the checkpoint /nowhere"),
        (["--json", "/dev/null/x.json"], "cannot write /dev/null/x.json"),
    ],
)
def test_mistakes_of_the_script(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, more: list[str], message: str
) -> None:
    data = ["--data", photo_dataset_path, "--val-data", photo_dataset_path, "--checkpoint", "untrained:resnet_tiny"]
    assert run_script(monkeypatch, *data, "--image-size", 16, *more) == 2
    assert message in capsys.readouterr().err


def test_samples_without_a_label_take_no_part(photo_dataset: ShardSet) -> None:
    """Of a dataset whose label file names some of its images: they must not be counted as a class of their own."""
    partial = copy(photo_dataset)
    partial._rows, partial.has_labels = photo_dataset._rows.copy(), False
    partial._rows["label"][::3] = -1
    assert Samples.labelled(photo_dataset).ids.tolist() == list(range(48))
    expected = [i for i in range(48) if i % 3]
    assert Samples.labelled(partial).ids.tolist() == expected
    online = OnlineKnn(partial, KnnConfig(), SOURCE)
    assert sorted([*online._bank.ids, *online._queries.ids]) == expected
    partial.classes = ()
    assert len(Samples.labelled(partial).ids) == 0
