"""The benchmarks of scale and sharding do what they say, at toy size."""

from __future__ import annotations

import itertools
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.shards import ShardSet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import scale
import sharding


@pytest.mark.parametrize("samples", [1000, 3_000_001])
def test_a_simulated_dataset_opens_and_a_rank_runs_on_it(tmp_path: Path, samples: int) -> None:
    scale.simulate(tmp_path, samples, samples // 3)
    dataset = ShardSet.open(tmp_path)
    assert (dataset.num_samples, len(dataset.shards)) == (samples, 4)
    assert dataset.shard_samples.sum() == samples
    assert (tmp_path / "samples.npy").stat().st_blocks * 512 < 1 << 20  # a hole takes no disk
    for order in ("random", "blocks"):
        measured = scale.be_a_rank(tmp_path, 2, order, rank_batch=8, batches=10)
        assert measured["start_up_s"] > 0
        assert measured["batch_ms"] > 0


def test_a_rank_in_a_process_of_its_own(tmp_path: Path) -> None:
    scale.simulate(tmp_path, 5000, 1000)
    measured = scale.start_rank(scale.Config(rank_batch=4, batches=10), tmp_path, 4, "random")
    assert set(measured) == {"start_up_s", "memory_mib", "batch_ms", "lookup_ms"}


def test_pairs_that_meet_again_are_counted() -> None:
    rng = np.random.default_rng(0)
    now, later, batch = rng.permutation(60), rng.permutation(60), 6

    def pairs(ids: np.ndarray) -> set[tuple[int, ...]]:
        batches = np.sort(ids.reshape(-1, batch), axis=1).tolist()
        return {pair for members in batches for pair in itertools.combinations(members, 2)}

    assert scale.pairs_again(now, later, batch) == len(pairs(now) & pairs(later))
    assert scale.pairs_again(now, now, batch) == 10 * 15


def test_the_quality_of_blocks_lies_between_chance_and_one_shard() -> None:
    rows = {row["order"]: row for row in scale.measure_quality(shards=64, per_shard=64, batch=32, epochs=3)}
    assert rows["random"]["meet_again"] == pytest.approx(1, abs=0.3)
    assert rows["blocks of 1 shards"]["shards_in_batch"] == 1
    again = [rows[f"blocks of {group} shards"]["meet_again"] for group in (1, 4, 16)]
    assert again == sorted(again, reverse=True)
    assert again[-1] > rows["random"]["meet_again"]


def picture_sizes(tar: Path) -> list[int]:
    with tarfile.open(tar) as file:
        return [member.size for member in file if member.name.endswith((".jpg", ".png"))]


def test_contestants_of_sharding_write_the_same_pictures(photo_dataset: ShardSet, tmp_path: Path) -> None:
    size = sharding.write_folder(photo_dataset, 20, tmp_path / "pictures")
    config = sharding.Config(photo_dataset.path, workers=(1,), verify=("header",))
    contents = {}
    for name, work in sharding.contestants(config, tmp_path).items():
        work()
        tars = sorted((tmp_path / "out").glob("*.tar"))
        contents[name] = sorted(size for tar in tars for size in picture_sizes(tar))
    assert set(contents) == {"ours, header, 1 worker", "webdataset ShardWriter", "tar cf"}
    assert len({tuple(sizes) for sizes in contents.values()}) == 1
    assert sum(contents["tar cf"]) == size


def test_too_few_pictures_are_refused(photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sharding.py", str(photo_dataset_path)])
    with pytest.raises(UserError, match="48 pictures: it takes 512 to measure anything"):
        sharding.main()


def test_results_of_sharding_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    run = sharding.Run
    runs = {
        "ours, full, 1 worker": [run(2.0, 2.0)] * 3,
        "ours, full, 2 workers": [run(1.0, 2.0)] * 3,
        "webdataset ShardWriter": [run(4.0, 4.0)] * 3,
    }
    results = json.loads(json.dumps(sharding.report(runs, 100, 11_000_000), default=lambda spread: spread.median))
    assert results["ours, full, 2 workers"] == {
        "img_per_s": 100.0,
        "img_per_cpu_s": 50.0,
        "times_shard_writer": 4.0,
        "times_one_worker": 2.0,
    }
    assert "ours, full, 2 workers: 2 (2 .. 2) times as fast as 1 worker" in capsys.readouterr().out
