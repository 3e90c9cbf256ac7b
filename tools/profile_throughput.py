"""Measure the stages of training, from reading bytes to trained steps, and name what limits it and what to change.

    python tools/profile_throughput.py --data DIR
    python tools/profile_throughput.py --data synthetic --json stages.json --plot stages.png
    python tools/profile_throughput.py --data synthetic --backbone resnet_tiny --image-size 32 --batch 64     (a CPU)
    python tools/profile_throughput.py --data DIR --tune --budget 10

Each stage runs alone, in several rounds over all stages after a warm-up; reported are median and extremes in source
images per second. --data synthetic draws JPEGs of ImageNet's size and density, so ImageNet is not needed. --tune
searches for the loader's fastest settings instead and prints the flags for pretrain.py.
Exit codes: 0 done; 2 a user's mistake.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import re
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import tyro

from pipeline.backends.select import choose_backend
from pipeline.common.errors import exit_on_user_error
from pipeline.common.files import check_writable
from pipeline.common.mixed_data import gather
from pipeline.common.output import write_raw
from tools.common.gpu_monitor import GpuMonitor, busy_with_others
from tools.common.measuring import describe_machine, write_results
from tools.common.plot_style import save_png
from tools.throughput.report import StageResult, as_json, describe, draw_stages, judge, table
from tools.throughput.stages import Bench, Stage, StageName, make_stages
from tools.throughput.timing import StageRunner, Trial
from tools.throughput.tune import tune
from tools.throughput.workload import STAGES, ProfileConfig, build, open_workload, setting_of, subtitle
from train.distributed.process_group import distributed
from train.engine.run import Run

TRACE_STEPS = 3


def main() -> None:
    """The command."""
    words = [re.sub("^--rungs(?==|$)", "--stages", word) for word in sys.argv[1:]]  # the flag's former name
    config = tyro.cli(ProfileConfig, args=gather(words), description=__doc__)
    for flag, path in (("--json", config.json), ("--plot", config.plot), ("--trace", config.trace)):
        if path is not None:
            check_writable(flag, path)
    with distributed(config.device) as dist, open_workload(config) as dataset:
        warning = busy_with_others(dist.device)
        if warning is not None:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        print(describe_machine(), flush=True)
        bench, run = build(config, dataset, dist)
        if config.tune:
            tune(bench, run, budget_s=60 * config.budget)
        else:
            profile(config, bench, run)


def profile(config: ProfileConfig, bench: Bench, run: Run) -> None:
    """Time the stages, print the verdict, and write the files that were asked for."""
    every = make_stages(bench, run)
    stages = {name: every[name] for name in STAGES if name in config.stages}
    print(
        f"{config.repeats} trials of {config.seconds:g} s, batches of {bench.batch}, {bench.threads} loader threads, "
        f"back end {choose_backend(bench.loader.backend)[0]}; median (slowest .. fastest trial)",
        flush=True,
    )
    trials = time_stages(stages, bench, config.seconds, config.repeats)
    results = {name: StageResult.of(of) for name, of in trials.items()}
    verdict = judge(results, trials, setting_of(bench, run))
    print(table(results))
    print(describe(verdict))
    if config.json is not None:
        write_results(config.json, {"config": _plain(config), **as_json(results, verdict)})
        print(f"numbers: {config.json}")
    if config.plot is not None:
        save_png(draw_stages(results, verdict, subtitle(bench, run)), config.plot, dpi=130)
        print(f"plot: {config.plot}")
    if config.trace is not None:
        write_trace(every["end_to_end"], bench.device, config.trace)
        print(f"trace: {config.trace} (open it in https://ui.perfetto.dev)")


def time_stages(stages: dict[StageName, Stage], bench: Bench, seconds: float, repeats: int) -> dict[str, list[Trial]]:
    """Run the trials; progress goes to stderr where that is a terminal."""
    done = 0

    def show(name: str, trial: Trial) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            text = f"trial {done} of {repeats * len(stages)}: {name} {trial.img_per_s:,.0f} images/s"
            write_raw(sys.stderr, f"\r\x1b[K{text}" + ("" if done < repeats * len(stages) else "\r\x1b[K"))

    with GpuMonitor(bench.device) as monitor:
        runner = StageRunner(seconds, monitor, bench.tidy)
        return runner.run({str(name): stage for name, stage in stages.items()}, repeats, show)


def write_trace(stage: Stage, device: torch.device, path: Path) -> None:
    """Record some end-to-end steps with torch.profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with stage.open() as advance:
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
