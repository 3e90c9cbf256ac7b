"""--engine ray: the bytes of the local engine, whatever dies meanwhile."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipeline.common.engine as engine_module
import pipeline.sharding.make_dataset as make_module
from pipeline.common.engine import MOST_DEATHS, EngineConfig
from pipeline.common.errors import UserError
from pipeline.sharding.make_dataset import Summary, make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sources.readers import Source
from tests.helpers.clusters import DeadlyReader, SlowReader, ray_cluster
from tests.helpers.photos import write_photo_folder
from tests.helpers.servers import BUCKET, s3_here

RAY = EngineConfig("ray")


@pytest.fixture(scope="module")
def bucket(photo_folder: Path) -> Iterator[Any]:
    with s3_here(photo_folder) as client:
        yield client


@pytest.fixture(scope="module")
def cluster(bucket: Any) -> Iterator[Any]:
    with ray_cluster(nodes=2) as made:
        yield made


def make(source: object, out: object, engine: EngineConfig = RAY, **options: Any) -> Summary:
    chosen = ShardingOptions(**{"samples_per_shard": 10, **options})
    return make_dataset(str(source), str(out), chosen, quiet=True, engine=engine)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def with_reader(monkeypatch: pytest.MonkeyPatch, wrap: Any) -> None:
    real = make_module.open_source

    def open_source(*args: Any, **kwargs: Any) -> Source:
        source = real(*args, **kwargs)
        return replace(source, reader=wrap(source.reader))

    monkeypatch.setattr(make_module, "open_source", open_source)


def test_the_bytes_of_the_local_engine(
    cluster: Any, photo_folder: Path, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photo_folder.parent)  # a relative path means the same on all nodes
    make(photo_folder.name, tmp_path / "photos")
    assert files(tmp_path / "photos") == files(photo_dataset_path)


def test_from_a_bucket_into_a_bucket(cluster: Any, bucket: Any, photo_dataset_path: Path) -> None:
    make(f"s3://{BUCKET}/photos", f"s3://{BUCKET}/out/photos")
    keys = [entry["Key"] for entry in bucket.list_objects_v2(Bucket=BUCKET, Prefix="out/photos/")["Contents"]]
    found = {key.removeprefix("out/photos/"): bucket.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
    assert found == files(photo_dataset_path)


def test_synthetic_images_and_a_copied_source(cluster: Any, bucket: Any, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    make("synthetic:30", tmp_path / "ray")
    make_dataset("synthetic:30", tmp_path / "local", ShardingOptions(samples_per_shard=10), quiet=True, in_process=True)
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    images = [path.read_bytes() for path in sorted(write_photo_folder(tmp_path / "in").rglob("*.*"))[:12]]
    parquet.write_table(pyarrow.table({"image": images}), tmp_path / "images.parquet")
    make(tmp_path / "images.parquet", f"s3://{BUCKET}/out/parquet")  # the copy goes to the bucket too
    keys = [entry["Key"] for entry in bucket.list_objects_v2(Bucket=BUCKET, Prefix="out/parquet/")["Contents"]]
    assert "out/parquet/dataset.json" in keys
    assert not [key for key in keys if ".partial" in key]


def test_a_worker_that_dies_costs_nothing(
    cluster: Any,
    photo_folder: Path,
    photo_dataset_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = sorted(path.relative_to(photo_folder).as_posix() for path in photo_folder.rglob("*.*"))[20]
    flags = tmp_path / "flags"
    flags.mkdir()
    (flags / "once").touch()
    with_reader(monkeypatch, lambda reader: DeadlyReader(reader, name, flags))
    make(photo_folder, tmp_path / "photos")
    assert files(tmp_path / "photos") == files(photo_dataset_path)
    assert "a worker died; its task is given to another worker" in capsys.readouterr().err
    for number in range(MOST_DEATHS):
        (flags / str(number)).touch()
    with pytest.raises(UserError, match=rf"a worker died, {MOST_DEATHS} times with the same task.*goes on with what"):
        make(photo_folder, tmp_path / "photos", overwrite=True)
    assert not (tmp_path / "photos" / "dataset.json").exists()
    make(photo_folder, tmp_path / "photos")
    assert files(tmp_path / "photos") == files(photo_dataset_path)


def test_a_mistake_on_a_node_is_one_message(
    cluster: Any, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_reader(monkeypatch, lambda reader: replace(reader, root=tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=r"on node .*: SOURCE .*elsewhere is not there: it must lie on a file system"):
        make(photo_folder, tmp_path / "photos")


def test_nodes_of_another_kind(cluster: Any, photo_folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "_version", lambda: "0.0.1")
        with pytest.raises(UserError, match=r"node .* has siamstream .*, and this machine 0\.0\.1: install the same"):
            make(photo_folder, tmp_path / "photos")
        patch.setattr(engine_module, "__name__", "nowhere.to.be.found")
        with pytest.raises(UserError, match=r"node .* lacks this package \(.*\): install it there too"):
            make(photo_folder, tmp_path / "photos")


def test_no_ray_and_no_cluster(photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--ray-address auto goes with --engine ray only"):
        EngineConfig("local", "auto")
    with pytest.raises(UserError, match=r"must be auto, local or HOST:PORT"):
        EngineConfig("ray", "somewhere")
    ray = pytest.importorskip("ray")
    with monkeypatch.context() as patch, socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        patch.setattr(ray, "is_initialized", lambda: False)
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"--ray-address {address} cannot be reached \(.*refused\)"):
            make(photo_folder, tmp_path / "photos", EngineConfig("ray", address))
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(UserError, match=r"needs Ray: pip install 'siamstream\[ray\]'"):
            make(photo_folder, tmp_path / "photos")
    assert not (tmp_path / "photos" / "dataset.json").exists()


@pytest.mark.faults
def test_a_node_that_is_lost_costs_nothing(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photo_folder(tmp_path / "many", per_class=30)
    make_dataset(str(photos), tmp_path / "local" / "many", ShardingOptions(samples_per_shard=10), quiet=True)
    doomed = cluster.add_node(num_cpus=2)
    with_reader(monkeypatch, lambda reader: SlowReader(reader, 0.2))
    out = tmp_path / "ray" / "many"

    def lose_it() -> None:
        while not list(out.glob(".partial/done/*.json")):
            time.sleep(0.05)
        cluster.remove_node(doomed, allow_graceful=False)

    killer = threading.Thread(target=lose_it)
    killer.start()
    make(photos, out)
    killer.join()
    assert files(out) == files(tmp_path / "local" / "many")
    assert "its task is given to another worker" in capsys.readouterr().err
