"""The plan adds up, says what it will do, and refuses numbers that do not fit with a remedy."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.sampling.order import OrderConfig
from train.config.run_config import PretrainConfig
from train.config.run_plan import make_plan
from train.evaluation.knn_monitor import KnnConfig
from train.optimization.optimizer import OptimConfig


def config(**fields: object) -> PretrainConfig:
    return PretrainConfig(**{"data": Path("d"), "run_dir": Path("r"), "epochs": 10, "global_batch": 24, **fields})


def test_the_plan_adds_up() -> None:
    plan = make_plan(config(accumulate=2), num_samples=100, world_size=3)
    assert (plan.rank_batch, plan.micro_batch, plan.accumulate) == (8, 4, 2)
    assert (
        plan.rank_batch * plan.world_size == plan.micro_batch * plan.accumulate * plan.world_size == plan.global_batch
    )
    assert (plan.steps_per_epoch, plan.total_steps, plan.stop_step) == (4, 40, 40)
    assert plan.schedule.peak_lr == pytest.approx(0.05 * 24 / 256)
    assert plan.schedule.total_steps == 40


def test_max_steps_ends_the_run_but_not_the_schedule() -> None:
    plan = make_plan(config(max_steps=7), 100, 1)
    assert plan.stop_step == 7
    assert plan.schedule == make_plan(config(), 100, 1).schedule
    assert make_plan(config(max_steps=1000), 100, 1).stop_step == 40


def test_description_names_what_matters() -> None:
    text = make_plan(config(accumulate=2, max_steps=7), 100, 3).describe()
    for part in ("100", "4 left out", "24 = 3 ranks x 8 in 2 passes of 4", "40 = 10 epochs x 4", "lr", "step 7"):
        assert part in text


@pytest.mark.parametrize(
    ("fields", "num_samples", "world_size", "message"),
    [
        ({}, 100, 5, r"--global-batch 24 .*5 processes.* 20 or 25"),
        ({"accumulate": 5}, 100, 2, r"--global-batch 24 .*2 processes x --accumulate 5.* 20 or 30"),
        ({}, 20, 3, r"20 samples, fewer than one --global-batch of 24.* at most 18"),
        ({"global_batch": 3}, 100, 3, r"one image per forward pass.* at least 6"),
        (
            {"order": lambda: OrderConfig("blocks", block_streams=5)},
            100,
            1,
            r"--block-streams 5 .* batch of 24 .*20 or 25",
        ),
        ({"global_batch": 0}, 100, 1, r"--global-batch 0: .*at least 1"),
        ({"epochs": -1}, 100, 1, r"--epochs -1"),
        ({"max_steps": 0}, 100, 1, r"--max-steps 0"),
        ({"seed": -1}, 100, 1, r"--seed -1: .*0 \.\. 2\*\*64 - 1"),
        ({"seed": 1 << 64}, 100, 1, r"--seed 18446744073709551616"),
        ({"knn": lambda: KnnConfig(temperature=0.0)}, 100, 1, r"--knn-temperature 0.0: .*above 0"),
        ({"knn": lambda: KnnConfig(temperature=nan)}, 100, 1, r"--knn-temperature nan"),
        ({"knn": lambda: KnnConfig(every=-1)}, 100, 1, r"--knn-every -1: .*0 for never"),
        ({"knn": lambda: KnnConfig(k=0)}, 100, 1, r"--knn-k 0"),
        ({"optim": lambda: OptimConfig(momentum=-0.1)}, 100, 1, r"--momentum -0.1: .*0.9"),
        ({"optim": lambda: OptimConfig(momentum=1.0)}, 100, 1, r"--momentum 1.0"),
        ({"optim": lambda: OptimConfig(weight_decay=-1e-4)}, 100, 1, r"--weight-decay -0.0001"),
        ({"optim": lambda: OptimConfig(weight_decay=nan)}, 100, 1, r"--weight-decay nan"),
        ({"optim": lambda: OptimConfig(base_lr=0.0)}, 100, 1, r"--base-lr 0.0: .*above 0"),
        ({"optim": lambda: OptimConfig(base_lr=nan)}, 100, 1, r"--base-lr nan"),
        ({"optim": lambda: OptimConfig(base_lr=inf)}, 100, 1, r"--base-lr inf"),
        ({"optim": lambda: OptimConfig(warmup_epochs=nan)}, 100, 1, r"--warmup-epochs nan"),
        ({"optim": lambda: OptimConfig(warmup_epochs=inf)}, 100, 1, r"--warmup-epochs inf"),
        ({"optim": lambda: OptimConfig(warmup_epochs=10)}, 100, 1, r"--warmup-epochs 10.* --epochs 10"),
        ({"optim": lambda: OptimConfig(warmup_epochs=-1)}, 100, 1, r"--warmup-epochs -1"),
    ],
)
def test_mistakes(fields: dict[str, object], num_samples: int, world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(config(**{n: v() if callable(v) else v for n, v in fields.items()}), num_samples, world_size)
