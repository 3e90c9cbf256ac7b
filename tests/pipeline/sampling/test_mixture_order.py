"""A mixture's order: every batch in proportion, no sample again before all have come, any rank, any step alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from pipeline.sampling.mixture_order import MixtureOrder, MixturePart, part_seed
from pipeline.sampling.order import OrderConfig
from pipeline.sampling.sampler import BatchSampler, World

RANDOM, BLOCKS = OrderConfig(), OrderConfig(epoch_order="blocks", block_shards=2)
both_orders = pytest.mark.parametrize("config", [RANDOM, BLOCKS], ids=["random", "blocks"])


def parts_of(*shards_and_count: tuple[list[int], int]) -> list[MixturePart]:
    return [MixturePart(np.array(shards), count) for shards, count in shards_and_count]


def epoch_of(order: MixtureOrder, epoch: int, samples: int) -> np.ndarray:
    return order(epoch, np.arange(samples))


@both_orders
def test_without_weights_an_epoch_is_every_sample_once(config: OrderConfig) -> None:
    order = MixtureOrder(parts_of(([10, 7], 17), ([5, 5, 3], 13)), config, 3, 6)
    epochs = [epoch_of(order, epoch, 30).tolist() for epoch in range(3)]
    assert all(sorted(ids) == list(range(30)) for ids in epochs)
    assert epochs[0] != epochs[1]


@both_orders
@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.05, 3.0), min_size=4, max_size=4),
    seed=st.integers(0, 2**64 - 1),
    batch=st.integers(12, 30),
)
def test_proportion_passes_and_difference(
    config: OrderConfig, sizes: list[int], weights: list[float], seed: int, batch: int
) -> None:
    """Against a slow count of what has come, over four epochs."""
    counts = [max(1, round(weight * size)) for size, weight in zip(sizes, weights, strict=False)]
    counts[-1] += -sum(counts) % batch  # no remainder is left out
    order = MixtureOrder(
        parts_of(*(([size], count) for size, count in zip(sizes, counts, strict=True))), config, seed, batch
    )
    total, samples, first = sum(counts), sum(sizes), np.cumsum([0, *sizes])
    seen: list[Counter[int]] = [Counter() for _ in sizes]
    for epoch in range(4):
        ids = epoch_of(order, epoch, total)
        assert len(set(ids.tolist())) == total  # also where a sample comes twice
        parts = np.searchsorted(first, ids % samples, side="right") - 1
        assert np.bincount(parts, minlength=len(sizes)).tolist() == counts
        for start in range(0, total - batch + 1, batch):
            there = np.bincount(parts[start : start + batch], minlength=len(sizes))
            assert (np.abs(there - batch * np.array(counts) / total) < len(sizes)).all()
        for part, count in enumerate(seen):
            count.update((ids % samples)[parts == part].tolist())
            often = [count[sample] for sample in range(first[part], first[part + 1])]
            assert max(often) - min(often) <= 1  # none comes again before all have come


@both_orders
@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_and_any_start(config: OrderConfig, world_size: int) -> None:
    order = MixtureOrder(parts_of(([10, 7], 17), ([5, 5, 3], 20)), config, 3, 6)
    alone = [batch.ids for batch in BatchSampler(3, 6, 3).batches(37, order, World.alone(torch.device("cpu")))]
    assert len(alone) == 3 * 6
    worlds = [World(rank, world_size, 0, 1, torch.device("cpu")) for rank in range(world_size)]
    again = MixtureOrder(parts_of(([10, 7], 17), ([5, 5, 3], 20)), config, 3, 6)
    ranks = [list(BatchSampler(3, 6, 3, 1, 2).batches(37, again, world)) for world in worlds]
    joined = [np.concatenate([batch.ids for batch in step]).tolist() for step in zip(*ranks, strict=True)]
    assert joined == [ids.tolist() for ids in alone[8:]]


def test_the_remainder_is_left_out() -> None:
    """As of one dataset: full batches only, and other samples are left out each time."""
    order = MixtureOrder(parts_of(([1], 1), ([1], 3), ([3], 9)), RANDOM, 0, 12)
    left = [set(range(5)) - set((order(epoch, np.arange(12)) % 5).tolist()) for epoch in range(8)]
    assert all(len(samples) <= 1 for samples in left)
    with pytest.raises(AssertionError):
        order(0, np.array([12]))


def test_blocks_stay_blocks() -> None:
    """For storage with slow random reads: a stretch of the epoch reads few shards of each dataset."""
    order = MixtureOrder(parts_of(([8] * 50, 400), ([8] * 50, 400)), BLOCKS, 0, 16)
    shards = order(0, np.arange(64)) // 8
    assert len(set(shards.tolist())) <= 2 * 3 * 2  # of each dataset: 32 samples lie in 2 or 3 groups of 2 shards


def test_datasets_of_one_size_are_shuffled_apart() -> None:
    order = MixtureOrder(parts_of(([40], 40), ([40], 40)), RANDOM, 0, 8)
    ids = order(0, np.arange(80))
    assert ids[ids < 40].tolist() != (ids[ids >= 40] - 40).tolist()
    assert part_seed(2**64 - 1, 0) == 2**64 - 1
    assert len({part_seed(2**64 - 1, number) for number in range(9)} | {part_seed(0, n) for n in range(9)}) == 18


def test_a_billion_samples_cost_nothing() -> None:
    order = MixtureOrder(parts_of(([10**10], 10**10), ([3 * 10**9], 6 * 10**9)), RANDOM, 0, 4096)
    ids = order(999, np.arange(15 * 10**9, 15 * 10**9 + 4096))
    assert len(set(ids.tolist())) == 4096


def test_what_a_mixture_cannot_have() -> None:
    parts = parts_of(([10], 10), ([10], 10), ([10], 10))
    streams = OrderConfig(epoch_order="blocks", block_streams=2)
    with pytest.raises(UserError, match="--block-streams 2 with several datasets"):
        MixtureOrder(parts, streams, 0, 6)
    with pytest.raises(UserError, match="take at least 6"):
        MixtureOrder(parts, RANDOM, 0, 5)
