"""Folders of embeddings and classifiers as users, disks and others leave them: one message, never a hang."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model.methods.simsiam import SimSiamConfig
from pipeline.common.locks import exclusive_lock
from tests.faults.test_run_folders import KINDS, in_time  # noqa: F401
from tests.helpers.toy_runs import call
from tests.tools.test_embed import ENCODER, FLAGS
from tools import embed, export_backbone, neighbours, predict, preview_views
from train import finetune, knn, linear, pretrain
from train.storage.run_folder import LOCK_FILE

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.faults]
CONTENTS: dict[str, bytes] = {
    "bytes": b"\xff\0\x1b[31m" * 50,
    "a list": b"[]",
    "an empty object": b"{}",
    "null": b"null",
    "nested lists": b"[" * 100_000,
    "a number of 5,000 digits": b"9" * 5000,
}
ODD: dict[str, Callable[[Path], object]] = {
    **KINDS,
    "nothing": lambda path: None,
    **{kind: lambda path, content=content: path.write_bytes(content) for kind, content in CONTENTS.items()},
}


@pytest.fixture(scope="module")
def embedded(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded") / "folder"
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, embed, ENCODER, photo_dataset_path, folder, *FLAGS) == 0
    return folder


@pytest.fixture(scope="module")
def tuned(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "folder"
    data = ["--data", photo_dataset_path, "--val-data", photo_dataset_path, "--checkpoint", ENCODER]
    with pytest.MonkeyPatch.context() as patch:
        more = [*FLAGS, "--epochs", "1", "--global-batch", "16"]
        assert call(patch, finetune, *data, "--run-dir", folder, *more) == 0
    return folder


def struck(whole: Path, tmp_path: Path, name: str, kind: str) -> Path:
    """A copy of a folder with something odd in the place of the file ``name``."""
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    (copy / name).unlink()
    ODD[kind](copy / name)
    return copy


def check_message(capfd: Any, code: int) -> None:
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert code in (0, 2)
    assert code == 0 or err.count("error: ") == 1, err


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["_embeddings.json", "embeddings.npy", "names.txt"])
def test_anything_in_the_place_of_an_embeddings_file(
    name: str,
    kind: str,
    embedded: Path,
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    folder = struck(embedded, tmp_path, name, kind)
    arguments = [folder, photo_dataset_path, tmp_path / "grid.png"]
    code = call(monkeypatch, neighbours, *arguments, "--duplicates", "0.99")
    assert code == 2
    check_message(capfd, code)
    check_message(capfd, call(monkeypatch, embed, ENCODER, photo_dataset_path, folder, *FLAGS))
    again = call(monkeypatch, embed, ENCODER, photo_dataset_path, folder, *FLAGS, "--overwrite")
    check_message(capfd, again)
    assert again == 2 if kind == "a folder" or not (folder / "_embeddings.json").exists() else again == 0
    if again == 0:
        assert call(monkeypatch, neighbours, *arguments, "--query", "1") == 0


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["plan.json", "embeddings.npy", "embeddings-000000.txt", "block-000000.json", "lock"])
def test_anything_in_the_place_of_an_unfinished_file(
    name: str,
    kind: str,
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    from tools.embedding.store import EmbeddingWriter

    def killed(self: EmbeddingWriter, describe: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingWriter, "finish", killed)
        assert call(patch, embed, ENCODER, photo_dataset_path, folder, *FLAGS) == 130
    (folder / ".partial" / name).unlink(missing_ok=True)
    ODD[kind](folder / ".partial" / name)
    capfd.readouterr()
    check_message(capfd, call(monkeypatch, embed, ENCODER, photo_dataset_path, folder, *FLAGS))


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["classifier/config.json", "classifier/model.safetensors"])
def test_anything_in_the_place_of_a_classifiers_file(
    name: str, kind: str, tuned: Path, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    folder = struck(tuned, tmp_path, name, kind)
    code = call(monkeypatch, predict, folder, photo_folder / "cat", "--device", "cpu")
    assert code == 2
    check_message(capfd, code)


@pytest.mark.parametrize("script", [finetune, linear], ids=["finetune", "linear"])
@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["anew", "resumed"])
def test_one_process_at_a_time_writes_results(
    script: Any, more: list[str], photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    data = ["--data", photo_dataset_path, "--val-data", photo_dataset_path, "--checkpoint", ENCODER]
    command = [*data, "--run-dir", tmp_path / "run", *FLAGS, "--epochs", "1", "--global-batch", "16", *more]
    (tmp_path / "run").mkdir()
    with exclusive_lock(tmp_path / "run" / LOCK_FILE, shared=False, folder=tmp_path / "run"):
        assert call(monkeypatch, script, *command) == 2
    assert f"is writing to {tmp_path / 'run'}: wait for it" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK_FILE]
    assert call(monkeypatch, script, *command) == 0


@pytest.mark.parametrize("script", [pretrain, finetune, linear], ids=["pretrain", "finetune", "linear"])
@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["anew", "resumed"])
def test_no_log_is_written_through_a_link(
    script: Any, more: list[str], photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    data = ["--data", photo_dataset_path, *FLAGS, "--epochs", "1", "--global-batch", "16", *more]
    if script is pretrain:
        data += ["--backbone", "resnet_tiny", "--dim", "16", "--projector-hidden", "16", "--predictor-hidden", "4"]
    else:
        data += ["--val-data", photo_dataset_path, "--checkpoint", ENCODER]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    code = call(monkeypatch, script, *data, "--run-dir", tmp_path / "run")
    assert code == 2
    check_message(capfd, code)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
@pytest.mark.parametrize("kind", ["a pipe", "a link to a device", "a folder"])
def test_a_checkpoint_of_any_ending_that_is_no_file(
    kind: str, suffix: str, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    ODD[kind](tmp_path / f"weights{suffix}")
    data = ["--data", photo_dataset_path, "--val-data", photo_dataset_path]
    code = call(monkeypatch, knn, *data, "--checkpoint", tmp_path / f"weights{suffix}", *FLAGS)
    assert code == 2
    check_message(capfd, code)


def test_a_result_takes_the_place_of_a_link_and_makes_nothing_elsewhere(
    embedded: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = tmp_path / "grid.png"
    grid.symlink_to(tmp_path / "elsewhere")
    assert call(monkeypatch, neighbours, embedded, photo_dataset_path, grid, "--query", "1") == 0
    views = tmp_path / "views.png"
    views.symlink_to(tmp_path / "elsewhere")
    shown = ["--samples", "2", "--image-size", "32", "--device", "cpu", "--backend", "torchvision"]
    assert call(monkeypatch, preview_views, photo_dataset_path, views, *shown) == 0
    for made in (grid, views):
        assert made.is_file()
        assert not made.is_symlink()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/null")], ids=["pipe", "device"])
def test_a_result_takes_the_place_of_no_pipe_and_no_device(
    make: Callable[[Path], None],
    embedded: Path,
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Any,
) -> None:
    make(tmp_path / "grid.png")
    code = call(monkeypatch, neighbours, embedded, photo_dataset_path, tmp_path / "grid.png", "--query", "1")
    assert code == 2
    check_message(capfd, code)


KEYS = ["projector.999999999.weight", "projector.x.weight", f"projector.{'9' * 5000}.weight", "", "\x1b[31m", "\udc80"]


@pytest.mark.parametrize("key", KEYS, ids=ascii)
def test_odd_names_of_weights(
    key: str, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    model = SimSiamConfig(backbone="resnet_tiny", dim=16, projector_hidden=16, predictor_hidden=4).build()
    torch.save({"model": {**model.state_dict(), key: torch.zeros(4, 4)}}, tmp_path / "weights.pt")
    arguments = [tmp_path / "weights.pt", photo_dataset_path, tmp_path / "out", *FLAGS, "--features", "projector"]
    check_message(capfd, call(monkeypatch, embed, *arguments))
    check_message(capfd, call(monkeypatch, export_backbone, tmp_path / "weights.pt", tmp_path / "out.pt"))


def test_sparse_weights(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save({"fc.weight": torch.eye(4).to_sparse()}, tmp_path / "weights.pt")
    assert call(monkeypatch, embed, tmp_path / "weights.pt", photo_dataset_path, tmp_path / "out", *FLAGS) == 2
    assert "fc.weight is sparse" in capfd.readouterr().err


@pytest.mark.parametrize("query", ["9" * 5000, "~nobody-of-that-name/x.jpg", "\udc80", "a\0b"])
def test_odd_queries(
    query: str, embedded: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    arguments = [embedded, photo_dataset_path, tmp_path / "grid.png", "--query", query]
    code = call(monkeypatch, neighbours, *arguments)
    assert code == 2
    check_message(capfd, code)
