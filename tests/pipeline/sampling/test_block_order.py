"""The order by blocks: a permutation whatever the shards, few of them at a time, and shuffled well within them.

Cut into streams, it stays a permutation, and a machine meets the shards of its own streams alone.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.errors import UserError
from pipeline.sampling.order import BlockOrder, OrderConfig, choose_order, epoch_order, stream_positions
from pipeline.sampling.sampler import batch_ids, batch_positions, node_positions, steps_per_epoch
from tests.helpers.chance import Z_LIMIT, chi_square_z, mean_z

SEED = st.integers(0, 2**64 - 1)
EPOCH = st.integers(0, 2**32 - 1)
SHARDS = st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(any)


def streamed(shards: list[int], group: int, streams: int, global_batch: int, epoch: int = 0) -> np.ndarray:
    """The sample ids of the full batches of an epoch: int64 [steps, global_batch]."""
    order = choose_order(OrderConfig("blocks", group, streams), 7, np.array(shards, dtype=np.int64), global_batch)
    steps = steps_per_epoch(sum(shards), global_batch)
    return order(epoch, np.arange(steps * global_batch)).reshape(steps, global_batch)


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


@given(
    machines=st.integers(1, 4),
    local=st.integers(1, 4),
    rank_batch=st.integers(1, 5),
    step=st.integers(0, 50),
)
def test_a_machine_asks_for_what_its_ranks_ask_for(machines: int, local: int, rank_batch: int, step: int) -> None:
    world = machines * local
    for rank in range(world):
        first = rank // local * local
        asked = [batch_positions(step, world * rank_batch, r, world) for r in range(first, first + local)]
        on_all_ranks = node_positions(step, world * rank_batch, rank, world, local)
        np.testing.assert_array_equal(on_all_ranks, np.concatenate(asked))


@given(shards=SHARDS, group=st.integers(1, 5), streams=st.integers(1, 6), part=st.integers(1, 7), epoch=EPOCH)
def test_streams_give_each_sample_at_most_once(
    shards: list[int], group: int, streams: int, part: int, epoch: int
) -> None:
    ids = streamed(shards, group, streams, streams * part, epoch).ravel()
    assert len(np.unique(ids)) == len(ids) == sum(shards) // (streams * part) * (streams * part)
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < sum(shards))


@given(num_samples=st.integers(1, 5000), streams=st.integers(1, 40), part=st.integers(1, 40))
def test_a_stream_stays_within_its_stretch(num_samples: int, streams: int, part: int) -> None:
    steps = steps_per_epoch(num_samples, streams * part)
    positions = np.arange(steps * streams * part)
    places = stream_positions(positions, num_samples, streams * part, streams).reshape(steps, streams, part)
    length = num_samples // streams
    for stream in range(streams):
        expected = stream * length + np.arange(steps * part)  # from the stretch's start, without a gap
        np.testing.assert_array_equal(places[:, stream].ravel(), expected)
    assert steps * part <= length


@given(shards=SHARDS, group=st.integers(1, 9), part=st.integers(1, 9), epoch=EPOCH)
def test_one_stream_is_the_order_by_blocks(shards: list[int], group: int, part: int, epoch: int) -> None:
    ids = streamed(shards, group, 1, part, epoch).ravel()
    np.testing.assert_array_equal(ids, whole(shards, group, 7, epoch)[: len(ids)])
    positions = np.arange(sum(shards) // part * part)
    np.testing.assert_array_equal(stream_positions(positions, sum(shards), part, 1), positions)


@given(
    per_shard=st.integers(1, 30),
    groups=st.integers(1, 6),
    group=st.integers(1, 4),
    streams=st.integers(2, 5),
    epoch=EPOCH,
)
def test_streams_that_hold_whole_groups_share_no_shard(
    per_shard: int, groups: int, group: int, streams: int, epoch: int
) -> None:
    shards = [per_shard] * (groups * group * streams)
    ids = streamed(shards, group, streams, streams, epoch)  # each stream's part of a batch is one sample
    met = [set((ids[:, stream] // per_shard).tolist()) for stream in range(streams)]
    assert [len(shards_met) for shards_met in met] == [groups * group] * streams
    assert len(set.union(*met)) == len(shards)


@given(
    shards=st.lists(st.integers(20, 40), min_size=40, max_size=60),
    group=st.integers(1, 3),
    streams=st.sampled_from([2, 4]),
    seed=st.integers(0, 3),
)
def test_a_machine_of_two_meets_half_of_the_shards(shards: list[int], group: int, streams: int, seed: int) -> None:
    """But for one group at each border of a stretch; whatever the number of its ranks."""
    ids = streamed(shards, group, streams, 8, epoch=seed)
    shard_of = np.repeat(np.arange(len(shards)), shards)
    for local in (1, 2, 4):
        mets = []
        for node in range(2):
            at = node_positions(0, 8, node * local, 2 * local, local)
            mets.append(set(shard_of[ids[:, at]].ravel().tolist()))
        assert len(mets[0] & mets[1]) <= group
        for met in mets:
            mass = sum(shards[shard] for shard in met)
            assert mass <= sum(shards) / 2 + 2 * group * max(shards)


def test_streams_are_part_of_what_decides_a_run_only_where_there_are_several() -> None:
    assert OrderConfig("blocks").identity() == {"epoch_order": "blocks", "block_shards": 16}
    streams = {"epoch_order": "blocks", "block_shards": 16, "block_streams": 2}
    assert OrderConfig("blocks", block_streams=2).identity() == streams


def test_streams_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"--block-streams 0: a batch has at least 1 part"):
        OrderConfig("blocks", block_streams=0)
    with pytest.raises(UserError, match=r"--block-streams 2 with --epoch-order random.*add --epoch-order blocks"):
        OrderConfig(block_streams=2)
    with pytest.raises(UserError, match=r"--block-streams 4 cannot divide a global batch of 10 .*8 or 12"):
        choose_order(OrderConfig("blocks", block_streams=4), 0, np.array([30, 70]), 10)


def test_the_default_order_is_the_random_one() -> None:
    order = choose_order(OrderConfig(), 7, np.array([30, 70]), 10)
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


def test_the_order_by_blocks_never_changes() -> None:
    """A checkpoint names its place by two integers: another order would train on samples twice without a word."""
    expected = [16, 19, 17, 14, 15, 18, 13, 5, 2, 1, 0, 6, 4, 3, 12, 11, 9, 8, 7, 10]
    assert whole([4, 0, 3, 6, 2, 5], 2, seed=7, epoch=1).tolist() == expected
    large = BlockOrder(np.full(100_000, 10_000), 16, 2**63 + 1)
    assert large(5, np.array([0, 1, 10**9 - 1])).tolist() == [166873961, 20406648, 629310983]
    two_streams = streamed([4, 0, 3, 6, 2, 5], 2, 2, 4, epoch=1)  # a batch of 4 takes 2 from each half
    assert two_streams.tolist() == [[16, 19, 0, 6], [17, 14, 4, 3], [15, 18, 12, 11], [13, 5, 9, 8], [2, 1, 7, 10]]
