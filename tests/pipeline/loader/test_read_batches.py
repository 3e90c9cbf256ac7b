"""Reading ahead and the rule of replacement, without a back end."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.backends.base import Batch
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.loader.bad_samples import BadSamples
from pipeline.loader.read_batches import IDS_PER_READ, Assembler
from pipeline.sampling.sampler import BatchIds
from pipeline.sampling.views import ViewParams, ViewRecipe, draw_views
from tests.helpers.damage import change_bytes, copy_dataset

RECIPE = ViewRecipe(image_size=16)
EPOCH_7 = BatchIds(7, 0, np.arange(0))


class Reading:
    """An assembler of one dataset, and what it reported."""

    def __init__(self, dataset: ShardSet, pool: ThreadPoolExecutor, limit: int = 100) -> None:
        self.dataset = dataset
        self.reports: list[BadSampleError] = []
        self.bad = BadSamples(dataset.num_samples, limit, self.reports.append)
        self.assembler = Assembler(dataset, self.draw, pool, self.bad)

    def draw(self, batch: BatchIds, ids: np.ndarray) -> ViewParams:
        return draw_views(RECIPE, 0, batch.epoch, ids, self.dataset.sizes(ids))

    def batches(self, ids: list[int], batch: int = 8, depth: int = 3) -> Iterator[Batch]:
        parts = [np.array(ids[start : start + batch]) for start in range(0, len(ids), batch)]
        return self.assembler.read_ahead([BatchIds(7, step, part) for step, part in enumerate(parts)], depth)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def damaged(photo_dataset_path: Path, tmp_path: Path) -> ShardSet:
    """Samples 5, 10, 11 and the last one have changed on the disk."""
    path = copy_dataset(photo_dataset_path, tmp_path / "damaged")
    change_bytes(path, [5, 10, 11, 47])
    return ShardSet.open(path)


@pytest.mark.parametrize("depth", [1, 2, 50])
@pytest.mark.parametrize("batch", [1, IDS_PER_READ + 3, 48])
def test_batches_hold_the_bytes_of_their_samples(
    photo_dataset: ShardSet, pool: ThreadPoolExecutor, batch: int, depth: int
) -> None:
    reading = Reading(photo_dataset, pool)
    ids = np.random.default_rng(0).permutation(48).tolist()
    batches = list(reading.batches(ids, batch, depth))
    assert [made.step for made in batches] == list(range(-(-48 // batch)))
    assert np.concatenate([made.ids for made in batches]).tolist() == ids
    for made in batches:
        np.testing.assert_array_equal(made.sources, made.ids)
        assert [data.tobytes() for data in made.encoded] == [photo_dataset.read(sample) for sample in made.ids]
        np.testing.assert_array_equal(made.windows.crop, reading.draw(EPOCH_7, made.ids).crop)
    assert not reading.reports


def test_no_more_batches_are_taken_than_are_read_ahead(photo_dataset: ShardSet, pool: ThreadPoolExecutor) -> None:
    taken = []

    def batches() -> Iterator[BatchIds]:
        for step in range(20):
            taken.append(step)
            yield BatchIds(0, step, np.array([step]))

    reading = Reading(photo_dataset, pool).assembler.read_ahead(batches(), 3)
    for step in range(10):
        assert next(reading).step == step
        assert len(taken) == step + 1 + 3


def test_bad_samples_are_replaced_by_the_next_good_one(damaged: ShardSet, pool: ThreadPoolExecutor) -> None:
    reading = Reading(damaged, pool)
    (batch,) = reading.batches([4, 5, 6, 10, 11, 12, 47, 0])
    assert batch.ids.tolist() == [4, 5, 6, 10, 11, 12, 47, 0]
    assert batch.sources.tolist() == [4, 6, 6, 12, 12, 12, 0, 0]  # two in a row; and the last wraps around
    assert [data.tobytes() for data in batch.encoded] == [damaged.read(int(source)) for source in batch.sources]
    expected = reading.draw(EPOCH_7, batch.sources)  # seen as the other sample would be
    np.testing.assert_array_equal(batch.windows.crop, expected.crop)
    np.testing.assert_array_equal(batch.windows.factors, expected.factors)


def test_each_bad_sample_is_reported_once_by_shard_key_and_reason(damaged: ShardSet, pool: ThreadPoolExecutor) -> None:
    reading = Reading(damaged, pool)
    for _ in range(3):
        list(reading.batches(list(range(48)) * 2))
    assert sorted(report.sample_id for report in reading.reports) == [5, 10, 11, 47]
    for report in reading.reports:
        assert report.shard == damaged.shards[report.sample_id // 10].name
        assert report.key == damaged.key(report.sample_id)
        assert "checksum" in report.reason
        for part in (str(report.sample_id), report.shard, report.key, report.reason):
            assert part in str(report)


def test_samples_noted_bad_later_are_replaced_like_those_found_when_reading(
    photo_dataset: ShardSet, pool: ThreadPoolExecutor
) -> None:
    reading = Reading(photo_dataset, pool)
    (batch,) = reading.batches([1, 2, 3, 4])
    reading.assembler.note_bad(2, "cannot be decoded")
    reading.assembler.note_bad(3, "cannot be decoded")
    reading.assembler.note_bad(3, "cannot be decoded")
    again = reading.assembler.replace_bad(batch)
    assert (again.epoch, again.step) == (7, 0)
    assert again.ids.tolist() == [1, 2, 3, 4]
    assert again.sources.tolist() == [1, 4, 4, 4]
    assert [report.sample_id for report in reading.reports] == [2, 3]


def test_too_many_bad_samples_stop_with_the_list(damaged: ShardSet, pool: ThreadPoolExecutor) -> None:
    with pytest.raises(UserError, match="--max-bad-samples") as caught:
        list(Reading(damaged, pool, limit=3).batches(list(range(48))))
    for sample in (5, 10, 11, 47):
        assert f"sample {sample} (key {damaged.key(sample)} in {damaged.shards[sample // 10].name})" in str(
            caught.value
        )
    reading = Reading(damaged, pool, limit=4)
    assert len(list(reading.batches(list(range(48))))) == 6
    assert len(reading.reports) == 4


def test_none_may_be_bad(damaged: ShardSet, pool: ThreadPoolExecutor) -> None:
    reading = Reading(damaged, pool, limit=0)
    assert len(list(reading.batches([0, 1, 2]))) == 1
    with pytest.raises(UserError, match="1 bad samples, more than the 0 allowed"):
        list(reading.batches([5]))


def test_all_bad_is_an_error_not_an_endless_search(
    photo_dataset_path: Path, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    path = copy_dataset(photo_dataset_path, tmp_path / "ruined")
    change_bytes(path, list(range(48)))
    reading = Reading(ShardSet.open(path), pool, limit=1000)
    with pytest.raises(UserError, match=r"no sample of .* can be read"):
        list(reading.batches([3]))
    assert len(reading.reports) == 48
    with pytest.raises(UserError, match=r"no sample of .* can be read"):
        list(reading.batches([3]))


def test_only_makes_a_batch_of_one(photo_dataset: ShardSet, pool: ThreadPoolExecutor) -> None:
    (batch,) = Reading(photo_dataset, pool).batches([9, 8, 7])
    alone = batch.only(1)
    assert len(alone) == len(alone.windows) == 1
    assert (alone.ids.tolist(), alone.sources.tolist()) == ([8], [8])
    assert alone.encoded[0].tobytes() == photo_dataset.read(8)
    np.testing.assert_array_equal(alone.windows.crop, batch.windows.crop[1:2])


@pytest.mark.parametrize("verify", [True, False])
def test_the_disk_is_blamed_only_where_bytes_have_changed(
    verify: bool, photo_dataset_path: Path, tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    path = copy_dataset(photo_dataset_path, tmp_path / "copy")
    whole = Reading(ShardSet.open(path, verify_checksums=verify), pool, limit=1)
    whole.assembler.note_bad(2, "cannot be decoded: DALI: libpng error: IDAT: CRC error")
    with pytest.raises(UserError, match=r"(?s)2 bad samples.*Their bytes are those that were sharded.*--decode full"):
        whole.assembler.note_bad(3, "cannot be decoded")
    change_bytes(path, [4])
    rotten = Reading(ShardSet.open(path, verify_checksums=verify), pool, limit=1)
    rotten.assembler.note_bad(2, "cannot be decoded")
    with pytest.raises(UserError, match="Check the disk, write the dataset again, or allow more"):
        rotten.assembler.note_bad(4, "cannot be decoded")
