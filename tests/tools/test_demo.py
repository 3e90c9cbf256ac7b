"""The demo at toy size: its steps run for real, its plan fits any number of images, its refusals are clear."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from tools.demo import DemoConfig, Schedule, check, find_splits, make_datasets, plan
from train.storage.run_folder import read_lines

SCRIPT = Path(__file__).parents[2] / "tools" / "demo.py"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_the_whole_demo_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = run_demo("--out", str(out), "--num-images", "48", "--steps", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ShardSet.open(out / "train").num_samples == ShardSet.open(out / "test").num_samples == 48
    assert (out / "preview.png").stat().st_size > 10_000
    assert (out / "plot.png").stat().st_size > 10_000
    knn = [line["knn_top1"] for line in read_lines(out / "run" / "metrics.jsonl") if "knn_top1" in line]
    for row, value in (("untrained encoder", knn[0]), ("trained encoder", knn[-1]), ("chance", 100 / 12)):
        assert f"    {row:<18} {value:5.1f} %" in done.stdout
    assert "raw pixels" in done.stdout
    for command in (
        "tools/make_shards.py synthetic:48",
        "tools/preview_views.py",
        "train/pretrain.py",
        "tools/plot_run.py",
    ):
        assert command in done.stdout  # shown, so that a user learns it


def test_test_images_are_other_ones_than_those_trained_on(tmp_path: Path) -> None:
    make_datasets(DemoConfig(out=tmp_path, num_images=24))
    checksums = [set(ShardSet.open(tmp_path / name).samples["checksum"].tolist()) for name in ("train", "test")]
    assert len(checksums[0]) == len(checksums[1]) == 24
    assert not checksums[0] & checksums[1]


def test_a_folder_with_train_and_val_gives_two_datasets_of_the_same_classes(photo_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(photo_folder, source / "train")
    shutil.copytree(photo_folder, source / "val")
    shutil.rmtree(source / "val" / "cat")  # a test set need not have every class
    train_tree, test_tree = find_splits(source)
    config = DemoConfig(str(source), tmp_path / "out", train_tree, test_tree, limit=20)
    assert make_datasets(config) is True
    train, test = (ShardSet.open(tmp_path / "out" / name) for name in ("train", "test"))
    assert train.num_samples == 20
    assert train.classes == test.classes == ("cat", "dog", "fish", "newt")
    assert set(test.samples["label"].tolist()) <= {1, 2, 3}


def test_a_folder_without_splits_gives_one_dataset(photo_folder: Path, tmp_path: Path) -> None:
    assert find_splits(photo_folder) == ("", "")
    assert make_datasets(DemoConfig(str(photo_folder), tmp_path)) is False
    assert ShardSet.open(tmp_path / "train").has_labels
    assert not (tmp_path / "test").exists()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/a/1.jpg", "test/a/1.jpg"], ("train", "test")),
        (["./train/a/1.jpg", "./val/a/1.jpg"], ("train", "val")),
        (["train/a/1.jpg"], ("", "")),
        (["cats/1.jpg", "dogs/1.jpg"], ("", "")),
        (["test", "train"], ("", "")),  # files, no folders
    ],
)
def test_splits_inside_a_tar_are_found(names: list[str], expected: tuple[str, str], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as tar:
        for name in names:
            tar.add(empty, name)
    assert find_splits(tmp_path / "images.tar.gz") == expected


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (6144, Schedule(batch=128, epochs=12, knn_every=1)),
        (20_000, Schedule(batch=128, epochs=4, knn_every=1)),
        (1_000_000, Schedule(batch=128, epochs=1, knn_every=1)),
        (100, Schedule(batch=32, epochs=192, knn_every=16)),
        (16, Schedule(batch=8, epochs=288, knn_every=24)),
    ],
)
def test_the_plan_is_about_576_steps_whatever_the_number_of_images(images: int, expected: Schedule) -> None:
    assert plan(images, 576) == expected


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="at least 16"):
        plan(15, 576)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DemoConfig(steps=0), "--steps 0"),
        (DemoConfig(limit=-1), "--limit -1"),
        (DemoConfig(images="x", test_subtree="val"), "--subtree"),
        (DemoConfig(method="simclear"), "--method simclear is unknown.*did you mean simclr"),
        (DemoConfig(images="wds:x-{0..3}.tar"), "wds:"),
    ],
)
def test_options_that_make_no_sense_are_refused(config: DemoConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(config)


def test_a_missing_source_ends_the_demo_with_its_message_and_code_2(tmp_path: Path) -> None:
    done = run_demo("--images", str(tmp_path / "nowhere"), "--out", str(tmp_path / "demo"))
    assert done.returncode == 2
    assert "does not exist" in done.stderr
    assert "Traceback" not in done.stderr
