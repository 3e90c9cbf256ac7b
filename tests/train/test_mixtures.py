"""Training on several datasets: the same batches when stopped, on any ranks, local or remote; shares, kNN, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.common.errors import UserError
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.helpers.damage import change_bytes, copy_dataset
from tests.helpers.photos import write_photo_folder
from tests.helpers.servers import nginx
from tests.helpers.toy_runs import call
from tests.train.test_pretrain import CPU, global_batches, losses, run_here, torchrun
from tools import profile_throughput, report
from train.pretrain import pretrain
from train.storage.run_folder import read_lines, read_run

pytestmark = pytest.mark.usefixtures("one_thread")
EPOCHS, STEPS, BATCH = 2, 5, 12  # of an epoch: 48 of the first and 14 of the second, 2 left out


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 other images in classes of their own; half of them are taken in an epoch."""
    folder = tmp_path_factory.mktemp("second")
    photos = write_photo_folder(folder / "more", per_class=7)
    for name in list(photos.iterdir()):
        name.rename(photos / f"other {name.name}")
    options = ShardingOptions(samples_per_shard=10, seed=3)
    make_dataset(str(photos), folder / "dogs", options, quiet=True, in_process=True)
    return folder / "dogs"


def flags(data: list[object], run_dir: Path, *more: str) -> list[str]:
    named = [word for place in data for word in ("--data", str(place))]
    return [*named, "--run-dir", str(run_dir), "--epochs", str(EPOCHS), "--global-batch", str(BATCH), *CPU, *more]


@pytest.fixture(scope="module")
def undisturbed(photo_dataset_path: Path, second: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    with pytest.MonkeyPatch.context() as patch:
        assert run_here(patch, flags([photo_dataset_path, f"{second}:0.5"], run_dir)) == 0
    return run_dir


def test_batches_and_shares(undisturbed: Path) -> None:
    batches = np.array(global_batches(undisturbed, 1))
    assert batches.shape == (EPOCHS * STEPS, BATCH)
    of_second = (batches >= 48).sum(1)
    assert set(of_second.tolist()) <= {2, 3}
    both_epochs = batches[batches >= 48].tolist()
    assert len(set(both_epochs)) == len(both_epochs)  # the second epoch has the other half
    lines = [line for line in read_lines(undisturbed / "metrics.jsonl") if "loss" in line]
    assert [line["share_dogs"] for line in lines] == pytest.approx(of_second / BATCH)
    assert [line["share_photos"] for line in lines] == pytest.approx(1 - of_second / BATCH)
    board = EventAccumulator(str(undisturbed / "tensorboard")).Reload()
    assert len(board.Scalars("share_dogs")) == len(lines)
    assert json.loads((undisturbed / "plan.json").read_text())["num_samples"] == 62
    data = json.loads((undisturbed / "config.json").read_text())["data"]
    assert [text.rpartition(":")[2] for text in data] == ["1", "0.5"]


def test_each_dataset_is_classified_by_its_own_classes(undisturbed: Path) -> None:
    lines = [line for line in read_lines(undisturbed / "metrics.jsonl") if "knn_top1" in line]
    assert [line["step"] for line in lines] == [0, 5, 10]
    for line in lines:
        assert line["knn_top1"] == line["knn_top1_photos"]
        assert 0 <= line["knn_top1_dogs"] <= 100


def test_knn_data_goes_to_the_dataset_of_its_classes(
    photo_dataset_path: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    more = ["--knn-data", str(second), "--max-steps", "1"]
    assert run_here(monkeypatch, flags([photo_dataset_path, second], tmp_path / "run", *more)) == 0
    first = next(line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "knn_top1" in line)
    assert {name for name in first if name.startswith("knn")} == {"knn_top1", "knn_top1_dogs"}
    assert "28 queries against 28 training samples, k 20, of dogs" in capsys.readouterr().out


def test_stopped_in_the_middle_of_an_epoch(
    undisturbed: Path, photo_dataset_path: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the folder alone, whose config.json names the datasets and weights; the probe sees one's labels."""
    arguments = flags([photo_dataset_path, f"{second}:0.5"], tmp_path / "run", "--probe")
    assert run_here(monkeypatch, [*arguments, "--max-steps", "4"]) == 0
    assert run_here(monkeypatch, [*arguments, "--max-steps", "7", "--resume"]) == 0
    assert run_here(monkeypatch, ["--resume", "--run-dir", str(tmp_path / "run")]) == 0
    assert losses(tmp_path / "run") == losses(undisturbed)
    assert global_batches(tmp_path / "run", 1) == global_batches(undisturbed, 1)


def test_on_two_ranks(undisturbed: Path, photo_dataset_path: Path, second: Path, tmp_path: Path) -> None:
    ended = torchrun(2, flags([photo_dataset_path, f"{second}:0.5"], tmp_path / "run"))
    assert ended.returncode == 0, ended.stderr
    assert global_batches(tmp_path / "run", 2) == global_batches(undisturbed, 1)
    for step, loss in losses(tmp_path / "run").items():
        assert loss == pytest.approx(losses(undisturbed)[step], abs=1e-4)
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    alone = [line for line in read_lines(undisturbed / "metrics.jsonl") if "loss" in line]
    assert [line["share_dogs"] for line in lines] == pytest.approx([line["share_dogs"] for line in alone])


def test_local_and_remote(
    undisturbed: Path, photo_dataset_path: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nginx(second, tmp_path / "nginx") as server:
        arguments = flags([photo_dataset_path, f"{server.url}:0.5"], tmp_path / "run", "--knn-every", "0")
        assert run_here(monkeypatch, [*arguments, "--cache-dir", str(tmp_path / "cache")]) == 0
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_every_order_and_repeats(
    photo_dataset_path: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--knn-every", "0", "--epoch-order", "blocks", "--block-shards", "2", "--epochs", "1"]
    assert run_here(monkeypatch, flags([photo_dataset_path, f"{second}:3"], tmp_path / "run", *more)) == 0
    ids = np.ravel(global_batches(tmp_path / "run", 1))
    assert len(ids) == (48 + 84) // BATCH * BATCH
    assert np.bincount(ids, minlength=76).tolist() == [1] * 48 + [3] * 28


def test_a_bad_sample_is_replaced_by_one_of_its_dataset(
    photo_dataset_path: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = copy_dataset(photo_dataset_path, tmp_path / "damaged")
    change_bytes(damaged, [47])
    more = ["--knn-every", "0", "--epochs", "1"]
    assert run_here(monkeypatch, flags([damaged, second], tmp_path / "run", *more)) == 0
    (bad,) = read_lines(tmp_path / "run" / "bad_samples.jsonl", "sample")
    assert (bad["sample"], bad["shard"], bad["replacement"]) == (47, "damaged/shard-000004.tar", 0)


def test_another_mixture_is_not_resumed(
    photo_dataset_path: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    first = flags([photo_dataset_path, f"{second}:0.5"], tmp_path / "run", "--knn-every", "0", "--max-steps", "1")
    assert run_here(monkeypatch, first) == 0
    for data, words in (
        ([photo_dataset_path, f"{second}:0.6"], f"given is {photo_dataset_path}:1 {second}:0.6"),
        ([photo_dataset_path], f"the run has {photo_dataset_path}:1 {second}:0.5, given is {photo_dataset_path}\n"),
        ([f"{second}:1", f"{photo_dataset_path}:0.5"], "dataset: checkpoint"),
    ):
        assert run_here(monkeypatch, flags(data, tmp_path / "run", "--resume", "--knn-every", "0")) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "more", "words"),
    [
        (["{first}", "{first}"], [], "is named twice"),
        (["{first}", "{second}:0"], [], "is a number above 0"),
        (["{first}", "{second}:0.001"], [], "takes none of its 28 samples"),
        (["{first}", "/nowhere"], [], "no dataset at /nowhere"),
        (
            ["{first}", "{second}"],
            ["--epoch-order", "blocks", "--block-streams", "2"],
            "--block-streams 2 with several",
        ),
        (["{first}", "{second}"], ["--global-batch", "80"], "fewer than one --global-batch of 80"),
    ],
)
def test_mistakes(
    photo_dataset_path: Path,
    second: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    data: list[str],
    more: list[str],
    words: str,
) -> None:
    named: list[object] = [text.format(first=photo_dataset_path, second=second) for text in data]
    assert run_here(monkeypatch, flags(named, tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert not (tmp_path / "run").exists()


def test_one_of_weight_1_is_the_dataset_alone(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, data in (("plain", photo_dataset_path), ("weighted", f"{photo_dataset_path}:1")):
        assert run_here(monkeypatch, flags([data], tmp_path / name, "--max-steps", "2", "--knn-every", "0")) == 0
    assert losses(tmp_path / "plain") == losses(tmp_path / "weighted")


def test_from_python(photo_dataset_path: Path, second: Path, tmp_path: Path, undisturbed: Path) -> None:
    settings = {"epochs": EPOCHS, "global_batch": BATCH, "max_steps": 2, "knn_every": 0, "log_every": 1}
    tiny = {"backbone": "resnet_tiny", "image_size": 16, "dim": 16, "projector_hidden": 16, "predictor_hidden": 4}
    here = {"device": "cpu", "backend": "torchvision", "threads": 1}
    assert pretrain([str(photo_dataset_path), f"{second}:0.5"], tmp_path / "run", **settings, **tiny, **here)
    assert list(losses(tmp_path / "run").values()) == list(losses(undisturbed).values())[:2]
    with pytest.raises(UserError, match="is named twice"):
        pretrain([str(second), str(second)], tmp_path / "other")


def test_the_profiler_and_the_report(
    undisturbed: Path, photo_dataset_path: Path, second: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--data", photo_dataset_path, "--data", f"{second}:0.5", "--json", tmp_path / "profile.json"]
    words += ["--batch", 12, "--repeats", 3, "--seconds", 0.05, "--backend", "torchvision", "--device", "cpu"]
    words += ["--stages", "read", "loader", "--backbone", "resnet_tiny", "--image-size", 16]
    assert call(monkeypatch, profile_throughput, *words) == 0
    assert set(json.loads((tmp_path / "profile.json").read_text())["stages"]) == {"read", "loader"}
    assert read_run(undisturbed).classes is None
    assert report.data_of(report.RunRecord.read(undisturbed)) == photo_dataset_path
