"""Three hosts, each a network namespace behind a bridge: S3 is read by all, one host is lost, no sample is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.sampling.sampler import batch_ids
from tests.faults.test_elastic import QUICK
from tests.helpers.servers import s3_environment, s3_server
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
                ),
            )
        )

    def start(self, folder: Path, environment: dict[str, str], arguments: list[str]) -> None:
        """torchrun of this host; the first one is the meeting point."""
        meets = [f"--rdzv-endpoint={NETWORK}.1:29400", f"--local-addr={self.address}", "--rdzv-backend=c10d"]
        meets += ["--rdzv-id=7", f"--rdzv-conf=is_host={int(self.address.endswith('.1'))},{QUICK}"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:3", "--nproc-per-node=1", *meets]
        self.log = folder / f"{self.name}.log"
        with open(self.log, "ab") as log:
            self.agent = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *launcher, "--max-restarts=3", "train/pretrain.py", *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", **environment},
                stdout=log,
                stderr=log,
            )

    def lose(self) -> None:
        """Kill all that runs in the namespace."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False).stdout
        for pid in map(int, pids.split()):
            os.kill(pid, signal.SIGKILL)
        if self.agent is not None:
            self.agent.wait()


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
