"""The order by blocks: a permutation whatever the shards, few of them at a time, and shuffled well within them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from chance import Z_LIMIT, chi_square_z, mean_z
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.order import BlockOrder, OrderConfig, batch_ids, batch_positions, choose_order, epoch_order

SEED = st.integers(0, 2**64 - 1)
EPOCH = st.integers(0, 2**32 - 1)
SHARDS = st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(any)


def whole(shards: list[int], group: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return BlockOrder(np.array(shards, dtype=np.int64), group, seed)(epoch, np.arange(sum(shards)))


@given(shards=SHARDS, group=st.integers(1, 40), seed=SEED, epoch=EPOCH)
def test_every_epoch_is_a_permutation_whatever_the_shards(shards: list[int], group: int, seed: int, epoch: int) -> None:
    ids = whole(shards, group, seed, epoch)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(np.sort(ids), np.arange(sum(shards)))


@given(shards=SHARDS, group=st.integers(1, 5), seed=SEED, epoch=EPOCH)
def test_a_group_of_shards_ends_before_the_next_begins(shards: list[int], group: int, seed: int, epoch: int) -> None:
    shard_of = np.repeat(np.arange(len(shards)), shards)[whole(shards, group, seed, epoch)]
    order = list(dict.fromkeys(shard_of.tolist()))  # shards by their first sample; groups are contiguous parts of it
    filled = np.array(shards)[order]
    start = 0
    for first in range(0, len(order), group):
        members = set(order[first : first + group])
        end = start + int(filled[first : first + group].sum())
        assert set(shard_of[start:end].tolist()) == members
        start = end


@given(shards=SHARDS, group=st.integers(1, 9), seed=SEED, data=st.data())
def test_positions_answer_independently(shards: list[int], group: int, seed: int, data: st.DataObject) -> None:
    chosen = st.lists(st.integers(0, sum(shards) - 1), max_size=40)
    positions = np.array(data.draw(chosen), dtype=np.int64)
    order = BlockOrder(np.array(shards, dtype=np.int64), group, seed)
    for epoch in (3, 4, 3):  # what it remembers of one epoch must not leak into another
        np.testing.assert_array_equal(order(epoch, positions), whole(shards, group, seed, epoch)[positions])


@given(parts=st.integers(1, 6), rank_batch=st.integers(1, 9), step=st.integers(0, 50))
def test_ranks_together_ask_for_the_global_batch(parts: int, rank_batch: int, step: int) -> None:
    global_batch = parts * rank_batch
    asked = [batch_positions(step, global_batch, rank, parts) for rank in range(parts)]
    np.testing.assert_array_equal(np.concatenate(asked), np.arange(step * global_batch, (step + 1) * global_batch))


def test_the_default_order_is_the_random_one() -> None:
    order = choose_order(OrderConfig(), 7, np.array([30, 70]))
    np.testing.assert_array_equal(order(2, batch_positions(3, 10, 0, 1)), batch_ids(100, 7, 2, 3, 10))
    assert OrderConfig().identity() == {"epoch_order": "random"}


def test_epochs_seeds_and_groups_differ() -> None:
    shards = [50] * 8
    orders = [whole(shards, 4, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).mean() < 0.05
    first = orders[0].reshape(2, 4 * 50)  # two groups of equal size must not be shuffled alike
    ranks = np.argsort(np.argsort(first, axis=1), axis=1)
    assert (ranks[0] == ranks[1]).mean() < 0.1


def test_a_group_without_shards_is_refused() -> None:
    with pytest.raises(UserError, match=r"--block-shards 0: a group has at least 1 shard"):
        OrderConfig("blocks", block_shards=0)


def test_one_group_of_all_shards_is_as_good_as_the_random_order() -> None:
    shards = [37] * 27
    ours = [np.bincount(whole(shards, 27, seed)[:100] // 37, minlength=27).var() for seed in range(300)]
    ideal = [np.bincount(epoch_order(999, seed, 0, np.arange(100)) // 37, minlength=27).var() for seed in range(300)]
    assert mean_z(ours, ideal) < Z_LIMIT


@settings(max_examples=20)
@given(seed=SEED)
def test_within_a_group_every_sample_is_as_likely_anywhere(seed: int) -> None:
    """Samples of the group's shards in each tenth of it: uniform, and no further from it than chance allows."""
    shards, group = [200] * 20, 5
    ids = whole(shards, group, seed).reshape(4, 10, 100)  # groups, tenths
    counts = np.array([[np.bincount(tenth // 200, minlength=20) for tenth in part] for part in ids])
    taken = np.concatenate([part[:, part.any(axis=0)].ravel() for part in counts])
    assert taken.size == 4 * 10 * group
    assert abs(chi_square_z(taken, 20)) < 2 * Z_LIMIT


def test_shards_come_in_every_order_as_often() -> None:
    firsts = np.bincount([whole([3] * 12, 3, seed)[0] // 3 for seed in range(2400)], minlength=12)
    assert abs(chi_square_z(firsts, 200)) < Z_LIMIT
