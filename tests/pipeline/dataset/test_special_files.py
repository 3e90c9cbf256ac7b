"""Pipes, devices and folders in place of a dataset's files: an error at once, never an endless read."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.checking.check_dataset import inspect_dataset
from pipeline.checking.check_shard import CheckOptions
from pipeline.checking.repair import repair_dataset
from pipeline.common.errors import UserError
from pipeline.dataset.dataset import BadSampleError, ShardSet
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions

FILES = (
    "dataset.json",
    "samples.npy",
    "shard-000002.tar",
    "shard-000002.idx",
    "names.bin",
    "names.npy",
    "rejected.jsonl",
)
KINDS: dict[str, Callable[[Path], None]] = {
    "a pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    """An endless read ends the test."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_special_files_are_errors(
    kind: str, name: str, photo_folder: Path, photo_dataset_path: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(photo_dataset_path, tmp_path / "copy"))
    (copy / name).unlink()
    KINDS[kind](copy / name)
    try:
        dataset = ShardSet.open(copy)
        for sample_id in range(len(dataset)):
            dataset.read(sample_id)
        _ = dataset.names
    except (UserError, BadSampleError) as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert name in ("shard-000002.idx", "rejected.jsonl")
    try:
        found = inspect_dataset(copy, CheckOptions(decode="none", workers=1), quiet=True)
        assert not found.fine or (name, kind) == ("rejected.jsonl", kind)
    except UserError as error:
        assert name == "dataset.json", error  # noqa: PT017
    with contextlib.suppress(UserError):
        repair_dataset(copy, 1, quiet=True, in_process=True)
    with contextlib.suppress(UserError):
        make_dataset(str(photo_folder), copy, ShardingOptions(), quiet=True, in_process=True)


def test_nothing_is_written_or_deleted_through_a_link(photo_folder: Path, tmp_path: Path) -> None:
    """Links in the places of all that sharding writes, and of its temporary files."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    make_dataset(str(photo_folder), tmp_path / "out", ShardingOptions(), quiet=True, in_process=True)
    written = [path.name for path in (tmp_path / "out").iterdir()]
    for name in written:
        (tmp_path / "out" / name).unlink()
        (tmp_path / "out" / name).symlink_to(tmp_path / "precious" / "file")
    temporary = f".tmp-{socket.gethostname()}-{os.getpid()}"
    (tmp_path / "out" / ".partial").mkdir()
    for name in written:
        (tmp_path / "out" / ".partial" / f"{name}{temporary}").symlink_to(tmp_path / "precious" / "file")
    (tmp_path / "out" / ".partial" / "done").symlink_to(tmp_path / "precious")
    for options in (ShardingOptions(), ShardingOptions(overwrite=True)):
        with contextlib.suppress(UserError):
            make_dataset(str(photo_folder), tmp_path / "out", options, quiet=True, in_process=True)
    with contextlib.suppress(UserError):
        repair_dataset(tmp_path / "out", 1, quiet=True, in_process=True)
    assert [path.read_text() for path in (tmp_path / "precious").iterdir()] == ["kept"]


def test_links_to_files_are_read_as_download_caches_lay_them_out(photo_dataset_path: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for file in photo_dataset_path.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    dataset = ShardSet.open(tmp_path / "snapshot")
    assert all(dataset.read(sample_id) for sample_id in range(len(dataset)))
    assert inspect_dataset(tmp_path / "snapshot", CheckOptions(decode="none"), quiet=True).fine
