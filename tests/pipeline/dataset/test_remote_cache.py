"""The cache holds whole files or none, never more than it may, and each is fetched once."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.common.locations import Url
from pipeline.dataset import remote_cache as shard_cache
from pipeline.dataset import remote_files as remote
from pipeline.dataset.remote_cache import LEASE_S, CacheConfig, RemoteFile, ShardCache
from pipeline.dataset.remote_files import FetchCancelledError, RemoteFolder
from tests.helpers.fault_proxy import FaultProxy, Faults
from tests.helpers.servers import Nginx, nginx
from tests.helpers.sessions import ROOT

SIZE, COUNT = 10_000, 8
CONTENT = [np.random.default_rng(number).bytes(SIZE) for number in range(COUNT)]
FILES = [
    RemoteFile(f"shard-{number:06d}.tar", SIZE, hashlib.sha256(content).hexdigest())
    for number, content in enumerate(CONTENT)
]
NEVER = threading.Event()


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    folder = tmp_path_factory.mktemp("served")
    for file, content in zip(FILES, CONTENT, strict=True):
        (folder / file.name).write_bytes(content)
    with nginx(folder, tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture
def proxy(behind: Nginx, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Files come in four pieces."""
    monkeypatch.setattr(remote, "PIECE", SIZE // 4)
    monkeypatch.setattr(remote, "FIRST_DELAY_S", 0.01)
    with FaultProxy(behind.port) as proxy:
        yield proxy


def cache_at(folder: Path, proxy: FaultProxy, files: float = 3.5, retry_minutes: float = 1) -> ShardCache:
    """One with room for so many files."""
    return ShardCache(RemoteFolder(Url(proxy.url), retry_minutes), CacheConfig(folder, f"{files * SIZE / 1000}KB"))


def content(cache: ShardCache, number: int, needed: bool | None = False) -> bytes | None:
    handle = cache.open(FILES[number], lambda _: needed, NEVER)
    if handle is None:
        return None
    try:
        return os.pread(handle, SIZE + 1, 0)
    finally:
        os.close(handle)


def held(folder: Path) -> dict[str, int]:
    """Bytes by name of what the folder holds."""
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "room.lock"}


def fetched(proxy: FaultProxy) -> list[str]:
    """The name of each file of which the first piece was asked for."""
    return [passed.path[1:] for passed in proxy.seen if passed.range.startswith("bytes=0-")]


def name(number: int) -> str:
    return f"{FILES[number].sha256}.tar"


def test_a_file_is_fetched_once_and_named_by_its_content(proxy: FaultProxy, tmp_path: Path) -> None:
    cache = cache_at(tmp_path / "deep/cache", proxy)
    assert not cache.has(FILES[0])
    for _ in range(2):
        assert content(cache, 0) == CONTENT[0]
    assert cache.fetch(FILES[0], lambda _: False, NEVER)
    assert held(cache.folder) == {name(0): SIZE}
    assert len(proxy.seen) == 4
    assert content(cache_at(cache.folder, proxy), 0) == CONTENT[0]
    assert len(proxy.seen) == 4


def test_the_longest_unused_goes_first(proxy: FaultProxy, tmp_path: Path) -> None:
    cache = cache_at(tmp_path, proxy)
    for number in range(3):
        assert cache.fetch(FILES[number], lambda _: None, NEVER)
        os.utime(tmp_path / name(number), (0, number))
    cache.renew_lease(FILES[0])
    assert cache.fetch(FILES[3], lambda _: None, NEVER)
    assert set(held(tmp_path)) == {name(0), name(2), name(3)}


@pytest.mark.parametrize(
    ("needed", "age_s", "goes"),
    [(True, 10 * LEASE_S, False), (None, 0, False), (None, LEASE_S + 60, True), (False, 0, True)],
)
def test_what_is_needed_or_may_be_needed_by_others_stays(
    needed: bool | None, age_s: float, goes: bool, proxy: FaultProxy, tmp_path: Path
) -> None:
    cache = cache_at(tmp_path, proxy)
    for number in range(3):
        assert cache.fetch(FILES[number], lambda _: True, NEVER)
        os.utime(tmp_path / name(number), (0, time.time() - age_s))
    assert content(cache, 3, needed) == (CONTENT[3] if goes else None)
    assert cache.fetch(FILES[3], lambda _: needed, NEVER) is goes
    assert len(held(tmp_path)) == 3
    assert (name(3) in held(tmp_path)) is goes


def test_files_of_others_count_and_stay(proxy: FaultProxy, tmp_path: Path) -> None:
    cache = cache_at(tmp_path, proxy)
    (tmp_path / "thesis.txt").write_bytes(bytes(3 * SIZE))
    assert content(cache, 0) is None
    assert held(tmp_path) == {"thesis.txt": 3 * SIZE}


def test_many_threads_share_a_small_cache(proxy: FaultProxy, tmp_path: Path) -> None:
    """Each is always served, none ever sees more bytes in the folder than allowed, also among faults."""
    proxy.harm(Faults(("cut", "reset", "error 503", "truncated", "bit flip", "wrong object"), share=0.3, repeat=2))
    cache = cache_at(tmp_path, proxy)
    over, done = [], threading.Event()

    def watch() -> None:
        while not done.is_set():
            with open(tmp_path / "room.lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                sizes = held(tmp_path)
            if sum(sizes.values()) > cache.limit:
                over.append(sizes)

    def read(turn: int) -> bool:
        number = turn * 5 % COUNT
        found = content(cache, number)
        return found is None or found == CONTENT[number]

    with ThreadPoolExecutor(7) as threads:
        watcher = threads.submit(watch)
        try:
            assert all(threads.map(read, range(80)))
        finally:
            done.set()
        watcher.result()
    assert over == []
    assert proxy.counts.total() > 10


READER = """
import os, sys, threading
from pathlib import Path
from pipeline.dataset import remote_files as remote
from pipeline.common.locations import Url
from pipeline.dataset.remote_cache import CacheConfig, RemoteFile, ShardCache
remote.PIECE = {piece}
cache = ShardCache(remote.RemoteFolder(Url({url!r}), 1), CacheConfig(Path({folder!r})))
print("ready", flush=True)
sys.stdin.readline()
handle = cache.open({file!r}, lambda _: True, threading.Event())
sys.stdout.buffer.write(os.pread(handle, {size} + 1, 0))
"""


def reader(proxy: FaultProxy, folder: Path, file: RemoteFile) -> subprocess.Popen[bytes]:
    """A process of its own that will read the file when it is told to."""
    script = READER.format(piece=SIZE // 4, url=proxy.url, folder=str(folder), file=file, size=SIZE)
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def test_processes_and_threads_fetch_a_file_once(proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.harm(Faults(("slow",)))
    processes = [reader(proxy, tmp_path, FILES[1]) for _ in range(2)]
    cache = cache_at(tmp_path, proxy)
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(content, cache, 1) for _ in range(4)]
        outputs = [process.communicate(b"\n", timeout=60)[0] for process in processes]
        assert [one.result() for one in asked] + outputs == [CONTENT[1]] * 6
    assert len(proxy.seen) == 4
    assert held(tmp_path) == {name(1): SIZE}


def test_what_a_killed_process_began_is_gone_on_with(proxy: FaultProxy, tmp_path: Path) -> None:
    """It dies in the middle of the last piece; only that one is fetched again."""
    proxy.harm(Faults(("stall",), only="bytes=7500-"))
    process = reader(proxy, tmp_path, FILES[2])
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()
    while proxy.counts["stall"] == 0:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(held(tmp_path).values()) == [SIZE * 3 // 4]
    proxy.harm(Faults())
    assert content(cache_at(tmp_path, proxy), 2) == CONTENT[2]
    assert [passed.range for passed in proxy.seen] == ["bytes=7500-9999"]
    assert held(tmp_path) == {name(2): SIZE}


# What is not what it should be.


def test_a_partial_file_with_wrong_bytes_is_not_believed(proxy: FaultProxy, tmp_path: Path) -> None:
    cache = cache_at(tmp_path, proxy)
    for left in (bytes(6000), bytes(SIZE), bytes(SIZE + 5)):
        (tmp_path / f"{FILES[3].sha256}-{SIZE}.part").write_bytes(left)
        assert content(cache, 3) == CONTENT[3]
        assert held(tmp_path) == {name(3): SIZE}
        cache.discard(FILES[3])


def test_a_partial_file_of_a_dead_process_makes_room(proxy: FaultProxy, tmp_path: Path) -> None:
    """It counts as much as the whole would."""
    cache = cache_at(tmp_path, proxy, files=2.5)
    left = tmp_path / f"{FILES[3].sha256}-{SIZE}.part"
    left.write_bytes(bytes(10))
    assert cache.fetch(FILES[0], lambda _: None, NEVER)
    assert left.exists()
    os.utime(left, (0, 0))
    assert cache.fetch(FILES[1], lambda _: None, NEVER)
    assert set(held(tmp_path)) == {name(0), name(1)}


def test_a_file_that_became_shorter_is_fetched_again(proxy: FaultProxy, tmp_path: Path) -> None:
    cache = cache_at(tmp_path, proxy)
    assert cache.fetch(FILES[4], lambda _: False, NEVER)
    os.truncate(tmp_path / name(4), 100)
    assert content(cache, 4) == CONTENT[4]


@pytest.mark.parametrize("fault", ["bit flip", "wrong object"])
def test_wrong_bytes_are_fetched_again(fault: str, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.harm(Faults((fault,), only="bytes=2500-"))
    assert content(cache_at(tmp_path, proxy), 5) == CONTENT[5]
    assert proxy.counts == {fault: 1}
    assert held(tmp_path) == {name(5): SIZE}


@pytest.mark.parametrize("fault", ["bit flip", "wrong object"])
def test_a_source_that_stays_wrong_is_named_and_leaves_nothing(fault: str, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.harm(Faults((fault,), only="bytes=2500-", repeat=None))
    with pytest.raises(UserError, match=rf"shard-000005.tar of {proxy.url} is not what its dataset.json says"):
        content(cache_at(tmp_path, proxy), 5)
    assert 1 < proxy.counts[fault] < 10
    assert held(tmp_path) == {}


def test_a_full_disk_is_named(proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, write = cache_at(tmp_path, proxy), os.pwrite

    def full(handle: int, data: bytes, offset: int) -> int:
        if offset >= 5000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, data, offset)

    monkeypatch.setattr(shard_cache.os, "pwrite", full)
    with pytest.raises(UserError, match=f"using --cache-dir {tmp_path} failed: No space left on device.*free some"):
        content(cache, 0)
    monkeypatch.setattr(shard_cache.os, "pwrite", write)
    assert content(cache, 0) == CONTENT[0]


def test_a_disk_that_fails_is_named_and_no_fault_of_an_image(
    proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an OSError, which would make bad samples of the shard's images."""
    cache = cache_at(tmp_path / "cache", proxy)
    shutil.rmtree(tmp_path / "cache")
    for use in (cache.open, cache.fetch):
        with pytest.raises(UserError, match=f"using --cache-dir {tmp_path}/cache failed: No such file"):
            use(FILES[0], lambda _: False, NEVER)


def test_who_waits_for_another_can_be_cancelled(proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.harm(Faults(("stall",)))
    cache, first, second = cache_at(tmp_path, proxy), threading.Event(), threading.Event()
    with ThreadPoolExecutor(2) as threads:
        fetching = threads.submit(cache.open, FILES[6], lambda _: True, first)
        while proxy.counts["stall"] == 0:
            time.sleep(0.01)
        waiting = threads.submit(cache.open, FILES[6], lambda _: True, second)
        second.set()
        with pytest.raises(FetchCancelledError):
            waiting.result()
        assert not fetching.done()
        first.set()
        with pytest.raises(FetchCancelledError):
            fetching.result()
    assert len(proxy.seen) == 1


def test_a_checksum_is_no_path() -> None:
    for hostile in ("../../etc/passwd", "", "A" * 64, f"{'a' * 64}\n", "a" * 63):
        with pytest.raises(UserError, match=r"shard-000000.tar no sha256"):
            RemoteFile("shard-000000.tar", 1, hostile)


# What a user asks for.


@pytest.mark.parametrize(
    ("text", "size"), [("200GB", 200e9), ("1.5 tb", 1.5e12), ("500mb", 5e8), ("7", 7), ("3K", 3e3)]
)
def test_sizes(text: str, size: float) -> None:
    assert CacheConfig(cache_size=text).limit == size


@pytest.mark.parametrize("text", ["", "0GB", "-1GB", "many", "1e9", "5 PB", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="write it as 200GB"):
        CacheConfig(cache_size=text)


def test_other_wrong_numbers() -> None:
    with pytest.raises(UserError, match="--fetch-threads 0"):
        CacheConfig(fetch_threads=0)
    for minutes in (-1, float("nan")):
        with pytest.raises(UserError, match="--retry-minutes"):
            CacheConfig(retry_minutes=minutes)


def test_a_folder_that_cannot_be_made(proxy: FaultProxy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        cache_at(tmp_path / "file/cache", proxy)


def test_the_cache_lies_where_caches_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert CacheConfig().folder == Path("/fast/siamstream")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert CacheConfig().folder == Path.home() / ".cache/siamstream"


# The folder is not trusted.


def test_a_planted_file_of_the_right_name_and_size_is_not_used(proxy: FaultProxy, tmp_path: Path) -> None:
    (tmp_path / f"{FILES[2].sha256}.tar").write_bytes(bytes(SIZE))
    assert content(cache_at(tmp_path, proxy), 2) == CONTENT[2]


def test_a_file_is_compared_once(proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert content(cache_at(tmp_path, proxy), 2) == CONTENT[2]
    compared = []
    real = shard_cache._sha256
    monkeypatch.setattr(shard_cache, "_sha256", lambda handle: compared.append(handle) or real(handle))
    other = cache_at(tmp_path, proxy)
    for _ in range(3):
        assert content(other, 2) == CONTENT[2]
    assert len(compared) == 1


@pytest.mark.parametrize("name", [f"{FILES[2].sha256}.tar", f"{FILES[2].sha256}-{SIZE}.part", "room.lock"])
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_only_regular_files_are_opened(name: str, kind: str, proxy: FaultProxy, tmp_path: Path) -> None:
    precious, folder = tmp_path / "precious", tmp_path / "cache"
    precious.write_bytes(CONTENT[2])
    folder.mkdir(mode=0o700)
    match kind:
        case "link":
            (folder / name).symlink_to(precious)
        case "fifo":
            os.mkfifo(folder / name)
        case "folder":
            (folder / name).mkdir()
    with pytest.raises(UserError, match="no regular file"):
        content(cache_at(folder, proxy), 2)
    assert precious.read_bytes() == CONTENT[2]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_folder_that_others_can_write_is_refused_unless_that_is_wanted(
    mode: int, proxy: FaultProxy, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(UserError, match="--cache-shared"):
        cache_at(folder, proxy)
    shared = CacheConfig(folder, "1MB", cache_shared=True)
    assert content(ShardCache(RemoteFolder(Url(proxy.url), 1), shared), 1) == CONTENT[1]


def test_a_new_folder_is_ones_own(proxy: FaultProxy, tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        cache_at(tmp_path / "new", proxy)
    finally:
        os.umask(former)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
