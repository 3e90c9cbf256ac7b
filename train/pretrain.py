"""Pretrain an encoder with SimSiam on a dataset that tools/make_shards.py wrote. Chen & He 2020, algorithm 1.

    torchrun --standalone --nproc-per-node=8 train/pretrain.py --data DIR --run-dir DIR
    python train/pretrain.py --data DIR --run-dir DIR --backbone resnet_tiny --image-size 32     (one process)

Owns the order of things: parse, build, resume, loop. The run folder holds config.json, plan.json, metrics.jsonl,
tensorboard/, checkpoints/, bad_samples.jsonl if there are any and, at the end, summary.json.
Exit codes: 0 done; 2 a user's mistake, a full disk, a collapse with --on-collapse stop; 75 stopped by a signal, go on
with --resume; 70 no rank has gone on for --hang-timeout; 1 anything else.
"""

from __future__ import annotations

import train.openmp  # noqa: F401  # before torch

# isort: split
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from model.simsiam import SimSiamOutput, simsiam_loss, z_std
from pipeline.errors import exit_on_user_error
from pipeline.feeder import StarvedError
from pipeline.loader import Views, open_views
from pipeline.read_costs import ReadCosts
from pipeline.span import Span
from pipeline.stalls import Stalls
from train.agreement import Agreement
from train.bad_samples import BadSampleRecord
from train.build import prepare
from train.config import PretrainConfig, parse_config
from train.dist import Dist, distributed, on_main, say, share_buffers, told_once
from train.features import Abandoned
from train.hangs import hangs_watched
from train.knn import OnlineKnn
from train.optim import set_lr
from train.preemption import EXIT_PREEMPTED, StopRequest, stop_signals
from train.report import Reporter, StepResult
from train.run import (
    Run,
    check_run_dir,
    claim_run_dir,
    finish_checkpoint,
    open_knn,
    resume,
    save,
    stop_if_collapsed,
    stop_if_too_many_steps_were_bad,
    written,
)

COLLECTIVE_TIMEOUT = timedelta(days=1)  # of torch, which does not say who is to blame: --hang-timeout comes before


def main() -> None:
    """The script."""
    config = parse_config()
    with (
        told_once(),
        stop_signals() as stop,
        distributed(config.device, COLLECTIVE_TIMEOUT) as dist,
        hangs_watched(dist, config.hang_timeout, stop, config.longest_fetch_s),
    ):
        finished = pretrain(config, dist, stop)
    if not finished:
        sys.exit(EXIT_PREEMPTED)


def pretrain(config: PretrainConfig, dist: Dist, stop: StopRequest) -> bool:
    """Train to the end, or until a signal: then False. Raises UserError for mistakes."""
    run = prepare(config, dist)
    check_run_dir(run)
    if config.resume:
        resume(run)
    knn, costs, stalls = open_knn(run, lambda: bool(stop)), ReadCosts(len(run.dataset.shards)), Stalls()
    claim_run_dir(run)
    epoch, step = divmod(run.step, run.plan.steps_per_epoch)
    with (
        Reporter(dist, config, run.plan, run.step, stalls) as reporter,
        open_views(
            run.dataset,
            config.views,
            config.loader,
            Span(config.seed, config.global_batch, config.epochs, epoch, step, config.accumulate),
            dist,
            dtype=run.precision.view_dtype,
            order=config.order,
            on_bad_sample=BadSampleRecord(config.run_dir, run.dataset.num_samples, config.loader.max_bad_samples),
            pairs=config.model.pairs,
            read_costs=costs,
            give_up=stop.is_urgent,
            stalls=stalls,
        ) as batches,
        run.writer,
    ):
        stop.starting = False
        finished = loop(run, batches, reporter, knn, stop)
        reporter.say_what_cost_most(run.dataset, costs)
        return finished


def loop(run: Run, batches: Iterator[Views], reporter: Reporter, knn: OnlineKnn | None, stop: StopRequest) -> bool:
    """One turn is one optimizer step; between steps: kNN accuracy, checkpoint, a look at the signals."""
    plan, agreement = run.plan, Agreement(run.dist)
    run.model.train()
    while True:
        if knn is not None and knn_is_due(run) and not reporter.has_knn(run.step):
            try:
                with reporter.paused():
                    share_buffers(run.dist, run.model)
                    top1 = knn.evaluate(run.model.backbone)
            except Abandoned:
                return leave(run, stop)
            reporter.knn(run.step // plan.steps_per_epoch, run.step, top1)
        if run.step >= plan.stop_step:
            break
        try:
            result = train_step(run, batches)
        except StarvedError:
            return leave_starved(run, stop)
        run.step += 1
        reporter.step(run.step, result)
        if run.step % run.config.log_every == 0:
            stop_if_too_many_steps_were_bad(run, result.lr)
        stop_if_collapsed(run, reporter.collapse)
        stopping, timer_rang, write_failed = agreement.ask(bool(stop), run.checkpoints.rings(), run.writer.has_failed())
        if write_failed:
            written(run)  # raises what went wrong
        if stopping:
            return leave(run, stop)
        if timer_rang or run.checkpoints.is_due_at(run.step, plan.steps_per_epoch):
            with reporter.paused():
                save(run)
    checkpoint = finish_checkpoint(run)
    on_main(run.dist, lambda: reporter.summary(run.step, checkpoint))
    return True


def leave(run: Run, stop: StopRequest) -> bool:
    """Stop between two steps, with a checkpoint: always False. A kNN accuracy that was begun comes after --resume."""
    finish_checkpoint(run)
    say(run.dist, f"stopped by {stop.signal_name or 'a signal'} after step {run.step:,}; go on with --resume")
    return False


def leave_starved(run: Run, stop: StopRequest) -> bool:
    """Stop in a step whose pictures do not come. Had it begun, here or on other ranks, the last checkpoint stands."""
    if run.dist.world_size == 1 and not run.midway:
        return leave(run, stop)
    run.writer.wait()
    words = f"stopped by {stop.signal_name} in step {run.step + 1:,}, whose pictures do not come (rank {run.dist.rank})"
    print(f"{words}; go on with --resume from the last checkpoint", flush=True)
    os._exit(EXIT_PREEMPTED)  # the others may be anywhere: nothing can be agreed on any more


def train_step(run: Run, batches: Iterator[Views]) -> StepResult:
    """Forward and backward over the step's micro-batches, then one optimizer step.

    Nothing waits for the device, but for targets that live in the host's memory. A step whose gradients are not finite
    changes no weight and no statistic, and is counted.
    """
    config, scaler = run.config, run.precision.scaler
    lr = set_lr(run.optimizer, run.plan.schedule, run.step)
    run.optimizer.zero_grad(set_to_none=True)
    run.guard.remember()
    losses, stds, ids, wait_s = [], [], [], 0.0
    passes = config.accumulate * config.model.pairs
    for number in range(passes):
        run.dist.activity.work(f"step {run.step + 1}: waiting for the loader")
        views = next(batches)
        run.midway = True
        run.dist.activity.wait(f"step {run.step + 1}: forward, backward, averaging gradients over the ranks")
        with no_sync(run, last=number == passes - 1):
            with run.precision.autocast():
                out: SimSiamOutput = run.parallel(views.x1, views.x2)
                drawn = run.targets(run.step, out, views)
            loss = simsiam_loss(*drawn, config.model.similarity, config.model.symmetric)
            scaler.scale(loss / passes).backward()
        losses.append(loss.detach())
        stds.append((z_std(out.z1) + z_std(out.z2)) / 2)
        if views.pair == 0:
            ids.append(views.ids)
        wait_s += views.wait_s
    run.guard.step(scaler)
    run.midway = False
    run.dist.activity.work(f"step {run.step + 1}: between two steps")
    loss, std = torch.stack(losses).mean(), torch.stack(stds).mean()
    return StepResult(loss, std, out.z1.detach(), run.guard.skipped, lr, wait_s, np.concatenate(ids))


def no_sync(run: Run, last: bool) -> AbstractContextManager[object]:
    """Gradients travel between ranks once a step, with the last micro-batch."""
    called = getattr(run.parallel, "_orig_mod", run.parallel)  # torch.compile wraps it
    if isinstance(called, DistributedDataParallel) and not last:
        return called.no_sync()
    return nullcontext()


def knn_is_due(run: Run) -> bool:
    """Before the first step, at every n-th epoch's end, and at the end of the run."""
    epoch, rest = divmod(run.step, run.plan.steps_per_epoch)
    return rest == 0 and (epoch % run.config.knn.every == 0 or run.step == run.plan.total_steps)


if __name__ == "__main__":
    exit_on_user_error(main)
