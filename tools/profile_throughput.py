"""Measure the ladder of throughput, from bytes to trained steps, and say what limits training and what to change.

    python tools/profile_throughput.py --data DIR
    python tools/profile_throughput.py --data synthetic --json ladder.json --plot ladder.png
    python tools/profile_throughput.py --data synthetic --backbone resnet_tiny --image-size 32 --batch 64     (a CPU)
    python tools/profile_throughput.py --data DIR --tune --budget 10 --tuning-file loader-tuning.json

Every rung runs alone and in turn with the others, several times after a warm-up; medians and extremes are shown, in
source images per second. --data synthetic draws JPEGs of ImageNet's size and density, so no ImageNet is needed. --tune
searches the loader's settings instead and writes the file that pretrain.py --loader-tuning takes.
Exit codes: 0 done; 2 a user's mistake.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import tyro

from pipeline.backends.select import choose_backend
from pipeline.common.errors import UserError, exit_on_user_error
from pipeline.common.files import check_writable
from tools.common.gpu_monitor import GpuWatch, busy_with_others
from tools.common.measuring import describe_machine, write_results
from tools.throughput.report import RungResult, as_json, describe, draw_ladder, judge, table
from tools.throughput.stages import Bench, Rung, RungName, make_ladder
from tools.throughput.timing import Climber, Turn
from tools.throughput.tune import tune
from tools.throughput.workload import RUNGS, ProfileConfig, build, open_data, setting_of, subtitle
from train.distributed.process_group import distributed
from train.engine.run import Run

FEWEST_REPEATS = 3
TRACE_STEPS = 3


def main() -> None:
    """The command."""
    config = tyro.cli(ProfileConfig, description=__doc__)
    check(config)
    with distributed(config.device) as dist, open_data(config) as dataset:
        warning = busy_with_others(dist.device)
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        print(describe_machine(), flush=True)
        bench, run = build(config, dataset, dist)
        if config.tune:
            tune(
                bench,
                run,
                budget_s=60 * config.budget,
                with_batch=config.tune_batch,
                file=config.tuning_file,
            )
        else:
            profile(config, bench, run)


def check(config: ProfileConfig) -> None:
    """Raise UserError for what cannot be measured or written, before time is spent."""
    if config.repeats < FEWEST_REPEATS:
        raise UserError(f"--repeats {config.repeats}: a single run says little; take at least {FEWEST_REPEATS}")
    for flag, value in (
        ("--seconds", config.seconds),
        ("--budget", config.budget),
        ("--ranks-per-machine", config.ranks_per_machine),
    ):
        if value <= 0:
            raise UserError(f"{flag} {value}: it must be above 0")
    if config.batch is not None and config.batch < 2:
        raise UserError(f"--batch {config.batch}: batch norm needs at least 2")
    if not config.rungs:
        raise UserError(f"--rungs: name at least one of {', '.join(RUNGS)}")
    if config.plot is not None and config.plot.suffix.lower() != ".png":
        raise UserError(f"--plot {config.plot}: the plot is written as PNG; give a name that ends in .png")
    if config.trace is not None and "end_to_end" not in config.rungs:
        raise UserError("--trace records end-to-end steps: add end_to_end to --rungs")
    for flag, path in (
        ("--json", config.json),
        ("--plot", config.plot),
        ("--trace", config.trace),
        ("--tuning-file", config.tuning_file if config.tune else None),
    ):
        if path is not None:
            check_writable(flag, path)


def profile(config: ProfileConfig, bench: Bench, run: Run) -> None:
    """Climb the ladder, report, and write what was asked for."""
    every = make_ladder(bench, run)
    rungs = {name: every[name] for name in RUNGS if name in config.rungs}
    print(
        f"{config.repeats} turns of {config.seconds:g} s, batches of {bench.batch}, {bench.threads} loader threads, "
        f"back end {choose_backend(bench.loader.backend)[0]}; median (slowest .. fastest turn)",
        flush=True,
    )
    turns = climb(rungs, bench, config.seconds, config.repeats)
    results = {name: RungResult.of(of) for name, of in turns.items()}
    verdict = judge(results, turns, setting_of(bench, run))
    print(table(results))
    print(describe(verdict))
    if config.json is not None:
        write_results(config.json, {"config": _plain(config), **as_json(results, verdict)})
        print(f"numbers: {config.json}")
    if config.plot is not None:
        draw_ladder(results, verdict, subtitle(bench, run)).savefig(config.plot, dpi=130)
        print(f"plot: {config.plot}")
    if config.trace is not None:
        write_trace(every["end_to_end"], bench.device, config.trace)
        print(f"trace: {config.trace} (open it in https://ui.perfetto.dev)")


def climb(rungs: dict[RungName, Rung], bench: Bench, seconds: float, repeats: int) -> dict[str, list[Turn]]:
    """Take the turns; progress goes to stderr where that is a terminal."""
    done = 0

    def tell(name: str, turn: Turn) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            text = f"turn {done} of {repeats * len(rungs)}: {name} {turn.img_per_s:,.0f} images/s"
            print(f"\r\x1b[K{text}", end="" if done < repeats * len(rungs) else "\r\x1b[K", file=sys.stderr, flush=True)

    with GpuWatch(bench.device) as watch:
        climber = Climber(seconds, watch, bench.tidy)
        return climber.climb({str(name): rung for name, rung in rungs.items()}, repeats, tell)


def write_trace(rung: Rung, device: torch.device, path: Path) -> None:
    """Record some end-to-end steps with torch.profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with rung.open() as advance:
        advance(2)
        with torch.profiler.profile(activities=kinds) as profiler:
            advance(TRACE_STEPS)
    profiler.export_chrome_trace(str(path))


def _plain(config: ProfileConfig) -> dict[str, object]:
    return {
        name: value if isinstance(value, (int, float, dict)) else str(value) for name, value in asdict(config).items()
    }


if __name__ == "__main__":
    exit_on_user_error(main)
