"""torchrun --nnodes 1:2: a machine that goes, and one that comes, cost the steps since the last checkpoint at most."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.sampling.sampler import batch_ids
from tests.faults.test_faults import flags
from tests.train.test_pretrain import ROOT
from train.storage.run_folder import read_lines

ENOUGH = ["--epochs", "100000", "--knn-every", "0", "--resume"]
QUICK = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"  # s; so that a lost machine is missed soon
PATIENCE_S = 180


class Machines:
    """torchrun's agents, each in the part of a machine."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        self._folder, self._arguments = folder, arguments
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            self._port = probe.getsockname()[1]

    def start(self, name: str, *, meeting_point: bool) -> None:
        rdzv = [
            "--rdzv-backend=c10d",
            "--rdzv-id=7",
            f"--rdzv-endpoint=localhost:{self._port}",
            "--local-addr=localhost",
        ]
        rdzv += [f"--rdzv-conf=is_host={int(meeting_point)},{QUICK}"]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", *rdzv]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(self._folder / name, "ab") as log:
            self.agents[name] = subprocess.Popen(
                [*launcher, "--max-restarts=3", "train/pretrain.py", *self._arguments],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def said(self) -> str:
        return "".join((self._folder / name).read_text() for name in self.agents)

    def lose(self, name: str) -> None:
        """The machine goes with all that runs on it; the agent's workers are in sessions of their own."""
        agent = self.agents[name]
        children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        for pid in (agent.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        agent.wait()

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.2)


@pytest.fixture
def machines(photo_dataset_path: Path, tmp_path: Path) -> Iterator[Machines]:
    made = Machines(tmp_path, flags(photo_dataset_path, tmp_path / "run", *ENOUGH))
    yield made
    for name, agent in made.agents.items():
        if agent.poll() is None:
            made.lose(name)


@pytest.mark.faults
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc for the processes of an agent")
def test_a_machine_goes_and_another_comes(machines: Machines, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def steps() -> int:
        return len(read_lines(run_dir / "metrics.jsonl"))

    def starts(ranks: int) -> int:
        return len(re.findall(rf"= {ranks} (?:ranks|process)", machines.said()))

    machines.start("stays", meeting_point=True)
    machines.start("goes", meeting_point=False)
    machines.wait_for(lambda: starts(2) == 1 and steps() >= 9)
    alone = starts(1)
    machines.lose("goes")
    machines.wait_for(lambda: starts(1) > alone)
    lost_at = steps()
    machines.wait_for(lambda: steps() >= lost_at + 5)
    machines.start("comes", meeting_point=False)
    machines.wait_for(lambda: starts(2) == 2)
    came_at = steps()
    machines.wait_for(lambda: steps() >= came_at + 5)
    for name in ("stays", "comes"):
        machines.agents[name].send_signal(signal.SIGTERM)
    for name in ("stays", "comes"):
        machines.agents[name].wait(timeout=PATIENCE_S)

    assert len(re.findall("going on after step", machines.said())) >= 2
    assert len(re.findall("stopped by SIGTERM.* after step", machines.said())) >= 2  # the join, and the end
    lines = read_lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    parts: dict[int, list[int]] = {}
    for rank in (0, 1):
        for line in read_lines(run_dir / f"samples-rank{rank}.jsonl"):
            parts.setdefault(line["step"], []).extend(line["ids"])
    expected = [batch_ids(48, 0, step // 4, step % 4, 12).tolist() for step in range(len(lines))]
    assert [parts[step] for step in range(1, len(lines) + 1)] == expected
