"""Owns the rules for numbers that several commands take: each raises UserError with flag, value and rule."""

from __future__ import annotations

from math import inf

from pipeline.errors import UserError, require

SEEDS = 1 << 64  # torch's generators and ours take 64 bits


def check_at_least_1(flag: str, count: int) -> None:
    """Of what is counted: steps, pictures, passes."""
    require(flag, count, count >= 1, "it must be at least 1")


def check_divisible(global_batch: int, parts: int, by: str) -> None:
    """Of a batch that ``parts`` share, which ``by`` describes."""
    if global_batch % parts:
        below = max(global_batch // parts, 1) * parts
        raise UserError(
            f"--global-batch {global_batch} cannot be divided by {by}: take a multiple of {parts}, {below} or "
            f"{below + parts} for instance"
        )


def check_seed(seed: int) -> None:
    """Of weights, order and views."""
    require("--seed", seed, 0 <= seed < SEEDS, "it must lie in 0 .. 2**64 - 1")


def check_temperature(flag: str, temperature: float) -> None:
    """Of the kNN's vote."""
    rule = "it must be above 0 and finite; Wu et al. take 0.07"
    require(flag, temperature, 0 < temperature < inf, rule)


def check_sgd(momentum: float, weight_decay: float) -> None:
    """Of SGD and LARS."""
    rule = "it must be at least 0 and below 1; the paper's is 0.9"
    require("--momentum", momentum, 0 <= momentum < 1, rule)
    rule = "it must be at least 0 and finite; 0 is without"
    require("--weight-decay", weight_decay, 0 <= weight_decay < inf, rule)
