"""Sharding on Ray against the local engine on the same cores: python benchmarks/ray_sharding.py DATASET

A Ray head with --workers CPUs is started on this machine. Then the images of DATASET, repeated under other names until
there are --images, are sharded by `--engine local --workers N` and by `--engine ray` in turn; both write the same
bytes. CPU seconds are those of all processes: of the command, of workers, and in both cases of the Ray head, whose use
while it is idle is given too. A control group counts them: run this as root, on Linux.
A run with a handful of images shows the start-up: for the local engine of its workers, for Ray the connection, the
question to each node and the start of workers.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from sharding import FEW, SHARDS_A_WORKER, write_folder

from pipeline.common.engine import EngineConfig
from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.files import check_writable
from pipeline.common.locations import InputPath, LocalPath
from pipeline.dataset.dataset import ShardSet
from pipeline.sharding.make_dataset import make_dataset
from pipeline.sharding.options import ShardingOptions
from pipeline.sources.image_file import Verify
from tools.common.measuring import Run, Spread, alternate, describe_machine, ratio, write_results

ENGINES = ("local", "ray")
START = ", start-up"
PATIENCE_S, SETTLE_S, IDLE_S = 120.0, 5.0, 10.0


@dataclass(frozen=True)
class Config:
    """Flags of ray_sharding.py."""

    data: Annotated[InputPath, tyro.conf.Positional]
    """Dataset folder whose images are sharded again."""
    images: int = 8000
    """Images in a run."""
    workers: int = 2
    """Worker processes of the local engine, and CPUs of Ray."""
    verify: Verify = "full"
    """Kind of verification."""
    repeats: int = 5
    """Runs of each after a warm-up."""
    place: LocalPath | None = None
    """Folder on the disk to measure (default: the system's temporary folder)."""
    json: LocalPath | None = None
    """Write the results to this JSON file."""


def main() -> None:
    """The command."""
    config = tyro.cli(Config, description=__doc__)
    if config.repeats < 3 or config.workers < 1 or config.images < SHARDS_A_WORKER * config.workers:
        raise UserError(f"--repeats must be at least 3, --workers 1, and --images {SHARDS_A_WORKER} for each worker")
    if config.json is not None:
        check_writable("--json", config.json)
    dataset = ShardSet.open(config.data)
    folder = Path(tempfile.mkdtemp(prefix="ray-sharding-", dir=config.place))
    try:
        size = write_folder(dataset, config.images, folder / "many")
        write_folder(dataset, FEW * config.workers, folder / "few")
        print(f"{describe_machine()}\n{config.images:,} images, {size / 1e6:,.0f} MB", flush=True)
        with counted() as cpu, ray_head(config.workers, folder) as address:
            engines = dict(zip(ENGINES, (EngineConfig(), EngineConfig("ray", address)), strict=True))
            works = {name: partial(shard, config, folder, "many", engine) for name, engine in engines.items()}
            works |= {name + START: partial(shard, config, folder, "few", engine) for name, engine in engines.items()}
            tidy = partial(shutil.rmtree, folder / "out", ignore_errors=True)
            time.sleep(SETTLE_S)
            before = cpu()
            time.sleep(IDLE_S)
            print(f"Ray, idle: {(cpu() - before) / IDLE_S:.3f} CPU s a second", flush=True)
            runs = alternate(works, config.repeats, tidy, cpu)
    finally:
        shutil.rmtree(folder)
    report(config.images, runs)
    if config.json is not None:
        write_results(config.json, {"images": config.images, "bytes": size, "runs": runs})


def shard(config: Config, folder: Path, name: str, engine: EngineConfig) -> None:
    """One run."""
    images = config.images if name == "many" else FEW * config.workers
    per_shard = math.ceil(images / (SHARDS_A_WORKER * config.workers))
    options = ShardingOptions(samples_per_shard=per_shard, workers=config.workers, verify=config.verify)
    make_dataset(str(folder / name), folder / "out", options, quiet=True, engine=engine)


@contextmanager
def ray_head(cpus: int, folder: Path) -> Iterator[str]:
    """Address of a Ray head with ``cpus``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # As the local engine's workers; by default, 15, Ray's give way to all else on the machine
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--num-cpus={cpus}"]
    ray += [f"--port={port}", f"--temp-dir={folder / 'ray'}", "--include-dashboard=false"]
    with open(folder / "ray.log", "wb") as log:
        head = subprocess.Popen(ray, stdout=log, stderr=log)
    try:
        end = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in (text := (folder / "ray.log").read_text()):
            if head.poll() is not None or time.monotonic() > end:
                raise UserError(f"Ray does not start here: {text[-2000:]}")
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait()


@contextmanager
def counted() -> Iterator[Callable[[], float]]:
    """CPU seconds so far of this process and all that it starts, also of those that nobody waits for.

    They are in a control group of their own: a Ray node does not add up the times of workers that have ended.
    """
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next((Path(place) for _, place, kind, *_ in mounts if kind == "cgroup2"), None)
    if root is None:
        raise UserError("no control groups (cgroup2) are mounted here, by which CPU seconds are counted")
    former = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    group = root / f"ray-sharding-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        raise UserError(f"{group} cannot be used ({error.strerror}): CPU seconds are counted as root only") from None
    try:
        yield lambda: int((group / "cpu.stat").read_text().split()[1]) / 1e6  # usage_usec
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (root / former.removeprefix("0::/") / "cgroup.procs").write_text(pid)
        group.rmdir()


def report(images: int, runs: dict[str, list[Run]]) -> None:
    """Print rates, start-up, and the ratio of the engines."""
    begun = {
        name: [Run(a.wall_s - b.wall_s, a.cpu_s - b.cpu_s) for a, b in zip(runs[name], runs[name + START], strict=True)]
        for name in ENGINES
    }
    for name in ENGINES:
        rates = [Spread.of([images / run.wall_s for run in of[name]]) for of in (runs, begun)]
        cpu = [Spread.of([1e3 * run.cpu_s / images for run in of[name]]) for of in (runs, begun)]
        print(f"{name}: {rates[0]} images/s, {cpu[0]} CPU ms an image")
        print(f"{name}, once started: {rates[1]} images/s, {cpu[1]} CPU ms an image")
        first = [Spread.of([getattr(run, of) for run in runs[name + START]]) for of in ("wall_s", "cpu_s")]
        print(f"{name}{START}: {first[0]} s, {first[1]} CPU s")
    for quantity, what in (("wall_s", "images/s"), ("cpu_s", "images for each CPU second")):
        whole, later = (ratio(of, "ray", "local", quantity) for of in (runs, begun))
        print(f"ray / local, {what}: {whole}; once started {later}")


if __name__ == "__main__":
    exit_on_user_error(main)
