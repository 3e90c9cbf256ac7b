"""The benchmarks of scale and sharding do what they say, at toy size."""

from __future__ import annotations

import itertools
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from tools.common.measuring import Spread

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import plots
import ray_sharding
import scale
import sharding


@pytest.mark.parametrize("samples", [1000, 3_000_001])
def test_a_simulated_dataset_opens_and_a_rank_runs_on_it(tmp_path: Path, samples: int) -> None:
    scale.simulate(tmp_path, samples, samples // 3)
    dataset = ShardSet.open(tmp_path)
    assert (dataset.num_samples, len(dataset.shards)) == (samples, 4)
    assert dataset.shard_samples.sum() == samples
    assert (tmp_path / "samples.npy").stat().st_blocks * 512 < 1 << 20  # a hole takes no disk
    for order in scale.ORDERS:
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
    assert rows["random"]["read_by_machine"] == rows["blocks of 16 shards"]["read_by_machine"] == 1
    assert rows["blocks of 16 shards, 2 streams"]["read_by_machine"] == 0.5  # eight machines, two streams
    assert rows["blocks of 16 shards, 2 streams"]["shards_in_batch"] > rows["blocks of 16 shards"]["shards_in_batch"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batches": 9}, "--batches at least 10"),
        ({"samples": (100.0,)}, "--samples must fill a shard"),
        ({"rank_batch": 12}, "--rank-batch 12: take a multiple of 8"),
        ({"ranks": (0,)}, "--ranks 0 x --rank-batch 256 is no batch of 1e[+]06 samples"),
        ({"ranks": (5000,)}, "--ranks 5000 x --rank-batch 256 is no batch"),
        ({"json": Path("/nowhere/x.json")}, "--json /nowhere/x.json cannot be written"),
    ],
)
def test_what_cannot_be_simulated_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scale.check(scale.Config(**fields))


def test_costs_are_drawn(tmp_path: Path) -> None:
    spread = {"minimum": 1.0, "median": 2.0, "maximum": 4.0}
    quantities = dict.fromkeys(plots.SCALE_PANELS, spread)
    cases = [
        {"samples": samples, "ranks": ranks, "order": order, **quantities}
        for samples, ranks, order in itertools.product((10**6, 10**9), (1, 1024), scale.ORDERS)
    ]
    figure = plots.draw_scale(cases, "a machine")
    figure.savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title("left") for axes in figure.axes] == list(plots.SCALE_PANELS.values())


def image_sizes(tar: Path) -> list[int]:
    with tarfile.open(tar) as file:
        return [member.size for member in file if member.name.endswith((".jpg", ".png"))]


def amounts(dataset: ShardSet, folder: Path) -> list[sharding.Contestant]:
    counts = {"copied": 100, "decoded": 60, "few": 8}
    sizes = {name: sharding.write_folder(dataset, count, folder / name) for name, count in counts.items()}
    return [sharding.Contestant(lambda: None, counts[name], sizes[name]) for name in counts]


def test_contestants_of_sharding_write_the_same_images(photo_dataset: ShardSet, tmp_path: Path) -> None:
    config = sharding.Config(photo_dataset.path, workers=(1, 2))
    copied, decoded, few = amounts(photo_dataset, tmp_path)
    named = sharding.contestants(config, tmp_path, copied, decoded, few)
    written = {}
    for name, contestant in named.items():
        if name in ("ours, full, 1 worker", "ours, header, 2 workers", "webdataset ShardWriter", "tar cf"):
            contestant.work()
            tars = sorted((tmp_path / "out").glob("*.tar"))
            written[name] = sorted(size for tar in tars for size in image_sizes(tar))
            assert (len(written[name]), sum(written[name])) == (contestant.samples, contestant.size)
            shutil.rmtree(tmp_path / "out")
    assert written["ours, header, 2 workers"] == written["webdataset ShardWriter"] == written["tar cf"]
    assert len(written) == 4


def test_workers_get_shards_of_equal_size(photo_dataset: ShardSet, tmp_path: Path) -> None:
    config = sharding.Config(photo_dataset.path, workers=(1,), verify=("none",))
    sharding.contestants(config, tmp_path, *amounts(photo_dataset, tmp_path))["ours, none, 1 worker"].work()
    assert [shard.samples for shard in ShardSet.open(tmp_path / "out").shards] == [13] * 7 + [9]


def test_the_same_images_come_again_under_other_names(photo_dataset: ShardSet, tmp_path: Path) -> None:
    size = sharding.write_folder(photo_dataset, 100, tmp_path)
    files = sorted(tmp_path.glob("*/*.jpg"), key=lambda file: file.name)
    assert [file.read_bytes() for file in files] == [photo_dataset.read(number % 48) for number in range(100)]
    assert size == sum(file.stat().st_size for file in files)
    assert len({file.stat().st_ino for file in files}) == 48  # the others take no room


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repeats": 2}, "--repeats must be at least 3"),
        ({"workers": (0,)}, "--workers at least 1"),
        ({"megabytes": -1}, "must be above 0"),
        ({"megabytes": 1e12}, r"MB free, and this takes 1000000000000: lower --megabytes"),
        ({"place": Path("/nowhere")}, "--place /nowhere is no folder"),
        ({"plot": Path("/nowhere/plot.png")}, r"--plot /nowhere/plot.png cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sharding.check(sharding.Config(Path("data"), **{"megabytes": 1.0, "full_megabytes": 1.0, **fields}))


def test_results_of_sharding_are_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, seconds = sharding.Run, {}
    seconds["ours, full, 1 worker"] = 2.5
    seconds["ours, full, 2 workers"] = 1.5
    seconds["ours, start-up, 1 worker"] = seconds["ours, start-up, 2 workers"] = 0.5
    seconds["webdataset ShardWriter"] = 6.0
    seconds["hashing, 1 process"], seconds["hashing, 2 processes"] = 1.0, 1.25
    runs = {name: [run(value, 2.0)] * 3 for name, value in seconds.items()}
    ours = sharding.Contestant(lambda: None, 100, 11_000_000)
    others = {
        "webdataset ShardWriter": replace(ours, samples=200, size=22_000_000),
        "hashing, 1 process": replace(ours, samples=0, size=0),
        "hashing, 2 processes": replace(ours, samples=0, size=0),
    }
    results = sharding.report({name: others.get(name, ours) for name in runs}, runs)
    assert plain(results["ours, full, 2 workers"]) == {
        "samples": 100,
        "bytes": 11_000_000,
        "wall_s": 1.5,
        "img_per_s": pytest.approx(100 / 1.5),
        "mb_per_s": pytest.approx(11 / 1.5),
        "img_per_cpu_s": 50.0,
        "mb_per_cpu_s": pytest.approx(5.5),
        "times_shard_writer": pytest.approx(2.0),  # 66.7 images a second against 33.3
        "times_one": pytest.approx(2.5 / 1.5),
        "times_one_once_started": pytest.approx(2.0),
    }
    printed = capsys.readouterr().out
    assert "ours, full, 2 workers: 1.667 (1.667 .. 1.667) times as fast as 1 worker; once started 2 (2 .. 2)" in printed
    assert "hashing, 2 processes: 1.6 (1.6 .. 1.6) times as much as 1 process" in printed
    plots.draw_sharding(results, "a machine").savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_engines_of_sharding_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"local": (10, 20), "ray": (12, 21), "local, start-up": (2, 1), "ray, start-up": (4, 2)}
    ray_sharding.report(100, {name: [sharding.Run(*of)] * 3 for name, of in seconds.items()})
    printed = capsys.readouterr().out
    assert "ray: 8.333 (8.333 .. 8.333) images/s, 210 (210 .. 210) CPU ms an image" in printed
    assert "ray, start-up: 4 (4 .. 4) s, 2 (2 .. 2) CPU s" in printed
    assert "ray / local, images/s: 0.8333 (0.8333 .. 0.8333); once started 1 (1 .. 1)" in printed
    assert "ray / local, images for each CPU second: 0.9524 (0.9524 .. 0.9524); once started 1 (1 .. 1)" in printed


def plain(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value.median if isinstance(value, Spread) else value for name, value in result.items()}
