"""Pretrain an encoder with SimSiam on a dataset that tools/make_shards.py wrote. Chen & He 2020, algorithm 1.

    torchrun --standalone --nproc-per-node=8 train/pretrain.py --data DIR --run-dir DIR
    python train/pretrain.py --data DIR --run-dir DIR --backbone resnet_tiny --image-size 32     (one process)

The order of things is parse, build, resume, loop. The run folder holds config.json, plan.json, metrics.jsonl,
tensorboard/, checkpoints/, bad_samples.jsonl if there are any and, at the end, summary.json.
Exit codes: 0 done; 2 a user's mistake, a full disk, a collapse with --on-collapse stop; 75 stopped by a signal, go on
with --resume; 70 no rank has gone on for --hang-timeout; 1 anything else.
"""

from __future__ import annotations

import train.early_signals
import train.openmp  # noqa: F401  # before torch

# isort: split
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.common.errors import exit_on_user_error
from pipeline.dataset.mixture import Mixture
from pipeline.loader.bad_samples import BAD_SAMPLES_FILE
from pipeline.loader.loader import open_views
from pipeline.loader.timing import Stalls
from pipeline.sampling.sampler import BatchSampler
from pipeline.sharding.index_cache import make_indexes
from train.config.recipes import config_of, parse_config, printed
from train.config.run_config import PretrainConfig
from train.distributed.collectives import print0
from train.distributed.process_group import DistContext, distributed, exit_once, found_by_every_rank, read_launch
from train.distributed.stop_signals import EXIT_PREEMPTED, StopRequest, stop_signals
from train.distributed.watchdog import hangs_watched
from train.engine.build import describe, prepare
from train.engine.dry_run import needs, too_little_disk
from train.engine.loop import loop
from train.engine.run import Run, check_run_dir, locked_run_dir, resume, write_run_files
from train.monitoring.reporter import Reporter

COLLECTIVE_TIMEOUT = timedelta(days=1)  # torch's, which does not name the rank at fault: --hang-timeout is earlier


def main() -> None:
    """Run the command."""
    launch = read_launch()
    with exit_once(), found_by_every_rank(launch):
        config = parse_config(prints=launch.is_main)
    if config.print_config:
        if launch.is_main:
            print(printed(config), end="")
        return
    if not train_here(config):
        sys.exit(EXIT_PREEMPTED)


def pretrain(data: str | Path | Sequence[str], run_dir: str | Path, **flags: Any) -> bool:
    """Train as the command does; ``flags`` are its flags as keywords: ``epochs=10, backbone="resnet18"``.

    ``data``: a dataset, or several with weights: ``["A", "B:0.3"]``.
    A flag with a dot is given by ``**{"dali.prefetch": 3}``. Under torchrun every process calls it. Returns False if a
    signal stopped the run, which ``resume=True`` continues. Raises UserError for mistakes.
    """
    return train_here(
        config_of(data=str(data) if isinstance(data, str | Path) else list(data), run_dir=str(run_dir), **flags)
    )


def train_here(config: PretrainConfig) -> bool:
    """Train in this process and those that torchrun started with it. Returns False if a signal stopped the run."""
    make_indexes(config.loader.cache, config.data, config.knn.data)  # before there are ranks, whose waits are limited
    with (
        exit_once(),
        stop_signals() as stop,
        distributed(config.device, COLLECTIVE_TIMEOUT, captures=config.cuda_graph) as dist,
        hangs_watched(dist, config.hang_timeout, stop, config.longest_fetch_s),
    ):
        return run_to_the_end(config, dist, stop)


def run_to_the_end(config: PretrainConfig, dist: DistContext, stop: StopRequest) -> bool:
    """Train to the end: True; or until a signal: False. Raises UserError for mistakes."""
    run = prepare(config, dist)
    check_run_dir(run)
    if config.dry_run:
        for line in (*describe(run), *needs(run)):
            print0(dist, line)
        return True
    with locked_run_dir(run):
        return train_run(run, stop)


def train_run(run: Run, stop: StopRequest) -> bool:
    """Resume, print the plan and train, in a run folder that is this run's alone. Returns as ``run_to_the_end``."""
    config, dist = run.config, run.dist
    if config.resume:
        resume(run)
    for line in (*describe(run), *too_little_disk(run)):
        print0(dist, line)
    write_run_files(run)
    stalls = Stalls()
    epoch, step = divmod(run.step, run.plan.steps_per_epoch)
    with (
        Reporter(
            dist,
            config,
            run.plan,
            run.step,
            stalls,
            run.model.collapse(run.plan.batch_shape()),
            run.dataset if isinstance(run.dataset, Mixture) else None,
        ) as reporter,
        open_views(
            run.dataset,
            config.views,
            config.loader,
            BatchSampler(config.seed, config.global_batch, config.epochs, epoch, step, config.accumulate),
            dist,
            dtype=run.precision.view_dtype,
            order=config.order,
            bad_samples_file=config.run_dir / BAD_SAMPLES_FILE,
            pairs=config.model.passes_per_batch,
            give_up=stop.is_urgent,
            stalls=stalls,
        ) as batches,
        run.writer,
    ):
        stop.starting = False
        finished = loop(run, batches, reporter, stop)
        reporter.print_waits()
        return finished


if __name__ == "__main__":
    exit_on_user_error(main)
