"""Three hosts, each a network namespace behind a bridge: one is lost, no sample and no byte is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.dataset.format import DATASET_FILE
from pipeline.sampling.sampler import batch_ids
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from tests.faults.test_elastic import QUICK
from tests.helpers.photos import write_photo_folder
from tests.helpers.servers import BUCKET, s3_client, s3_environment, s3_server
from tests.train.test_pretrain import CPU, ROOT, losses, run_here
from train.storage.run_folder import SUMMARY_FILE, read_lines

EPOCHS, PATIENCE_S = 20, 300
NETWORK = f"10.{os.getpid() % 200 + 20}.77"


def ip(words: str) -> bool:
    return subprocess.run(["ip", *words.split()], capture_output=True, check=False).returncode == 0


class Host:
    """A namespace with an address of its own, and what runs in it."""

    def __init__(self, number: int) -> None:
        self.address, self.name = f"{NETWORK}.{number}", f"sst{os.getpid()}-{number}"
        self.temporary = Path(tempfile.mkdtemp(prefix="sst"))  # its path is short: Ray puts sockets there
        self.agent: subprocess.Popen[bytes] | None = None
        self.log = Path()

    def made(self) -> bool:
        inside, outside = f"in{os.getpid() % 99999}-{self.name[-1]}", f"out{os.getpid() % 99999}-{self.name[-1]}"
        return all(
            map(
                ip,
                (
                    f"netns add {self.name}",
                    f"link add {outside} type veth peer name {inside}",
                    f"link set {inside} netns {self.name}",
                    f"link set {outside} master {BRIDGE} up",
                    f"-n {self.name} addr add {self.address}/24 dev {inside}",
                    f"-n {self.name} link set {inside} name eth0",
                    f"-n {self.name} link set eth0 up",
                    f"-n {self.name} link set lo up",
                    f"-n {self.name} route add default via {NETWORK}.254",  # by which Ray finds its own address
                ),
            )
        )

    def start(self, folder: Path, environment: dict[str, str], arguments: list[str]) -> None:
        """torchrun of this host; the first one is the meeting point."""
        meets = [f"--rdzv-endpoint={NETWORK}.1:29400", f"--local-addr={self.address}", "--rdzv-backend=c10d"]
        meets += ["--rdzv-id=7", f"--rdzv-conf=is_host={int(self.address.endswith('.1'))},{QUICK}"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:3", "--nproc-per-node=1", *meets]
        command = [*launcher, "--max-restarts=3", "train/pretrain.py", *arguments]
        environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", **environment}
        self.agent = self.run(folder, environment, command)

    def start_ray(self, folder: Path, environment: dict[str, str], *more: str) -> None:
        """A node of a Ray cluster; with ``--head`` its first one."""
        node = [str(Path(sys.executable).with_name("ray")), "start", "--block", f"--node-ip-address={self.address}"]
        node += ["--temp-dir", str(self.temporary)]
        self.agent = self.run(folder, environment, [*node, *more])

    def wait_for(self, text: str, deadline: float) -> None:
        """Until ``text`` is in ``log``."""
        assert self.agent is not None
        while text not in self.log.read_text():
            assert self.agent.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def run(self, folder: Path, environment: dict[str, str], command: list[str]) -> subprocess.Popen[bytes]:
        """A command in the namespace; what it prints is added to ``log``."""
        self.log = folder / f"{self.name}.log"
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=log,
            )

    def cut_off(self) -> None:
        """Take the network from it; its processes go on."""
        assert ip(f"-n {self.name} link set eth0 down")

    def lose(self) -> None:
        """Kill all that runs in the namespace."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False).stdout
        for pid in map(int, pids.split()):
            os.kill(pid, signal.SIGKILL)
        if self.agent is not None:
            self.agent.wait()


RAY_VARIABLES = {
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # the user may have a token, which `ray start --head` takes, and workers do not
    "RAY_AUTH_TOKEN": "8b1f" * 16,
    # A node that is cut off counts as dead after 13 s, and a call to it after 15 s: by default 1 and 7 minutes
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
    "no_proxy": ",".join(f"{NETWORK}.{number}" for number in (1, 2, 3)),  # Ray's gRPC follows http_proxy
}
BRIDGE = f"sstbr{os.getpid()}"[:15]


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    made = [Host(number) for number in (1, 2, 3)]
    try:
        ready = ip(f"link add {BRIDGE} type bridge") and ip(f"addr add {NETWORK}.254/24 dev {BRIDGE}")
        if not (ready and ip(f"link set {BRIDGE} up") and all(host.made() for host in made)):
            pytest.skip("needs the right to make network namespaces, and ip of iproute2")
        yield made
    finally:
        for host in made:
            host.lose()
            ip(f"netns del {host.name}")
            shutil.rmtree(host.temporary)
        ip(f"link del {BRIDGE}")


@pytest.mark.faults
@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="needs root on Linux")
def test_a_host_is_lost_and_no_sample(
    hosts: list[Host], photo_dataset_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--epochs", str(EPOCHS), "--global-batch", "12", "--knn-every", "0", *CPU]
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    with s3_server(photo_dataset_path, address=f"{NETWORK}.254") as port:
        environment = s3_environment(port, f"{NETWORK}.254")
        data = ["--data", "s3://images/photos", "--run-dir", str(run_dir), "--resume", "--checkpoint-every", "8steps"]
        for host in hosts:
            caches = ["--cache-dir", str(tmp_path / host.name)]
            host.start(tmp_path, environment, [*data, *caches, *more])
        deadline = time.monotonic() + PATIENCE_S
        while len(read_lines(run_dir / "metrics.jsonl")) < 10:
            assert time.monotonic() < deadline, "".join(host.log.read_text() for host in hosts)
            time.sleep(0.05)
        hosts[2].lose()
        for host in hosts[:2]:
            assert host.agent is not None
            assert host.agent.wait(timeout=PATIENCE_S) == 0, host.log.read_text()
    said = "".join(host.log.read_text() for host in hosts)
    assert "= 3 ranks x 4" in said
    assert "going on after step" in said
    assert (run_dir / SUMMARY_FILE).exists()
    parts: dict[int, list[int]] = {}
    for rank in range(3):
        for line in read_lines(run_dir / f"samples-rank{rank}.jsonl"):
            parts.setdefault(line["step"], []).extend(line["ids"])
    expected = [batch_ids(48, 0, step // 4, step % 4, 12).tolist() for step in range(4 * EPOCHS)]
    assert [parts[step + 1] for step in range(4 * EPOCHS)] == expected
    assert run_here(monkeypatch, ["--data", str(photo_dataset_path), "--run-dir", str(alone), *more]) == 0
    there, here = losses(run_dir), losses(alone)
    assert list(there) == list(here)
    for step in there:
        assert there[step] == pytest.approx(here[step], abs=1e-4 if step <= 8 else 2e-2)


@pytest.mark.faults
@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="needs root on Linux")
@pytest.mark.parametrize("fault", ["killed", "cut off"])
def test_a_node_of_a_ray_cluster_is_lost_and_no_byte(hosts: list[Host], tmp_path: Path, fault: str) -> None:
    pytest.importorskip("ray")
    head, *workers = hosts
    photos = write_photo_folder(tmp_path / "photos", per_class=50)
    make_dataset(str(photos), tmp_path / "local" / "photos", ShardingOptions(samples_per_shard=5), quiet=True)
    with s3_server(photos, address=f"{NETWORK}.254") as port:
        variables = {**s3_environment(port, f"{NETWORK}.254"), **RAY_VARIABLES}
        client = s3_client(port, f"{NETWORK}.254")

        def keys(under: str = "") -> list[str]:
            found = client.list_objects_v2(Bucket=BUCKET, Prefix=f"out/photos/{under}").get("Contents", [])
            return [entry["Key"].removeprefix("out/photos/") for entry in found]

        deadline = time.monotonic() + PATIENCE_S
        head.start_ray(tmp_path, variables, "--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false")
        head.wait_for("Ray runtime started", deadline)
        for worker in workers:
            worker.start_ray(tmp_path, variables, f"--address={head.address}:6379", "--num-cpus=1")
        for worker in workers:
            worker.wait_for("Ray runtime started", deadline)
        flags = ["--samples-per-shard", "5", "--engine", "ray", "--ray-address", f"{head.address}:6379"]
        source, out = f"s3://{BUCKET}/photos", f"s3://{BUCKET}/out/photos"
        command = [sys.executable, "tools/make_shards.py", source, out, *flags]
        assert head.run(tmp_path, {**variables, "RAY_AUTH_MODE": "disabled"}, command).wait(timeout=PATIENCE_S) == 2
        assert "the Ray cluster asks for its token: set RAY_AUTH_MODE=token" in head.log.read_text()
        call = head.run(tmp_path, variables, command)
        while len([key for key in keys(".partial/done/") if key.endswith(".json")]) < 5:
            assert call.poll() is None, head.log.read_text()
            assert time.monotonic() < deadline, head.log.read_text()
            time.sleep(0.05)
        if fault == "killed":
            workers[1].lose()
        else:
            workers[1].cut_off()
        assert DATASET_FILE not in keys()  # it was lost in the middle
        assert call.wait(timeout=PATIENCE_S) == 0, head.log.read_text()
        made = {key: client.get_object(Bucket=BUCKET, Key=f"out/photos/{key}")["Body"].read() for key in keys()}
    assert "its task is given to another worker" in head.log.read_text()
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "local" / "photos").iterdir()}
