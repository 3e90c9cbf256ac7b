"""The training loop: steps, and what happens between two of them."""

from __future__ import annotations

import os
from collections.abc import Iterator

from model.backbone import find_backbone
from pipeline.loader.loader import ViewBatch
from pipeline.loader.prefetch_queue import StarvedError
from train.distributed.collectives import FlagConsensus, on_rank0, print0, share_buffers
from train.distributed.process_group import SharedError
from train.distributed.stop_signals import EXIT_PREEMPTED, StopRequest
from train.engine.run import Run, check_lock, finish_checkpoint, save, wait_for_checkpoint
from train.engine.step import train_step
from train.evaluation.features import Abandoned
from train.monitoring.reporter import BadRow, Reporter
from train.optimization.precision import diagnosis
from train.storage.checkpoints import CHECKPOINTS, newest_checkpoint
from train.storage.encoder_files import InputSpec
from train.storage.handover import hand_over


def loop(run: Run, batches: Iterator[ViewBatch], reporter: Reporter, stop: StopRequest) -> bool:
    """Train to the last step: True; or until a stop is requested: False. A collective.

    Between two steps: kNN accuracy, metrics, checkpoint, signals.
    """
    plan, consensus = run.plan, FlagConsensus(run.dist)
    run.model.train()
    while True:
        if run.knn and knn_is_due(run) and not reporter.has_knn(run.step):
            try:
                with reporter.paused():
                    share_buffers(run.dist, run.model)
                    backbone = run.model.backbone
                    top1 = {name: knn.evaluate(backbone, lambda: bool(stop)) for name, knn in run.knn.items()}
            except Abandoned:
                return stop_with_checkpoint(run, stop)
            reporter.knn(run.step // plan.steps_per_epoch, run.step, top1)
        if run.step >= plan.stop_step:
            break
        try:
            result = train_step(run, batches)
        except StarvedError:
            return stop_without_images(run, stop)
        run.step += 1
        reporter.step(run.step, result)
        stop_if_too_many_steps_were_bad(run, reporter.bad_row)
        stop_if_collapsed(run, reporter.collapse)
        stopping, minutes_over, write_failed, lock_lost = consensus.any_rank(
            bool(stop), run.timer.minutes_over(), run.writer.has_failed(), run.lock is not None and run.lock.is_lost
        )
        if write_failed:
            wait_for_checkpoint(run)  # raises the error
        if lock_lost:
            check_lock(run)  # raises the error
        if stopping:
            return stop_with_checkpoint(run, stop)
        if minutes_over or run.timer.is_due_at(run.step, plan.steps_per_epoch):
            with reporter.paused():
                save(run)
    checkpoint = finish_checkpoint(run)
    print0(run.dist, on_rank0(run.dist, lambda: leave_encoder(run)))
    on_rank0(run.dist, lambda: reporter.summary(run.step, checkpoint))
    return True


def leave_encoder(run: Run) -> str:
    """Write the finished encoder for other programs; returns how to load it. On rank 0 alone."""
    config, views = run.config, run.config.views
    pixels = InputSpec(views.image_size, views.mean, views.std)
    stem = config.model.stem
    own = find_backbone(config.model.backbone).default_stem
    return hand_over(
        config.run_dir, run.model.backbone, config.model.backbone, own if stem == "default" else stem, pixels
    )


def stop_with_checkpoint(run: Run, stop: StopRequest) -> bool:
    """Stop between two steps: always False. An interrupted kNN evaluation is repeated after --resume. A collective."""
    finish_checkpoint(run)
    print0(run.dist, f"stopped by {stop.signal_name or 'a signal'} after step {run.step:,}; go on with --resume")
    return False


def stop_without_images(run: Run, stop: StopRequest) -> bool:
    """Stop in a step whose images do not come.

    If the step has begun, here or perhaps on other ranks, its state cannot be saved: the last checkpoint stays.
    """
    if run.dist.world_size == 1 and not run.midway:
        return stop_with_checkpoint(run, stop)
    run.writer.wait()
    words = f"stopped by {stop.signal_name} in step {run.step + 1:,}, whose images do not come (rank {run.dist.rank})"
    print(f"{words}; go on with --resume from the last checkpoint", flush=True)
    os._exit(EXIT_PREEMPTED)  # other ranks may be in any collective: none can be started


def knn_is_due(run: Run) -> bool:
    """Before the first step, at every n-th epoch's end, and at the end of the run."""
    epoch, rest = divmod(run.step, run.plan.steps_per_epoch)
    return rest == 0 and (epoch % run.config.knn.every == 0 or run.step == run.plan.total_steps)


def stop_if_collapsed(run: Run, collapse: str | None) -> None:
    """Raise SharedError, on every rank alike, if the encoder has collapsed and --on-collapse is stop."""
    if collapse is not None and run.config.on_collapse == "stop":
        wait_for_checkpoint(run)
        newest = newest_checkpoint(run.config.run_dir / CHECKPOINTS)
        rest = f"Stopped (--on-collapse stop); newest checkpoint: {newest.name if newest else 'none so far'}"
        raise SharedError(f"{collapse}\n{rest}", run.dist.is_main)


def stop_if_too_many_steps_were_bad(run: Run, newest: BadRow) -> None:
    """Raise SharedError, on every rank alike, if --max-bad-steps in a row were skipped."""
    limit = run.config.max_bad_steps
    if newest.steps >= limit:
        wait_for_checkpoint(run)
        checkpoint = newest_checkpoint(run.config.run_dir / CHECKPOINTS)
        name = checkpoint.name if checkpoint else "none so far"
        text = diagnosis(newest.steps, limit, newest.until_step, newest.lr, run.precision.name, name)
        raise SharedError(text, run.dist.is_main)
