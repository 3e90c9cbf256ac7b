"""Datasets as one: ids, bytes, sizes, shards and bad samples are those of the datasets; remote ones share a cache."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.common.locations import Url
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.dataset.mixture import Mixture
from pipeline.dataset.remote_cache import CacheConfig
from pipeline.dataset.shard_store import PrefetchPlan
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.damage import change_bytes, copy_dataset
from tests.helpers.servers import nginx


@pytest.fixture(scope="module")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 other images without labels, in 4 shards."""
    out = tmp_path_factory.mktemp("other") / "other"
    make_dataset("synthetic:20", out, ShardingOptions(samples_per_shard=5, labels="none"), quiet=True, in_process=True)
    return out


@pytest.fixture(scope="module")
def other(other_path: Path) -> ShardSet:
    return ShardSet.open(other_path)


def test_it_is_both_datasets(photo_dataset: ShardSet, other: ShardSet) -> None:
    mixture = Mixture([photo_dataset, other], [1.0, 0.3])
    assert (len(mixture), mixture.epoch_samples, mixture.samples_per_epoch) == (68, 54, (48, 6))
    assert mixture.names == ("photos", "other")
    assert [mixture.read(n) for n in (0, 47, 48, 67)] == [*map(photo_dataset.read, (0, 47)), *map(other.read, (0, 19))]
    ids = np.array([67, 0, 48, 30])
    assert mixture.part_of(ids).tolist() == [1, 0, 1, 0]
    assert mixture.sizes(ids).tolist() == [*other.sizes([19]).tolist(), *photo_dataset.sizes([0]).tolist(),
                                           *other.sizes([0]).tolist(), *photo_dataset.sizes([30]).tolist()]  # fmt: skip
    assert mixture.fingerprint == Mixture([photo_dataset, other], [2.0, 1.0]).fingerprint
    assert mixture.fingerprint != Mixture([other, photo_dataset], [1.0, 1.0]).fingerprint


def test_views_are_drawn_from_the_pass(photo_dataset: ShardSet, other: ShardSet) -> None:
    mixture = Mixture([photo_dataset, other], [1.0, 2.5])
    # Epoch 3 begins with pass 3 of the first, and with samples 150 of the second's row: pass 7.
    assert mixture.draw_epochs(3, [5, 50, 50 + 68, 50 + 2 * 68]).tolist() == [3, 7, 8, 9]


def test_bad_samples_are_named(photo_dataset: ShardSet, other_path: Path, tmp_path: Path) -> None:
    path = copy_dataset(other_path, tmp_path / "damaged")
    change_bytes(path, [19])
    mixture = Mixture([photo_dataset, ShardSet.open(path)], [1.0, 1.0])
    with pytest.raises(BadSampleError, match=r"sample 67 .* in damaged/shard-000003\.tar\): checksum differs"):
        mixture.read(67)
    assert not mixture.is_as_sharded(67)
    assert mixture.bad_sample(48, "odd", as_sharded=True).sample_id == 48


def test_mistakes(photo_dataset: ShardSet, photo_dataset_path: Path, tmp_path: Path) -> None:
    copied = ShardSet.open(copy_dataset(photo_dataset_path, tmp_path / "copy"))
    with pytest.raises(UserError, match="are the same dataset: name it once"):
        Mixture([photo_dataset, copied], [1.0, 1.0])
    with pytest.raises(UserError, match=r"takes none of its 48 samples in an epoch: take a weight of 0\.021"):
        Mixture([photo_dataset], [0.01])


def test_local_and_remote_ones_are_read_ahead(
    photo_dataset: ShardSet, other: ShardSet, other_path: Path, tmp_path: Path
) -> None:
    """Only shards of the remote one come into the cache, and only those that the plan needs."""
    with nginx(other_path, tmp_path / "nginx") as server:
        remote = ShardSet.open(Url(server.url), cache=CacheConfig(tmp_path / "cache", "1GB"))
        mixture = Mixture([photo_dataset, remote], [1.0, 1.0])
        steps = [np.array([3, 50]), np.array([68 + 60, 7])]  # 128: sample 60 for the second time in its epoch
        with mixture.follow(PrefetchPlan(iter(steps), 0), threading.Event(), 0, 1) as begin:
            for step in steps:
                begin()
                assert [mixture.read(n % 68) for n in step.tolist()] == [
                    photo_dataset.read(n) if n < 48 else other.read(n - 48) for n in (step % 68).tolist()
                ]
        fetched = sorted(path.name[:64] for path in (tmp_path / "cache").glob("*.tar"))
        assert fetched == sorted(other.shards[number].sha256 for number in (0, 2))


def test_remote_ones_share_the_cache(
    photo_dataset: ShardSet, photo_dataset_path: Path, other: ShardSet, other_path: Path, tmp_path: Path
) -> None:
    """Its limit is that of both; neither removes what the other needs, and what nobody needs makes room."""
    sizes = [shard.bytes for dataset in (photo_dataset, other) for shard in dataset.shards]
    rows = sum((dataset.path / "samples.npy").stat().st_size for dataset in (photo_dataset, other))
    limit = rows + 2 * sum(sizes) // 3
    with nginx(photo_dataset_path, tmp_path / "n1") as first, nginx(other_path, tmp_path / "n2") as second:
        cache = CacheConfig(tmp_path / "cache", f"{limit}B", fetch_threads=2)
        parts = [ShardSet.open(Url(server.url), cache=cache) for server in (first, second)]
        mixture = Mixture(parts, [1.0, 1.0])
        budgets = [part._store.budget for part in parts]  # type: ignore[attr-defined]
        assert sum(budgets) <= limit - rows
        assert abs(budgets[0] / budgets[1] - sum(sizes[:5]) / sum(sizes[5:])) < 0.01
        ids = np.random.default_rng(0).permutation(68)
        steps = [ids[start : start + 4] for start in range(0, 68, 4)] * 2
        with mixture.follow(PrefetchPlan(iter(steps), 0), threading.Event(), 0, 1) as begin:
            for step in steps:
                begin()
                for n in step.tolist():
                    assert mixture.read(n) == (photo_dataset.read(n) if n < 48 else other.read(n - 48))
                assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= limit
        with pytest.raises(UserError, match=r"--cache-size .* is too small"):
            parts[0].check_room(5, "all", "take blocks")
