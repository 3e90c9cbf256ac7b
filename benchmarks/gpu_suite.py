"""Everything that is worth knowing on one GPU, in one command of at most nine and a half minutes.

    python benchmarks/gpu_suite.py DATASET --out DIR
    python benchmarks/gpu_suite.py DATASET --out DIR --toy          (a CPU, a minute: that all of it works)

DATASET should have some 20,000 samples, so that an epoch lasts. A small sample is made larger by unpacking it several
times over into an image folder, which need not be ImageNet's:

    for i in $(seq 20); do mkdir -p images/$i; tar xf sample.tar -C images/$i; done
    python tools/make_shards.py images DATASET --labels none --verify header

Each part runs in a process of its own with a time limit, so that a crash, a hang or a GPU in a bad state costs that
part alone; what it had measured by then is kept. The failures are listed, and the exit code is 1 if there was one.
DIR receives suite.json, suite.md, part-*.json and stages*.png.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from gpu_bench import Suite, toy_or_real
from gpu_parts import EVERY_PART, PARTS, Part
from gpu_report import markdown

from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.files import check_writable
from pipeline.common.locations import InputPath, LocalPath
from pipeline.dataset.dataset import ShardSet
from tools.common.measuring import describe_machine, machine


@dataclass(frozen=True)
class Config:
    """The suite."""

    data: Annotated[InputPath, tyro.conf.Positional]
    """Dataset folder; some 20,000 samples are enough."""
    out: LocalPath
    """Folder for the results; made if it is not there."""
    toy: bool = False
    """A tiny model and short trials on the CPU: the same code at toy size."""
    minutes: float = 9.2
    """Time for all parts; those at the end are cut short or left out when it is over."""
    parts: tuple[str, ...] = tuple(PARTS)
    """The parts to run, in this order."""
    isolate: bool = True
    """Run each part in a process of its own."""


def main() -> None:
    """The command."""
    if sys.argv[1:2] == [ONE_PART]:
        name, data, out, toy, seconds = sys.argv[2:]
        run_part(name, Path(data), Path(out), toy == "True", float(seconds))
        return
    config = tyro.cli(Config, description=__doc__)
    check(config)
    print(describe_machine(), flush=True)
    end_s = time.perf_counter() + 60 * config.minutes
    failures: dict[str, str] = {}
    for name in config.parts:
        start_s = time.perf_counter()
        seconds = min(EVERY_PART[name].seconds, end_s - start_s)
        failure = start_part(config, name, seconds) if seconds > FEWEST_SECONDS else "not begun: the time is over"
        if failure is not None:
            failures[name] = failure
        took_s = time.perf_counter() - start_s
        print(f"{name}: {'done' if failure is None else failure} ({took_s:.0f} s)", flush=True)
        write_results(config, failures)
    if failures:
        print(
            f"{len(failures)} parts failed; what the others measured is in {config.out / 'suite.md'}", file=sys.stderr
        )
        sys.exit(1)
    print(config.out / "suite.md")


ONE_PART = "one-part"  # first word of the command line of a process that runs one part
FEWEST_SECONDS = 15.0  # in which a part can begin and measure something
GRACE_S = 8.0  # beyond its time, for a part to end by itself


def check(config: Config) -> None:
    """Raise UserError for what cannot be run."""
    if unknown := [name for name in config.parts if name not in EVERY_PART]:
        raise UserError(f"--parts {' '.join(unknown)}: there are {', '.join(EVERY_PART)}")
    samples = ShardSet.open(config.data).num_samples
    fewest = max(toy_or_real(config.toy).batches)
    if samples < fewest:
        raise UserError(f"{config.data} has {samples} samples, too few to measure batches of {fewest}: see --help")
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {config.out} cannot be made: {error.strerror}; choose another folder") from error
    check_writable("--out", config.out / "suite.json")
    for old in config.out.glob("part-*.json"):
        old.unlink()


def start_part(config: Config, name: str, seconds: float) -> str | None:
    """Run one part; gives what went wrong."""
    words = [name, str(config.data), str(config.out), str(config.toy), str(seconds)]
    if not config.isolate:
        return guarded(lambda: run_part(words[0], Path(words[1]), Path(words[2]), config.toy, seconds))
    command = [sys.executable, __file__, ONE_PART, *words]
    with open(config.out / f"part-{name}.log", "w", encoding="utf-8") as log:
        try:
            ended = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds + GRACE_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds + GRACE_S:.0f} s; what it had measured by then is kept"
    if ended.returncode == 0:
        return None
    lines = (config.out / f"part-{name}.log").read_text(encoding="utf-8").strip().splitlines()
    return f"exit code {ended.returncode}: {lines[-1] if lines else 'no output'}"


def guarded(work: Callable[[], None]) -> str | None:
    """What went wrong, if something did: one part's fault must not end the suite."""
    try:
        work()
    except Exception as error:  # noqa: BLE001  reported, and the suite exits with code 1
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def run_part(name: str, data: Path, out: Path, toy: bool, seconds: float) -> None:
    """One part in this process. Raises RuntimeError at the end if some of its measurements failed."""
    part: Part = EVERY_PART[name]
    with Suite.open(data, out, toy, name, time.perf_counter() + seconds) as suite:
        part.work(suite)
    if suite.failures:
        raise RuntimeError("; ".join(suite.failures))


def write_results(config: Config, failures: dict[str, str]) -> None:
    """suite.json and suite.md, of what there is so far."""
    results: dict[str, Any] = {}
    for name in config.parts:
        path = config.out / f"part-{name}.json"
        if path.exists():
            results[name] = json.loads(path.read_text(encoding="utf-8"))
    whole = {"machine": machine(), "toy": config.toy, "failures": failures, "parts": results}
    (config.out / "suite.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (config.out / "suite.md").write_text(markdown(whole), encoding="utf-8")


if __name__ == "__main__":
    exit_on_user_error(main)
