"""A dataset below a URL gives the bytes of the one that was uploaded, and fetches no more than the future needs."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.checking.remote_copy import local_copy
from pipeline.common.errors import UserError
from pipeline.common.locations import Url
from pipeline.dataset import remote_files as remote
from pipeline.dataset.dataset import ShardSet
from pipeline.dataset.remote_cache import WRONG_ATTEMPTS, CacheConfig
from pipeline.dataset.shard_store import PrefetchPlan
from tests.helpers.fault_proxy import FaultProxy, Faults
from tests.helpers.servers import Nginx, nginx

ALL = np.arange(48)


@pytest.fixture(scope="module")
def behind(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(photo_dataset_path, tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture
def proxy(behind: Nginx, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.01)
    with FaultProxy(behind.port) as proxy:
        yield proxy


def opened(proxy: FaultProxy, cache: Path, cache_size: str = "1GB") -> ShardSet:
    return ShardSet.open(Url(proxy.url), cache=CacheConfig(cache, cache_size, retry_minutes=1))


def ranges(proxy: FaultProxy) -> list[str]:
    """What was asked for of shards."""
    return [passed.range for passed in proxy.seen if passed.path.endswith(".tar")]


def read_all(dataset: ShardSet, ids: np.ndarray, max_steps_behind: int = 0, expected: ShardSet | None = None) -> None:
    """Read as a loader does that knows its future, in steps of 12."""
    steps = np.split(ids, range(12, len(ids), 12))
    with dataset.follow(PrefetchPlan(iter(steps), 0), threading.Event(), max_steps_behind, 1) as begin:
        for step in steps:
            begin()
            for sample in step.tolist():
                assert dataset.read(sample) == (expected or dataset).read(sample)


def test_it_is_the_dataset_that_was_uploaded(proxy: FaultProxy, photo_dataset: ShardSet, tmp_path: Path) -> None:
    dataset = opened(proxy, tmp_path)
    assert dataset.fingerprint == photo_dataset.fingerprint
    assert np.array_equal(dataset.labels(ALL), photo_dataset.labels(ALL))
    assert [dataset.key(sample) for sample in range(48)] == [photo_dataset.key(sample) for sample in range(48)]
    read_all(dataset, ALL, expected=photo_dataset)
    copied = pickle.loads(pickle.dumps(dataset))
    assert copied.read(47) == photo_dataset.read(47)


def test_without_a_future_images_are_read_alone(proxy: FaultProxy, photo_dataset: ShardSet, tmp_path: Path) -> None:
    dataset = opened(proxy, tmp_path)
    for sample in (3, 30):
        assert dataset.read(sample) == photo_dataset.read(sample)
    rows = [photo_dataset.samples[sample] for sample in (3, 30)]
    assert ranges(proxy) == [f"bytes={row['offset']}-{row['offset'] + row['length'] - 1}" for row in rows]
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "room.lock"] == [".npy"]


def test_only_what_the_future_needs_is_fetched(proxy: FaultProxy, photo_dataset: ShardSet, tmp_path: Path) -> None:
    dataset = opened(proxy, tmp_path)
    read_all(dataset, np.array([11, 12, 40, 47]), expected=photo_dataset)
    assert sorted(path.name[:64] for path in tmp_path.glob("*.tar")) == sorted(
        photo_dataset.shards[shard].sha256 for shard in (1, 4)
    )
    assert len(ranges(proxy)) == 2


@pytest.mark.parametrize("local_rank", [0, 1])
def test_every_process_of_a_machine_knows_what_must_stay(local_rank: int, proxy: FaultProxy, tmp_path: Path) -> None:
    """Also those that leave the fetching to the first: making room, they must not take what is needed next."""
    dataset = opened(proxy, tmp_path)
    upcoming = iter([np.array([shard]) for shard in (0, 1, 2, 0)])
    with dataset._store.follow(upcoming, local_rank, threading.Event(), 0, 2) as begin_step:
        begin_step()
        if local_rank == 0:
            wait_until_there(tmp_path, 3)
        assert [dataset._store._is_awaited(shard) for shard in range(5)] == [True, True, True, False, False]


def test_a_fault_in_the_future_is_not_swallowed(proxy: FaultProxy, tmp_path: Path) -> None:
    """Not even one of a class that a reader would take for a bad sample."""

    def steps() -> Iterator[np.ndarray]:
        yield ALL[:12]
        raise IndexError("a fault")

    dataset = opened(proxy, tmp_path)
    with dataset.follow(PrefetchPlan(steps(), 0), threading.Event(), 0, 1):
        wait_until_there(tmp_path, 2)
        with pytest.raises(RuntimeError, match="fetching ahead failed: IndexError: a fault"):
            read_again_and_again(dataset)


def read_again_and_again(dataset: ShardSet) -> None:
    for _ in range(1000):
        dataset.read(0)
        threading.Event().wait(0.01)


def wait_until_there(cache: Path, shards: int) -> None:
    """Wait for fetching threads."""
    for _ in range(1000):
        if len(list(cache.glob("*.tar"))) == shards:
            return
        threading.Event().wait(0.02)
    raise AssertionError("shards were not fetched")


def test_whether_whole_shards_pay(proxy: FaultProxy, tmp_path: Path) -> None:
    dataset = opened(proxy, tmp_path)
    assert dataset.worth_fetching_whole(ALL)
    assert not dataset.worth_fetching_whole([0, 20])


def test_an_image_that_rots_in_the_cache_is_read_from_its_source(
    proxy: FaultProxy, photo_dataset: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened(proxy, tmp_path)
    read_all(dataset, ALL)
    for path in tmp_path.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    assert [dataset.read(sample) for sample in range(48)] == [photo_dataset.read(sample) for sample in range(48)]
    assert not list(tmp_path.glob("*.tar"))


def test_a_shard_that_has_rotted_before_the_run_is_fetched_again(
    proxy: FaultProxy, photo_dataset: ShardSet, tmp_path: Path
) -> None:
    read_all(opened(proxy, tmp_path), ALL)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    for name, content in whole.items():
        (tmp_path / name).write_bytes(bytes(len(content)))
    again = opened(proxy, tmp_path)
    assert [again.read(sample) for sample in range(48)] == [photo_dataset.read(sample) for sample in range(48)]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")} == whole


def test_a_disk_that_fails_under_the_cache(
    proxy: FaultProxy, photo_dataset: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, dataset = photo_dataset.read(7), opened(proxy, tmp_path)
    read_all(dataset, ALL)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("pipeline.dataset.remote_shards.os.pread", fail)
    assert dataset.read(7) == expected


def test_a_rotten_samples_file_in_the_cache_is_fetched_again(
    proxy: FaultProxy, photo_dataset: ShardSet, tmp_path: Path
) -> None:
    opened(proxy, tmp_path)
    (cached,) = tmp_path.glob("*.npy")
    content = bytearray(cached.read_bytes())
    content[-5] ^= 1
    cached.write_bytes(content)
    assert opened(proxy, tmp_path).read(47) == photo_dataset.read(47)


def test_a_samples_file_that_cannot_be_had_is_not_asked_for_again(proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.harm(Faults(("truncated",), only="samples.npy", repeat=None))
    with pytest.raises(UserError, match=r"cannot fetch samples.npy of .*: the object ends early"):
        opened(proxy, tmp_path)
    assert proxy.counts == {"truncated": remote.HOPELESS_ATTEMPTS}


def test_a_server_that_is_gone_makes_no_bad_samples(proxy: FaultProxy, tmp_path: Path) -> None:
    dataset = ShardSet.open(Url(proxy.url), cache=CacheConfig(tmp_path, retry_minutes=0.002))
    proxy.harm(Faults(("error 500",), repeat=None))
    with pytest.raises(UserError, match=f"cannot fetch shard-000000.tar of {proxy.url}: HTTP status 500"):
        dataset.read(3)
    with pytest.raises(UserError, match=f"cannot fetch shard-00000..tar of {proxy.url}: HTTP status 500"):
        read_all(dataset, ALL)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot fetch dataset.json of {url}/: no such file"),
        (b"<html>please log in</html>", "dataset.json of {url}/ is damaged"),
        (b"{}", "dataset.json of {url}/ is damaged"),
    ],
)
def test_what_is_no_dataset(content: bytes | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.01)
    (tmp_path / "data").mkdir()
    if content is not None:
        (tmp_path / "data/dataset.json").write_bytes(content)
    with nginx(tmp_path / "data", tmp_path / "nginx") as server, pytest.raises(UserError) as error:
        ShardSet.open(Url(f"{server.url}/"), cache=CacheConfig(tmp_path / "cache"))
    assert said.format(url=server.url) in str(error.value)


def test_a_dataset_that_was_changed_after_it_was_uploaded(
    photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is not the one of dataset.json is never read from, not even an image of it that is right."""
    data = shutil.copytree(photo_dataset_path, tmp_path / "data")
    tar = bytearray((data / "shard-000002.tar").read_bytes())
    tar[100] ^= 1  # in a tar header
    (data / "shard-000002.tar").write_bytes(tar)
    with nginx(data, tmp_path / "nginx") as server:
        dataset = ShardSet.open(Url(server.url), cache=CacheConfig(tmp_path / "cache"))
        with pytest.raises(UserError, match=r"shard-000002.tar of .* is not what its dataset.json says"):
            read_all(dataset, ALL)


OUTSIDE = ["../x.tar", "a/../../x.tar", "..", "a//x.tar", "./x.tar", "a\\..\\x.tar", "", "x\0.tar"]


@pytest.mark.parametrize("name", [*OUTSIDE, "/etc/passwd", "/x.tar"])
def test_names_that_lead_out_are_refused_before_a_request(
    name: str, photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.01)
    folder = tmp_path / "served"
    shutil.copytree(photo_dataset_path, folder)
    info = json.loads((folder / "dataset.json").read_text())
    info["shards"][2]["name"] = name
    (folder / "dataset.json").write_text(json.dumps(info))
    with nginx(folder, tmp_path / "nginx") as server, FaultProxy(server.port) as proxy:
        for attempt in (lambda: opened(proxy, tmp_path / "cache"), lambda: copied(proxy, tmp_path / "cache")):
            with pytest.raises(UserError, match=r"outside of its folder|lie elsewhere"):
                attempt()
        assert {passed.path.rpartition("/")[2] for passed in proxy.seen} == {"dataset.json"}


def copied(proxy: FaultProxy, cache: Path) -> None:
    """As tools/check_shards.py does."""
    with local_copy(Url(proxy.url), CacheConfig(cache, retry_minutes=1), quiet=True):
        pass


def with_crc(data: bytes, wanted: int) -> bytes:
    """``data`` with its last four bytes chosen so that its crc32 is ``wanted``."""
    table = [zlib.crc32(bytes([0xFF ^ n])) ^ 0xFF000000 for n in range(256)]  # a byte a step
    by_top = {value >> 24: (index, value) for index, value in enumerate(table)}
    state = wanted ^ 0xFFFFFFFF
    indexes = []
    for _ in range(4):
        index, value = by_top[state >> 24]
        indexes.append(index)
        state = ((state ^ value) << 8) & 0xFFFFFFFF
    register, tail = zlib.crc32(data[:-4]) ^ 0xFFFFFFFF, b""
    for index in reversed(indexes):
        tail += bytes([(register ^ index) & 0xFF])
        register = (register >> 8) ^ table[index]
    return data[:-4] + tail


def test_a_range_that_was_forged_with_its_crc_is_found_when_the_shard_is_there(
    proxy: FaultProxy, photo_dataset: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = opened(proxy, tmp_path)
    true = photo_dataset.read(3)
    forged = with_crc(true[:-40] + bytes(40), zlib.crc32(true))
    assert zlib.crc32(forged) == zlib.crc32(true)
    assert forged != true
    read = remote.RemoteFolder.read
    with monkeypatch.context() as patch:
        patch.setattr(remote.RemoteFolder, "read", lambda *_: forged)
        assert dataset.read(3) == forged  # nothing is known that would say it is not
    monkeypatch.setattr(remote.RemoteFolder, "read", read)
    with pytest.raises(UserError, match=r"gave other bytes for a range of shard-00000\d\.tar .* forged image"):
        read_all(dataset, ALL)


def test_ranges_that_were_damaged_by_chance_are_no_forgery(
    proxy: FaultProxy, photo_dataset: ShardSet, tmp_path: Path
) -> None:
    dataset = opened(proxy, tmp_path)
    proxy.harm(Faults(("bit flip",), repeat=WRONG_ATTEMPTS, only=r"\.tar bytes=[1-9]"))  # images, not whole shards
    for sample in (3, 30):
        assert dataset.read(sample) == photo_dataset.read(sample)
    read_all(dataset, ALL, expected=photo_dataset)


def test_the_names_come_along(proxy: FaultProxy, photo_dataset: ShardSet, tmp_path: Path) -> None:
    dataset = opened(proxy, tmp_path)
    assert photo_dataset.names is not None
    assert dataset.names is not None
    assert list(dataset.names) == list(photo_dataset.names)
    assert pickle.loads(pickle.dumps(dataset)).names[47] == photo_dataset.names[47]
    dataset.info.pop("names")
    del dataset.names
    assert dataset.names is None
