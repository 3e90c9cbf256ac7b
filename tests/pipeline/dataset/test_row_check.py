"""A samples.npy too large to be hashed before the start: nothing wrong in it lasts."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.dataset.format
import pipeline.dataset.row_check
import train.openmp  # noqa: F401
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import ShardSet
from pipeline.dataset.format import SAMPLE_DTYPE
from tests.helpers.toy_runs import CPU, TINY, call
from train import pretrain
from train.engine import loop as loop_module


@pytest.fixture(autouse=True)
def every_index_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.dataset.format, "HASHED_AT_OPEN", -1)


@pytest.fixture
def own_dataset(photo_dataset_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(photo_dataset_path, tmp_path / "copy"))


def change_row(path: Path, sample: int, field: str, change: int) -> None:
    rows = np.load(path / "samples.npy")
    rows[field][sample] += change
    np.save(path / "samples.npy", rows)


class Gate:
    """Holds the comparison back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        compare: Callable[..., None] = pipeline.dataset.row_check.compare_rows

        def held_back(*arguments: Any) -> None:
            assert self.opened.wait(timeout=60)
            compare(*arguments)

        monkeypatch.setattr(pipeline.dataset.row_check, "compare_rows", held_back)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_a_whole_dataset_is_read_before_the_comparison_ends_and_its_labels_after(
    photo_dataset: ShardSet, gate: Gate
) -> None:
    dataset = ShardSet.open(photo_dataset.path)
    assert dataset.read(5) == photo_dataset.read(5)
    with ThreadPoolExecutor(1) as pool:
        labels = pool.submit(dataset.labels, range(48))
        with pytest.raises(TimeoutError):
            labels.result(timeout=0.1)
        gate.opened.set()
        assert labels.result(timeout=60).tolist() == photo_dataset.labels(range(48)).tolist()
    dataset.wait_until_verified()


@pytest.mark.parametrize(("field", "change"), [("label", 1), ("height", 1), ("width", 1), ("checksum", 1)])
def test_a_changed_row_ends_the_reading_and_gives_no_label(own_dataset: Path, field: str, change: int) -> None:
    change_row(own_dataset, 7, field, change)
    dataset = ShardSet.open(own_dataset)
    with pytest.raises(UserError, match=r"samples\.npy is damaged or belongs to another dataset.*copy it again"):
        dataset.labels([0])
    with pytest.raises(UserError, match=r"samples\.npy is damaged"):
        dataset.read(0)


def test_labels_without_a_name_are_refused(own_dataset: Path) -> None:
    record = own_dataset / "dataset.json"
    record.write_text(record.read_text().replace('"newt"', '"newt", "owl"'))
    ShardSet.open(own_dataset).wait_until_verified()
    record.write_text(record.read_text().replace('"newt", "owl"', "").replace('"fish",', '"fish"'))
    with pytest.raises(UserError, match=r"label 3, but dataset\.json names 3 classes"):
        ShardSet.open(own_dataset).wait_until_verified()


def test_a_disk_that_fails_is_not_taken_for_a_whole_file(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pipeline.dataset.row_check.os, "posix_fadvise", failing)
    with pytest.raises(UserError, match="Input/output error"):
        ShardSet.open(photo_dataset_path).labels([0])


def test_any_other_failure_is_not_taken_for_a_whole_file(
    photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.dataset.row_check, "compare_rows", None)
    with pytest.raises(TypeError):
        ShardSet.open(photo_dataset_path).wait_until_verified()


@pytest.mark.filterwarnings("ignore:invalid escape")  # in a header of garbage
@given(start=st.integers(0, 127 + 48 * SAMPLE_DTYPE.itemsize), junk=st.binary(min_size=1, max_size=8))
def test_damage_anywhere_in_it_is_found(
    photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory, start: int, junk: bytes
) -> None:
    """Also in its header, which a small file's hash shields."""
    whole = (photo_dataset_path / "samples.npy").read_bytes()
    changed = whole[:start] + junk + whole[start + len(junk) :]
    folder = tmp_path_factory.mktemp("spoilt") / "copy"
    shutil.copytree(photo_dataset_path, folder)
    (folder / "samples.npy").write_bytes(changed)
    if changed == whole:
        ShardSet.open(folder).wait_until_verified()
        return
    with pytest.raises(UserError, match=r"samples\.npy is"):
        ShardSet.open(folder).wait_until_verified()
    shutil.rmtree(folder)


def run_here(monkeypatch: pytest.MonkeyPatch, data: Path, run_dir: Path, *more: str) -> int:
    run = ["--data", str(data), "--run-dir", str(run_dir), "--epochs", "1", "--global-batch", "12"]
    return call(monkeypatch, pretrain, *run, *TINY, *CPU, "--backend", "torchvision", *more)


def test_no_accuracy_rests_on_a_changed_label(
    own_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change_row(own_dataset, 7, "label", 1)
    assert run_here(monkeypatch, own_dataset, tmp_path / "run") == 2
    assert "samples.npy is damaged" in capsys.readouterr().err
    assert "knn_top1" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_no_checkpoint_rests_on_a_changed_size(
    own_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gate: Gate,
) -> None:
    """The comparison ends when the first checkpoint is already under way."""
    change_row(own_dataset, 7, "height", 1)
    save = loop_module.save

    def save_late(*arguments: Any) -> Any:
        gate.opened.set()
        return save(*arguments)

    monkeypatch.setattr(loop_module, "save", save_late)
    assert run_here(monkeypatch, own_dataset, tmp_path / "run", "--knn-every", "0") == 2
    assert "samples.npy is damaged" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/*.pt"))
    assert not (tmp_path / "run" / "summary.json").exists()
