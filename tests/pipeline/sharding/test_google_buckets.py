"""Datasets from and into a Google bucket, of an emulator: the bytes of local ones, in sharding, checking, training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.dataset.out_folder as out_folder
from pipeline.common.errors import UserError
from pipeline.common.locations import Url
from pipeline.dataset.out_folder import RemoteOut
from pipeline.sharding.make_dataset import Summary, make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sources.remote_path import RemotePath
from tests.helpers.servers import BUCKET, google_here
from tests.helpers.toy_runs import call
from tests.train.test_pretrain import CPU, losses, run_here
from tools import check_shards

OUT = f"gs://{BUCKET}/made/photos"


@pytest.fixture(scope="module")
def google(photo_folder: Path) -> Iterator[Any]:
    """gcsfs's file system, with the photos in the bucket, and a dataset made from them and into it."""
    with google_here(photo_folder) as client:
        make(f"gs://{BUCKET}/photos", OUT, workers=2)
        yield client


def make(source: object, out: object, **options: Any) -> Summary:
    chosen = ShardingOptions(samples_per_shard=10, **options)
    return make_dataset(str(source), str(out), chosen, quiet=True, in_process="workers" not in options)


def objects(google: Any, place: str) -> dict[str, bytes]:
    root = place.removeprefix("gs://") + "/"
    return {name.removeprefix(root): google.cat_file(name) for name in google.find(root)}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bytes_of_a_local_dataset(google: Any, photo_dataset_path: Path, tmp_path: Path) -> None:
    assert objects(google, OUT) == files(photo_dataset_path)
    assert make(f"gs://{BUCKET}/photos", OUT).already_there
    make(f"gs://{BUCKET}/photos", tmp_path / "photos")
    assert files(tmp_path / "photos") == files(photo_dataset_path)


def test_what_is_lost_is_written_again(google: Any, photo_dataset_path: Path) -> None:
    google.rm_file(f"{OUT.removeprefix('gs://')}/shard-000002.tar")
    google.pipe_file(f"{OUT.removeprefix('gs://')}/shard-000003.tar", b"short")
    assert make(f"gs://{BUCKET}/photos", OUT).restored == 2
    assert objects(google, OUT) == files(photo_dataset_path)


def test_large_files_go_in_parts_and_appear_whole(google: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_folder, "PART", 1 << 20)
    place, data = f"gs://{BUCKET}/large", bytes(range(256)) * (1 << 13) + b"end"
    out = RemoteOut(Url(place))
    with out.writer("large") as file:
        file.write(data[:7])
        file.write(data[7:])
        assert objects(google, place) == {}
    assert objects(google, place) == {"large": data}


def test_one_writer_at_a_time(google: Any, photo_folder: Path) -> None:
    place = f"gs://{BUCKET}/two/photos"
    with (
        RemoteOut(Url(place)).lock(None),
        pytest.raises(UserError, match=r"is writing to gs://images/two/photos"),
    ):
        make(photo_folder, place)
    assert make(photo_folder, place).images == 48


def test_an_object_that_changes_is_noticed(google: Any, photo_folder: Path) -> None:
    google.put(str(photo_folder), f"{BUCKET}/changing", recursive=True)
    first = next(path for path in google.find(f"{BUCKET}/changing") if path.endswith(".jpg"))
    name = first.removeprefix(f"{BUCKET}/changing/")
    wrong = google.cat_file(first)[::-1]
    path = RemotePath.of(Url(f"gs://{BUCKET}/changing/{name}"))
    known = RemotePath(path.inner, path.root, path.stat())
    google.pipe_file(first, wrong)
    with pytest.raises(UserError, match="chang"):
        known.read(0, len(wrong))


def test_training_on_it_and_checking_it(
    google: Any, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    def flags(data: object, name: str) -> list[str]:
        places = ["--data", str(data), "--run-dir", str(tmp_path / name), "--cache-dir", str(tmp_path / "cache")]
        return [*places, "--epochs", "1", "--global-batch", "8", "--knn-every", "0", *CPU]

    assert run_here(monkeypatch, flags(photo_dataset_path, "local")) == 0
    assert run_here(monkeypatch, flags(OUT, "bucket")) == 0
    assert losses(tmp_path / "bucket") == losses(tmp_path / "local")
    assert call(monkeypatch, check_shards, OUT, "--decode", "full", "--quiet") == 0
