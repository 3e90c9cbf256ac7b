"""A run over the network ends up with the losses and samples of one beside its data, whatever befalls the network."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipeline.common.locations import Url
from pipeline.dataset.dataset import ShardSet
from pipeline.dataset.remote_cache import CacheConfig
from pipeline.loader.bad_samples import BAD_SAMPLES_FILE
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.faults.test_faults import flags, numbers, torchrun
from tests.helpers.both_evaluations import evaluate_both
from tests.helpers.fault_proxy import FAULTS, FaultProxy, Faults
from tests.helpers.photos import write_photo_folder
from tests.helpers.servers import BUCKET, S3_KEYS, Nginx, free_port, nginx, s3_environment, s3_server
from tests.helpers.sessions import KILL, ROOT, TERM, Sessions
from train.distributed.process_group import DistContext
from train.distributed.stop_signals import EXIT_PREEMPTED

SECRET = "s3cr3t-of-the-url"
BLOCKS = ["--epoch-order", "blocks", "--block-shards", "2", "--knn-every", "0"]
CALM = ("small pieces",)  # a place of sabotage at which nothing strikes


def remote_flags(url: str, run_dir: Path, *more: str, cache: Path | None = None) -> list[str]:
    cache = cache or run_dir.parent / "cache"
    return flags(url, run_dir, "--cache-dir", str(cache), "--retry-minutes", "2", *more)


@dataclass(frozen=True)
class Web:
    """Nginx over a dataset, and the proxy before it."""

    server: Nginx
    proxy: FaultProxy

    @property
    def url(self) -> str:
        """With a password and a signature, which this nginx does not ask for."""
        return f"http://reader:{SECRET}@127.0.0.1:{self.proxy.port}/?signature={SECRET}"


@contextmanager
def web_server(folder: Path, work: Path) -> Iterator[Web]:
    with nginx(folder, work) as server, FaultProxy(server.port) as proxy:
        yield Web(server, proxy)


@pytest.fixture(scope="module")
def photo_web(photo_dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    with web_server(photo_dataset_path, tmp_path_factory.mktemp("nginx")) as web:
        yield web


@pytest.fixture
def web(photo_web: Web) -> Iterator[Web]:
    """Without faults."""
    photo_web.proxy.harm(Faults())
    return photo_web


@pytest.fixture(scope="module")
def bucket(photo_dataset_path: Path) -> Iterator[FaultProxy]:
    with s3_server(photo_dataset_path) as port, FaultProxy(port) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def sessions(bucket: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    made = Sessions(tmp_path_factory.mktemp("sessions"), s3_environment(bucket.port))
    yield made
    made.close()


@pytest.fixture(scope="module")
def local(photo_dataset_path: Path, sessions: Sessions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("local") / "run"
    assert sessions.run(flags(photo_dataset_path, run_dir)) == 0, sessions.said()
    return run_dir


@pytest.fixture(scope="module")
def local_blocks(photo_dataset_path: Path, sessions: Sessions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("local") / "run"
    assert sessions.run(flags(photo_dataset_path, run_dir, *BLOCKS)) == 0, sessions.said()
    return run_dir


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 images in 20 shards."""
    folder = tmp_path_factory.mktemp("many")
    photos = write_photo_folder(folder / "photos", per_class=100)
    make_dataset(str(photos), folder / "data", ShardingOptions(samples_per_shard=20), quiet=True, in_process=True)
    return folder / "data"


def shard_bytes(data: Path) -> dict[str, int]:
    return {shard.name: shard.bytes for shard in ShardSet.open(data).shards}


def assert_no_secrets(run_dir: Path, said: str) -> None:
    secrets = [SECRET, *S3_KEYS.values()]
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {"config.json", "plan.json", "metrics.jsonl", "summary.json"} <= {path.name for path in files}
    for secret in secrets:
        assert secret not in said
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


# Faults of the network.

HEALING = tuple(fault for fault in FAULTS if fault != "stall")


def test_http_among_faults(web: Web, local: Path, sessions: Sessions, tmp_path: Path) -> None:
    web.proxy.harm(Faults(HEALING, share=0.8, repeat=2))
    assert sessions.run(remote_flags(web.url, tmp_path / "run"), *CALM) == 0, sessions.said()
    assert len(web.proxy.counts) >= 5
    assert numbers(tmp_path / "run") == numbers(local)
    assert numbers(local)[1]  # the kNN accuracies are among them
    assert not (tmp_path / "run" / BAD_SAMPLES_FILE).exists()
    assert_no_secrets(tmp_path / "run", sessions.said())


def test_s3_among_faults(bucket: FaultProxy, local: Path, sessions: Sessions, tmp_path: Path) -> None:
    bucket.harm(Faults(HEALING, share=0.8, repeat=2))
    assert sessions.run(remote_flags(f"s3://{BUCKET}/photos", tmp_path / "run"), *CALM) == 0, sessions.said()
    assert len(bucket.counts) >= 5
    assert numbers(tmp_path / "run") == numbers(local)
    assert not (tmp_path / "run" / BAD_SAMPLES_FILE).exists()
    assert_no_secrets(tmp_path / "run", sessions.said())


@pytest.mark.faults
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_every_fault(
    protocol: str, fault: str, web: Web, bucket: FaultProxy, local: Path, sessions: Sessions, tmp_path: Path
) -> None:
    """It strikes half of all requests, some of them twice."""
    proxy, url = (web.proxy, web.url) if protocol == "http" else (bucket, f"s3://{BUCKET}/photos")
    proxy.harm(Faults((fault,), share=0.5, repeat=2))
    assert sessions.run(remote_flags(url, tmp_path / "run"), *CALM) == 0, sessions.said()
    assert proxy.counts[fault] >= 5
    assert numbers(tmp_path / "run") == numbers(local)
    assert not (tmp_path / "run" / BAD_SAMPLES_FILE).exists()


def test_what_stays_away_ends_the_run_which_goes_on_when_it_is_back(
    photo_dataset_path: Path, local_blocks: Path, sessions: Sessions, tmp_path: Path
) -> None:
    data = shutil.copytree(photo_dataset_path, tmp_path / "data")
    gone = data / "shard-000003.tar"
    gone.rename(data / "gone")
    with web_server(data, tmp_path / "nginx") as web:
        arguments = remote_flags(web.url, tmp_path / "run", *BLOCKS)
        before = len(sessions.said())
        assert sessions.run(arguments, *CALM) == 2
        said = sessions.said()[before:]
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert errors == [said.splitlines()[-1]]
        place = f"http://***@127.0.0.1:{web.proxy.port}/?***"
        assert f"cannot fetch shard-000003.tar of {place}: no such file, 4 times" in errors[0]
        assert "bad sample" not in said
        assert SECRET not in said
        (data / "gone").rename(gone)
        assert sessions.run([*arguments, "--resume"], *CALM) == 0, sessions.said()
    assert numbers(tmp_path / "run") == numbers(local_blocks)
    assert not (tmp_path / "run" / BAD_SAMPLES_FILE).exists()


def test_a_stop_does_not_wait_for_a_dead_server(
    web: Web, local_blocks: Path, sessions: Sessions, tmp_path: Path
) -> None:
    """SIGTERM after the eighth vain attempt to fetch a shard of a later step."""
    last = numbers(local_blocks)[2][0][3][-1] // 10  # the shard of the last sample of an epoch
    web.proxy.harm(Faults(("error 503",), repeat=None, only=f"shard-{last:06d}"))
    arguments = remote_flags(web.url, tmp_path / "run", *BLOCKS, "--retry-minutes", "60")
    assert sessions.run(arguments, "a fetch failed", 8, TERM) == EXIT_PREEMPTED, sessions.said()
    web.proxy.harm(Faults())
    assert sessions.run([*arguments, "--resume"], *CALM) == 0, sessions.said()
    assert numbers(tmp_path / "run") == numbers(local_blocks)


def test_evaluations_among_faults(photo_dataset_path: Path, web: Web, tmp_path: Path) -> None:
    """Two datasets share a cache."""
    other = tmp_path / "other"
    photos = write_photo_folder(tmp_path / "photos", per_class=5)
    make_dataset(str(photos), other, ShardingOptions(samples_per_shard=4), quiet=True, in_process=True)
    alone = DistContext.alone(torch.device("cpu"))
    local = evaluate_both(photo_dataset_path, other, tmp_path / "local", alone)
    with web_server(other, tmp_path / "nginx") as second:
        for proxy in (web.proxy, second.proxy):
            proxy.harm(Faults(("cut", "reset", "truncated", "bit flip", "error 503"), share=0.8))
        cache = CacheConfig(tmp_path / "cache", retry_minutes=1)
        assert evaluate_both(Url(web.url), Url(second.url), tmp_path / "remote", alone, cache) == local
        assert all(proxy.counts.total() >= 5 for proxy in (web.proxy, second.proxy))
    assert not [path for path in (tmp_path / "remote").rglob("*.*") if SECRET.encode() in path.read_bytes()]


# The cache.


def test_killed_in_the_middle_of_a_fetch(web: Web, local: Path, sessions: Sessions, tmp_path: Path) -> None:
    arguments = remote_flags(web.url, tmp_path / "run", "--fetch-threads", "1")
    before = web.server.sent()
    for time in (2, 5):
        assert sessions.run([*arguments, "--resume"], "a piece fetched", time, KILL) == -KILL, sessions.said()
    assert list((tmp_path / "cache").glob("*.part"))
    assert sessions.run([*arguments, "--resume"], *CALM) == 0, sessions.said()
    assert numbers(tmp_path / "run") == numbers(local)
    assert not list((tmp_path / "cache").glob("*.part"))
    for name, size in shard_bytes(web.server.folder).items():
        assert size <= web.server.sent()[name] - before.get(name, 0) <= size + 2 * 16_000  # what a kill lost


def test_what_rots_in_the_cache_is_fetched_again(web: Web, local: Path, sessions: Sessions, tmp_path: Path) -> None:
    arguments = remote_flags(web.url, tmp_path / "run")
    assert sessions.run([*arguments, "--max-steps", "4"], *CALM) == 0, sessions.said()
    cached = sorted((tmp_path / "cache").glob("*.tar"))
    assert len(cached) == 5
    for path in cached[:3]:
        content = bytearray(path.read_bytes())
        for at in range(700, len(content), 512):
            content[at] ^= 255
        path.write_bytes(content)
    os.truncate(cached[3], 1000)
    assert sessions.run([*arguments, "--resume"], *CALM) == 0, sessions.said()
    assert numbers(tmp_path / "run") == numbers(local)
    assert not (tmp_path / "run" / BAD_SAMPLES_FILE).exists()


@contextmanager
def watched(cache: Path) -> Iterator[list[int]]:
    """The sizes of the cache's folder, measured again and again while nothing is added."""
    sizes: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            if (cache / "room.lock").exists():
                with open(cache / "room.lock") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    sizes.append(sum(path.stat().st_size for path in cache.iterdir()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield sizes
    finally:
        done.set()
        watcher.join()


def test_a_small_cache(many_shards: Path, sessions: Sessions, tmp_path: Path) -> None:
    """Never more than allowed, and each shard at most once an epoch."""
    sizes = shard_bytes(many_shards)
    limit = sum(sizes.values()) // 2
    few_steps = ["--read-ahead", "1", "--prefetch", "1", "--dali.prefetch", "1", "--epochs", "2"]
    local = tmp_path / "local"
    assert sessions.run(flags(many_shards, local, *BLOCKS, "--epochs", "2")) == 0
    with web_server(many_shards, tmp_path / "nginx") as web, watched(tmp_path / "cache") as held:
        size = ["--cache-size", f"{limit / 1000}KB"]
        assert sessions.run(remote_flags(web.url, tmp_path / "run", *BLOCKS, *few_steps, *size), *CALM) == 0, (
            sessions.said()
        )
        sent = web.server.sent()
    assert numbers(tmp_path / "run") == numbers(local)
    assert limit / 2 < max(held) <= limit
    times = {name: sent[name] / size for name, size in sizes.items()}
    assert set(times.values()) == {1.0, 2.0}  # some stay from one epoch to the next


def test_a_random_order_needs_all_shards(web: Web, sessions: Sessions, tmp_path: Path) -> None:
    before = len(sessions.said())
    assert sessions.run(remote_flags(web.url, tmp_path / "run", "--cache-size", "100KB")) == 2
    said = sessions.said()[before:]
    assert "--cache-size 100KB is too small" in said
    assert "--epoch-order blocks" in said
    assert SECRET not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_two_ranks_of_a_machine_fetch_each_shard_once(photo_dataset_path: Path, tmp_path: Path) -> None:
    with web_server(photo_dataset_path, tmp_path / "nginx") as web:
        here = flags(photo_dataset_path, tmp_path / "local", "--max-steps", "6")
        assert torchrun(2, "train/pretrain.py", here).returncode == 0
        ended = torchrun(2, "train/pretrain.py", remote_flags(web.url, tmp_path / "run", "--max-steps", "6"))
        assert ended.returncode == 0, ended.stderr
        sent = web.server.sent()
    assert numbers(tmp_path / "run", 2) == numbers(tmp_path / "local", 2)
    assert {name: sent[name] for name in sent if name.endswith(".tar")} == shard_bytes(photo_dataset_path)
    assert sent["samples.npy"] == (photo_dataset_path / "samples.npy").stat().st_size
    assert_no_secrets(tmp_path / "run", ended.stdout + ended.stderr)


@pytest.mark.faults
def test_two_machines_fetch_their_own_halves(many_shards: Path, tmp_path: Path) -> None:
    """Two processes with caches of their own, told apart by the query of their URLs."""
    more = [*BLOCKS, "--block-streams", "2", "--epochs", "1"]
    assert torchrun(2, "train/pretrain.py", flags(many_shards, tmp_path / "local", *more)).returncode == 0
    with nginx(many_shards, tmp_path / "nginx") as server:
        port = free_port()
        machines = [machine(rank, port, server, tmp_path, more) for rank in range(2)]
        outputs = [one.communicate(timeout=300)[0] for one in machines]
        assert [one.returncode for one in machines] == [0, 0], outputs
        requests = server.requests()
    assert numbers(tmp_path / "run", 2) == numbers(tmp_path / "local", 2)
    sizes = shard_bytes(many_shards)
    sent = [
        {name: sum(r.sent for r in requests if r.file == name and r.query == f"machine={rank}") for name in sizes}
        for rank in range(2)
    ]
    assert all(one <= sizes[name] for part in sent for name, one in part.items())
    for part in sent:
        assert (
            10 <= sum(one > 0 for one in part.values()) <= 12
        )  # a shard may belong to both, or to a group's other half


def machine(rank: int, port: int, server: Nginx, folder: Path, more: list[str]) -> subprocess.Popen[str]:
    """The only process of one of two machines."""
    world = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {name: str(value) for name, value in world.items()}
    arguments = remote_flags(f"{server.url}/?machine={rank}", folder / "run", *more, cache=folder / f"cache{rank}")
    command = [sys.executable, "train/pretrain.py", *arguments]
    both = subprocess.STDOUT
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=both, text=True)
