"""Datasets from and into a bucket of moto's S3 server: the bytes of a local one, and nothing half-written counts."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pipeline.dataset.out_folder as out_folder
import pipeline.sources.readers as readers
from pipeline.common.errors import UserError
from pipeline.common.locations import Url
from pipeline.dataset.out_folder import PART, RemoteOut
from pipeline.sharding.make_dataset import Summary, make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.write_shard import WriteJob
from tests.helpers.photos import image_bytes
from tests.helpers.servers import BUCKET, S3_KEYS, nginx, s3_here

PER_SHARD = 10


@pytest.fixture(scope="module")
def s3(photo_folder: Path) -> Iterator[Any]:
    """A client of a bucket with the photos under photos/, to which this process is led."""
    with s3_here(photo_folder) as client:
        yield client


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    """A folder of the bucket for one test; a dataset's own name is its last part."""
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}/photos"


def make(source: object, out: object, **options: Any) -> Summary:
    chosen = ShardingOptions(**{"samples_per_shard": PER_SHARD, **options})
    return make_dataset(str(source), str(out), chosen, quiet=True, in_process="workers" not in options)


def objects(s3: Any, place: str) -> dict[str, bytes]:
    prefix = place.removeprefix(f"s3://{BUCKET}/") + "/"
    found = s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    names = [entry["Key"] for entry in found]
    return {name.removeprefix(prefix): s3.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in names}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_from_the_bucket_into_the_bucket(
    s3: Any, place: str, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = files(photo_dataset_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    summary = make(f"s3://{BUCKET}/photos", place, workers=2)
    assert objects(s3, place) == local
    assert (summary.images, summary.shards) == (48, 5)
    assert not any(secret in repr(summary) for secret in S3_KEYS.values())
    assert list(tmp_path.iterdir()) == []  # nothing stays on this machine
    assert make(f"s3://{BUCKET}/photos", place).already_there


def test_from_a_disk_into_the_bucket_and_back(
    s3: Any, place: str, photo_folder: Path, photo_dataset_path: Path, tmp_path: Path
) -> None:
    make(photo_folder, place)
    assert objects(s3, place) == files(photo_dataset_path)
    make(f"s3://{BUCKET}/photos", tmp_path / "photos")
    assert files(tmp_path / "photos") == files(photo_dataset_path)


def test_parts_of_the_work(s3: Any, place: str, photo_folder: Path, photo_dataset_path: Path) -> None:
    assert make(photo_folder, place, part="1/2").missing == 3
    assert "dataset.json" not in objects(s3, place)
    make(photo_folder, place, part="0/2")
    assert objects(s3, place) == files(photo_dataset_path)


def test_what_is_lost_is_written_again(s3: Any, place: str, photo_folder: Path, photo_dataset_path: Path) -> None:
    make(photo_folder, place)
    prefix = place.removeprefix(f"s3://{BUCKET}/")
    s3.delete_object(Bucket=BUCKET, Key=f"{prefix}/shard-000002.tar")
    s3.put_object(Bucket=BUCKET, Key=f"{prefix}/shard-000003.tar", Body=b"short")
    assert make(photo_folder, place).restored == 2
    assert objects(s3, place) == files(photo_dataset_path)


def test_interrupted_it_goes_on_with_what_is_missing(
    s3: Any, place: str, photo_folder: Path, photo_dataset_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = out_folder._Upload.commit, iter(range(100))

    def commit(upload: Any) -> None:
        if next(calls) == 12:  # in the third shard
            raise KeyboardInterrupt
        real(upload)

    with monkeypatch.context() as patch:
        patch.setattr(out_folder._Upload, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            make(photo_folder, place)
    written = objects(s3, place)
    assert "dataset.json" not in written
    assert ".partial/lock" not in written
    first = s3.head_object(Bucket=BUCKET, Key=f"{place.removeprefix(f's3://{BUCKET}/')}/shard-000000.tar")
    with pytest.raises(UserError, match=r"interrupted run with other options \(--seed was 0, now 1\)"):
        make(photo_folder, place, seed=1)
    make(photo_folder, place)
    assert objects(s3, place) == files(photo_dataset_path)
    again = s3.head_object(Bucket=BUCKET, Key=f"{place.removeprefix(f's3://{BUCKET}/')}/shard-000000.tar")
    assert first["LastModified"] == again["LastModified"]
    make(photo_folder, place, seed=1, overwrite=True)
    assert json.loads(objects(s3, place)["dataset.json"])["seed"] == 1


def test_large_files_go_in_parts_and_appear_whole(s3: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PART >= 5 << 20  # S3's smallest part
    out, data = RemoteOut(Url(place)), os.urandom(2 * PART + 5)
    with out.writer("large") as file:
        file.write(data[:7])
        file.write(data[7:])
        assert objects(s3, place) == {}
    assert objects(s3, place) == {"large": data}
    writing = out.writer("broken")
    writing.__enter__().write(data)
    assert not writing.__exit__(ValueError, ValueError(), None)
    with out.large("from the disk") as file:
        file.write(data)
    assert objects(s3, place) == {"large": data, "from the disk": data}
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=BUCKET)  # no parts are left either


def source_kinds(photos: Path, folder: Path) -> None:
    """The photos as other kinds of sources, below ``folder``."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "tars").mkdir(parents=True)
    for label in sorted(photos.iterdir()):
        shutil.make_archive(str(folder / "tars" / label.name), "tar", label)
    for kind in ("tar", "gztar", "zip"):
        shutil.make_archive(str(folder / "photos"), kind, photos)
    (folder / "hf" / "data").mkdir(parents=True)
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        rows = {"image": [image_bytes(n) for n in numbers], "label": [n % 3 for n in numbers]}
        parquet.write_table(pyarrow.table(rows), folder / "hf" / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "foreign").mkdir()
    for shard in range(2):  # as img2dataset writes them
        with tarfile.open(folder / "foreign" / f"{shard:05d}.tar", "w") as tar:
            for number in range(4):
                members = {"jpg": image_bytes(number), "json": b"{}", "txt": b"a photo"}
                for ending, data in members.items():
                    info = tarfile.TarInfo(f"{shard:05d}{number:04d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


KINDS: dict[str, dict[str, Any]] = {
    "photos.tar": {},
    "photos.tar.gz": {},
    "photos.zip": {},
    "tars": {},
    "tars, one": {"subtree": ""},
    "hf": {"split": "train"},
    "hf/data/test-00000-of-00001.parquet": {},
    "foreign": {"labels": "none"},
}


@pytest.fixture(scope="module")
def kinds(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    source_kinds(photo_folder, folder)
    return folder


@pytest.mark.parametrize("server", ["s3", "https"])
def test_other_kinds_of_sources(server: str, s3: Any, kinds: Path, photo_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(photo_folder, kinds / "folder", dirs_exist_ok=True)
    if server == "s3":
        for path in kinds.rglob("*"):
            if path.is_file():
                s3.upload_file(str(path), BUCKET, f"kinds/{path.relative_to(kinds)}")
        compare_kinds(f"s3://{BUCKET}/kinds", kinds, tmp_path)
    else:
        with nginx(kinds, tmp_path / "nginx", listing=True) as served:
            compare_kinds(served.url, kinds, tmp_path)


def compare_kinds(url: str, kinds: Path, work: Path) -> None:
    for name, options in {**KINDS, "folder": {}}.items():
        name = name.partition(",")[0]
        make(kinds / name, work / "local", overwrite=True, **options)
        make(f"{url}/{name}", work / "remote", overwrite=True, **options)
        assert files(work / "remote") == files(work / "local"), name


@pytest.mark.parametrize("name", ["hf", "photos.tar.gz"])
def test_a_copy_that_this_machine_has_no_room_for_goes_through_the_bucket(
    name: str, s3: Any, place: str, kinds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work := tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(work))
    options = {"split": "train+test"} if name == "hf" else {}
    make(kinds / name, tmp_path / "local", **options)
    real, copies, largest = readers.Spool.file, [], [0]

    def file(spool: readers.Spool, inside: str, local: bool) -> Any:
        copies.append(inside)
        return real(spool, inside, local)

    def build(job: WriteJob, number: int, tick: Any) -> None:
        largest[0] = max(largest[0], *(path.stat().st_size for path in work.rglob("*")))
        built(job, number, tick)

    built = WriteJob.build
    monkeypatch.setattr(WriteJob, "build", build)
    monkeypatch.setattr(readers.Spool, "file", file)
    monkeypatch.setattr(readers, "_MOST_OF_DISK", 1e-9)
    make(kinds / name, place, part="1/2", **options)
    assert set(copies) == ({"images-000000.bin", "images-000001.bin"} if name == "hf" else {"unpacked.tar"})
    assert {f".partial/copy-1-of-2-{inside}" for inside in copies} <= set(objects(s3, place))
    make(kinds / name, place, workers=2, **options)
    assert objects(s3, place) == files(tmp_path / "local")
    assert 0 < largest[0] < 10_000 < sum(len(data) for data in files(tmp_path / "local").values())
    assert list(work.iterdir()) == []


# What goes wrong.


def test_mistakes(s3: Any, place: str, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"lies inside SOURCE s3://images/photos"):
        make(f"s3://{BUCKET}/photos", f"s3://{BUCKET}/photos/out")
    with pytest.raises(UserError, match=r"nothing can be written to https://"):
        make(photo_folder, "https://127.0.0.1:1/out")
    with pytest.raises(UserError, match=r"SOURCE s3://images/nowhere does not exist"):
        make(f"s3://{BUCKET}/nowhere", tmp_path / "out")
    with pytest.raises(UserError, match=r"cannot \w+ .* of s3://no-such-bucket/out: no such file"):
        make(photo_folder, "s3://no-such-bucket/out")
    s3.put_object(Bucket=BUCKET, Key=f"{place.removeprefix(f's3://{BUCKET}/')}/samples.npy", Body=b"")
    with pytest.raises(UserError, match=r"has shards but no dataset\.json"):
        make(photo_folder, place)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("AccessDenied", r"cannot \w+ .* of s3://images/\S+: permission denied, 4 times .*check the URL, the perm"),
        ("QuotaExceeded", r"cannot write .* its quota or its disk is full, 4 times .*free space there, or raise the q"),
    ],
)
def test_a_bucket_that_refuses(
    code: str, message: str, s3: Any, place: str, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError
    from s3fs.core import S3FileSystem
    from s3fs.errors import translate_boto_error

    real = S3FileSystem._call_s3

    async def refuse(fs: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method in ("put_object", "create_multipart_upload") and kwargs.get("Key", "").endswith(".tar"):
            raise translate_boto_error(ClientError({"Error": {"Code": code, "Message": "a secret"}}, method))
        return await real(fs, method, *args, **kwargs)

    monkeypatch.setattr(S3FileSystem, "_call_s3", refuse)
    with pytest.raises(UserError, match=message) as raised:
        make(photo_folder, place)
    assert "secret" not in str(raised.value)
    assert {".partial/job.json"} == set(objects(s3, place))


def test_an_object_that_changes_while_it_is_read(
    s3: Any, place: str, photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipeline.sharding.make_dataset as module

    real = module.build_missing
    for source, changed in (("changing", "changing/a/1.jpg"), ("changing.tar", "changing.tar")):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        (tmp_path / "in" / "a").mkdir(parents=True)
        for number in range(3):
            (tmp_path / "in" / "a" / f"{number}.jpg").write_bytes(image_bytes(number))
            s3.put_object(Bucket=BUCKET, Key=f"changing/a/{number}.jpg", Body=image_bytes(number))
        s3.upload_file(shutil.make_archive(str(tmp_path / "changing"), "tar", tmp_path / "in"), BUCKET, "changing.tar")

        def change_first(*args: Any, key: str = changed, **kwargs: Any) -> None:
            data = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            s3.put_object(Bucket=BUCKET, Key=key, Body=data[:-9] + b"123456789")  # as long as before
            real(*args, **kwargs)

        monkeypatch.setattr(module, "build_missing", change_first)
        with pytest.raises(UserError, match=r"has changed since it was listed: wait until nothing writes there"):
            make(f"s3://{BUCKET}/{source}", tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out" / "dataset.json").exists()


def test_two_writers_into_one_place(s3: Any, place: str, photo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_folder, "RENEW_S", 0.2)
    monkeypatch.setattr(out_folder, "LEASE_S", 3.0)
    first, second = RemoteOut(Url(place)), RemoteOut(Url(place))
    with first.lock(None) as held:
        with pytest.raises(UserError, match=r"process \d+ on .* is writing to s3://images/.*: wait for it, or end it"):
            make(photo_folder, place)
        with pytest.raises(UserError, match="is writing to"), second.lock("0/2"):
            pass
        held.check()
    with first.lock("0/2"), second.lock("1/2") as other:
        with pytest.raises(UserError, match="is writing to"), first.lock(None):
            pass
        other.make_exclusive()
    left = {"holder": "make_shards.py (process 1 on gone)", "token": "x", "pid": 1, "where": "gone", "sign": "x"}
    first.put(".partial/lock", json.dumps(left).encode())
    done = threading.Event()
    with second.lock(None):  # a killed process of another machine has given no sign of life for LEASE_S
        done.set()
    assert done.is_set()
    assert objects(s3, place) == {}
