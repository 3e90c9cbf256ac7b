"""WebDataset tars behind a URL are indexed; with the sidecar files beside them they are a remote dataset."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.common.locations import Url, location
from pipeline.dataset.dataset import ShardSet
from pipeline.dataset.remote_cache import CacheConfig
from pipeline.dataset.shard_store import PrefetchPlan
from pipeline.sharding.make_dataset import Summary, make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sharding.remote_tars import split_urls
from tests.helpers.photos import image_bytes, write_foreign_tars
from tests.helpers.servers import nginx, s3_here

PATTERN = "set/set-{000000..000001}.tar"
KEPT = [number for number in range(12) if number != 7]


def index(pattern: str, out: Path, **options: object) -> Summary:
    in_process = "workers" not in options
    return make_dataset(f"wds:{pattern}", out, ShardingOptions(**options), quiet=True, in_process=in_process)  # type: ignore[arg-type]


@pytest.fixture
def served(tmp_path: Path) -> Path:
    (tmp_path / "served").mkdir()
    write_foreign_tars(tmp_path / "served" / "set")
    return tmp_path / "served"


def test_tars_behind_a_url_become_a_dataset_there(served: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    local = index(f"{served}/{PATTERN}", tmp_path / "local")
    with nginx(served, tmp_path / "nginx") as server:
        index(f"{server.url}/{PATTERN}", out, part="1/2")
        summary = index(f"{server.url}/{PATTERN}", out, workers=2)  # goes on with the other part
        assert (summary.images, summary.rejected, summary.class_names) == (11, local.rejected, local.class_names)
        assert f"the tars stay at {server.url}/set" in summary.notes[0]
        assert not list(out.rglob("*.tar"))
        assert not (out / ".partial").exists()
        assert index(f"{server.url}/{PATTERN}", out).already_there
        assert (out / "samples.npy").read_bytes() == (tmp_path / "local" / "samples.npy").read_bytes()
        for file in out.iterdir():
            shutil.copy(file, served / "set")
        cache = CacheConfig(cache_dir=tmp_path / "cache", cache_size="1GB")
        dataset = ShardSet.open(Url(f"{server.url}/set"), cache=cache)
        assert [dataset.read(n) for n in range(11)] == [image_bytes(n) for n in KEPT]
        assert dataset.labels(range(11)).tolist() == [n % 3 for n in KEPT]


def test_secrets_are_used_and_not_recorded(served: Path, tmp_path: Path) -> None:
    with nginx(served, tmp_path / "nginx", password="reader:hushhush", signature="s3cr3t") as server:
        url = server.url.replace("://", "://reader:hushhush@")
        summary = index(f"{url}/{PATTERN}?signature=s3cr3t", tmp_path / "out")
    texts = [file.read_bytes() for file in (tmp_path / "out").iterdir()] + [str(summary).encode()]
    assert summary.images == 11
    assert not any(b"hushhush" in text or b"s3cr3t" in text for text in texts)


def test_mistakes(served: Path, tmp_path: Path) -> None:
    with nginx(served, tmp_path / "nginx") as server:
        with pytest.raises(UserError, match=r"cannot fetch set-000002\.tar .*no such file"):
            index(f"{server.url}/set/set-{{000000..000002}}.tar", tmp_path / "out")
        with pytest.raises(UserError, match=r"are not looked up behind a URL"):
            index(f"{server.url}/set/*.tar", tmp_path / "out")
        with pytest.raises(UserError, match="braces do not match"):
            index(f"{server.url}/set/{{0..1.tar", tmp_path / "out")
        packed = served / "set" / "packed.tar"
        packed.write_bytes(b"\x1f\x8b" + bytes(600))
        with pytest.raises(UserError, match=r"packed\.tar is compressed with gzip"):
            index(f"{server.url}/set/packed.tar", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_the_folder_that_urls_share() -> None:
    folder, names = split_urls(["s3://bucket/a/1.tar", "s3://bucket/b/2.tar"])
    assert (str(folder), names) == ("s3://bucket/", ["a/1.tar", "b/2.tar"])
    folder, names = split_urls(["https://host/x/a%20b.tar?sig=1"])
    assert (folder.secret, names) == ("https://host/x?sig=1", ["a b.tar"])
    with pytest.raises(UserError, match="on one host or in one bucket"):
        split_urls(["s3://one/1.tar", "s3://two/1.tar"])


def test_the_folder_of_the_index_is_the_dataset(served: Path, tmp_path: Path) -> None:
    """The tars stay where they are and are read in ranges, or fetched as those of other remote datasets."""
    out, cache = tmp_path / "out", CacheConfig(cache_dir=tmp_path / "cache", cache_size="1GB")
    with nginx(served, tmp_path / "nginx") as server:
        index(f"{server.url}/{PATTERN}", out, index_only=True)
        assert json.loads((out / "dataset.json").read_text())["tars_at"] == f"{server.url}/set"
        dataset = ShardSet.open(out, cache=cache)
        assert (dataset.path, dataset.is_remote) == (out, True)
        before = server.sent()
        assert dataset.read(3) == image_bytes(KEPT[3])
        assert sum(server.sent().values()) - sum(before.values()) == len(image_bytes(KEPT[3]))
        steps = [np.array([0, 10]), np.array([5])]
        with dataset.follow(PrefetchPlan(iter(steps), 0), threading.Event(), 0, 1) as begin:
            for step in steps:
                begin()
                assert [dataset.read(n) for n in step.tolist()] == [image_bytes(KEPT[n]) for n in step.tolist()]
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
        copied = pickle.loads(pickle.dumps(dataset))
        assert copied.read(0) == image_bytes(0)
    for tar in (served / "set").iterdir():  # beside their index they are read there
        shutil.copy(tar, out)
    assert not ShardSet.open(out).is_remote


def test_an_index_of_tars_in_a_bucket(served: Path, tmp_path: Path) -> None:
    with s3_here(served / "set", prefix="theirs"):
        index("s3://images/theirs/set-{000000..000001}.tar", tmp_path / "out", index_only=True)
        dataset = ShardSet.open(tmp_path / "out", cache=CacheConfig(cache_dir=tmp_path / "cache", cache_size="1GB"))
        assert [dataset.read(n) for n in range(11)] == [image_bytes(n) for n in KEPT]


def test_an_index_records_no_secrets(served: Path, tmp_path: Path) -> None:
    with nginx(served, tmp_path / "nginx", password="reader:hushhush") as server:
        summary = index(f"{server.url.replace('://', '://reader:hushhush@')}/{PATTERN}", tmp_path / "out")
    assert "is not recorded: copy the files of OUT beside them" in summary.notes[0]
    with pytest.raises(UserError, match=r"set-000000\.tar is missing"):
        ShardSet.open(tmp_path / "out")


def test_mistakes_of_an_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--index-only: synthetic:3 is to be copied into shards"):
        make_dataset("synthetic:3", tmp_path / "out", ShardingOptions(index_only=True), quiet=True, in_process=True)
    with pytest.raises(UserError, match=r"siamstream shard 'wds:s3://b/\{0\.\.9\}\.tar' OUT --index-only"):
        location("wds:s3://b/{0..9}.tar")
