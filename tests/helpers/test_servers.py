"""The servers serve, the proxy harms as it says: else the tests of remote datasets would prove nothing."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.fault_proxy import FAULTS, SHARDS, FaultProxy, Faults
from tests.helpers.servers import BUCKET, nginx, s3_environment, s3_server

FILES = {f"shard-{number:06d}.tar": np.random.default_rng(number).bytes(5000 + 10 * number) for number in range(3)}
PART = "bytes=1000-1999"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("served")
    for name, content in FILES.items():
        (made / name).write_bytes(content)
    return made


@pytest.fixture(scope="module")
def behind(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with nginx(folder, tmp_path_factory.mktemp("nginx")) as server:
        yield server.port


def get(url: str, byte_range: str = PART, timeout: float = 60) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": byte_range}), timeout=timeout) as answer:
        return bytes(answer.read())


def test_nginx_serves_ranges_and_logs_them(folder: Path, tmp_path: Path) -> None:
    with nginx(folder, tmp_path / "nginx") as server:
        assert get(f"{server.url}/shard-000001.tar") == FILES["shard-000001.tar"][1000:2000]
        get(f"{server.url}/shard-000002.tar?signature=secret", "bytes=0-9")
        first, second = server.requests()
        assert (first.method, first.file, first.range, first.status, first.sent) == (
            *("GET", "shard-000001.tar", PART),
            *(206, 1000),
        )
        assert (second.query, second.sent) == ("signature=secret", 10)
        assert server.sent() == {"shard-000001.tar": 1000, "shard-000002.tar": 10}


def test_nginx_can_refuse_ranges_and_strangers(folder: Path, tmp_path: Path) -> None:
    with nginx(folder, tmp_path / "a", ranges=False) as server:
        assert get(f"{server.url}/shard-000001.tar") == FILES["shard-000001.tar"]
    with nginx(folder, tmp_path / "b", password="reader:hush") as server:
        assert status(f"{server.url}/shard-000001.tar") == 401
        assert status(f"{server.url}/shard-000001.tar", {"Authorization": "Basic cmVhZGVyOmh1c2g="}) == 200
    with nginx(folder, tmp_path / "c", signature="hush") as server:
        assert status(f"{server.url}/shard-000001.tar?signature=other") == 403
        assert status(f"{server.url}/shard-000001.tar?signature=hush") == 200


def status(url: str, headers: dict[str, str] | None = None) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_s3fs_finds_the_bucket_through_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    with s3_server(folder) as port, FaultProxy(port, Faults(("error 500",), only=SHARDS)) as proxy:
        for name, value in s3_environment(proxy.port).items():
            monkeypatch.setenv(name, value)
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        path = f"{BUCKET}/photos/shard-000002.tar"
        assert files.cat_file(path, start=1000, end=2000) == FILES["shard-000002.tar"][1000:2000]
        assert proxy.counts == {"error 500": 1}


HONEST = FILES["shard-000001.tar"]
SEEN: dict[str, bytes | str] = {  # what a client gets of the bytes from 1000 on
    "cut": "IncompleteRead",
    "reset": "ConnectionResetError",
    "error 500": "500",
    "error 503": "503",
    "slow": HONEST[1000:],
    "stall": "TimeoutError",
    "truncated": HONEST[1000 : 1000 + len(HONEST[1000:]) // 2],
    "wrong object": FILES["shard-000000.tar"][1000:] + bytes(10),
    "other length": FILES["shard-000000.tar"][1000:],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proxy_harms_once_as_it_says(fault: str, behind: int) -> None:
    with FaultProxy(behind, Faults((fault,))) as proxy:
        got = outcome(f"{proxy.url}/shard-000001.tar")
        if fault == "bit flip":
            assert isinstance(got, bytes)
            changed = np.frombuffer(got, np.uint8) != np.frombuffer(HONEST[1000:], np.uint8)
            assert np.flatnonzero(changed).tolist() == [len(got) // 2]
        else:
            assert got == SEEN[fault]
        assert outcome(f"{proxy.url}/shard-000001.tar") == HONEST[1000:]
        assert proxy.counts == {fault: 1}
        assert [passed.fault for passed in proxy.seen] == [fault, None]


def outcome(url: str) -> bytes | str:
    try:
        return get(url, "bytes=1000-", timeout=1)
    except urllib.error.HTTPError as error:
        return str(error.code)
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__


def test_the_schedule_is_a_function_of_seed_and_request() -> None:
    faults = Faults(("cut", "reset"), share=0.3, repeat=2, only=SHARDS)
    requests = [
        (f"/d/shard-{number:06d}.tar", f"bytes={start}-{start + 9}") for number in range(50) for start in (0, 9)
    ]
    struck = [faults.strike(*request, 0) for request in requests]
    assert struck == [faults.strike(*request, 0) for request in requests]
    assert struck != [Faults(faults.kinds, 0.3, 2, SHARDS, seed=1).strike(*request, 0) for request in requests]
    assert {"cut", "reset"} == set(struck) - {None}
    assert 15 < sum(fault is not None for fault in struck) < 45
    assert all(faults.strike(*request, 2) is None for request in requests)
    assert faults.strike("/d/dataset.json", "", 0) is None
    assert Faults(("cut",), repeat=None).strike("/d/samples.npy", "", 1000) == "cut"


def test_a_server_that_is_gone_for_a_while(behind: int) -> None:
    with FaultProxy(behind) as proxy:
        url = f"{proxy.url}/shard-000000.tar"
        before = get(url)
        with proxy.dead(), pytest.raises(urllib.error.URLError, match="refused"):
            get(url)
        assert get(url) == before
