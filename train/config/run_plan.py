"""The run's plan: everything that follows from the configuration, the dataset and the number of processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from model.methods.base import BatchShape
from pipeline.common.errors import UserError, check_divisible
from pipeline.sampling.sampler import steps_per_epoch
from train.config.run_config import PretrainConfig
from train.optimization.optimizer import Schedule, make_schedule


@dataclass(frozen=True)
class RunPlan:
    """Computed once, printed before the first step, written to plan.json."""

    num_samples: int  # of an epoch
    world_size: int
    global_batch: int  # source images of an optimizer step
    rank_batch: int  # of them on one rank
    micro_batch: int  # of them in one forward pass
    accumulate: int  # forward passes of an optimizer step
    sync_bn: bool  # whether batch norm takes its statistics over all ranks
    bn_batch: int  # source images over which batch norm takes its statistics
    epochs: int
    steps_per_epoch: int
    total_steps: int
    stop_step: int  # total_steps, or --max-steps if that comes first
    schedule: Schedule

    def describe(self) -> str:
        dropped = self.num_samples - self.steps_per_epoch * self.global_batch
        batch = f"{self.world_size} ranks x {self.rank_batch}" if self.world_size > 1 else "1 process"
        if self.accumulate > 1:
            batch += f" in {self.accumulate} passes of {self.micro_batch}"
        lines = [
            f"samples      {self.num_samples:,} ({dropped:,} left out of each epoch, others each time)",
            f"batch        {self.global_batch:,} = {batch}",
            f"steps        {self.total_steps:,} = {self.epochs:,} epochs x {self.steps_per_epoch:,}",
            f"lr           {self.schedule.peak_lr:g}; {self.schedule.warmup_steps:,} steps of warm-up, then cosine",
        ]
        if self.stop_step < self.total_steps:
            lines.append(f"stop         after step {self.stop_step:,} (--max-steps)")
        return "\n".join("  " + line for line in lines)

    def batch_shape(self, memory_bytes: int | None = None) -> BatchShape:
        """How batches are divided, for the method."""
        return BatchShape(self.global_batch, self.micro_batch, self.world_size, self.sync_bn, memory_bytes)

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def make_plan(config: PretrainConfig, num_samples: int, world_size: int, memory_bytes: int | None = None) -> RunPlan:
    """Compute the plan. Raises UserError for numbers that do not fit together.

    ``memory_bytes``: of a rank's device, for methods with large tables.
    """
    parts = world_size * config.accumulate
    by = f"{world_size} processes" + (f" x --accumulate {config.accumulate}" if config.accumulate > 1 else "")
    check_divisible(config.global_batch, parts, by)
    if num_samples < config.global_batch:
        raise UserError(
            f"the dataset has {num_samples} samples, fewer than one --global-batch of {config.global_batch}: "
            f"lower it to at most {num_samples // parts * parts or parts}, or add images"
        )
    micro_batch = config.global_batch // parts
    if micro_batch < 2:
        raise UserError(
            f"--global-batch {config.global_batch} leaves one image per forward pass, and batch norm needs two: "
            f"take at least {2 * parts}"
        )
    steps = steps_per_epoch(num_samples, config.global_batch)
    schedule = make_schedule(config.optim, config.global_batch, config.epochs, steps)
    if schedule.warmup_steps >= schedule.total_steps:
        raise UserError(f"--warmup-epochs {config.optim.warmup_epochs} is not shorter than --epochs {config.epochs}")
    total = config.epochs * steps
    plan = RunPlan(
        num_samples=num_samples,
        world_size=world_size,
        global_batch=config.global_batch,
        rank_batch=config.global_batch // world_size,
        micro_batch=micro_batch,
        accumulate=config.accumulate,
        sync_bn=config.sync_bn,
        bn_batch=micro_batch * (world_size if config.sync_bn else 1),
        epochs=config.epochs,
        steps_per_epoch=steps,
        total_steps=total,
        stop_step=total if config.max_steps is None else min(total, config.max_steps),
        schedule=schedule,
    )
    config.model.check(plan.batch_shape(memory_bytes), config.views)
    return plan
