"""The epoch order: a permutation that answers position by position, alike on every rank, as random as an ideal one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sampling.order import epoch_order
from pipeline.sampling.sampler import batch_ids, batch_positions, steps_per_epoch
from tests.helpers.chance import Z_LIMIT, chi_square_z, mean_z

SEED = st.integers(0, 2**64 - 1)
EPOCH = st.integers(0, 2**32 - 1)


def whole(num_samples: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return epoch_order(num_samples, seed, epoch, np.arange(num_samples))


@given(num_samples=st.integers(1, 5000), seed=SEED, epoch=EPOCH)
def test_every_epoch_is_a_permutation(num_samples: int, seed: int, epoch: int) -> None:
    ids = whole(num_samples, seed, epoch)
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(np.sort(ids), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", range(1, 40))
def test_every_small_number_of_samples_works(num_samples: int) -> None:
    for seed in range(5):
        assert sorted(whole(num_samples, seed).tolist()) == list(range(num_samples))


@given(num_samples=st.integers(50, 5000), seed=SEED, epoch=st.integers(0, 2**32 - 2))
def test_epochs_and_seeds_differ(num_samples: int, seed: int, epoch: int) -> None:
    ids = whole(num_samples, seed, epoch)
    others = [
        whole(num_samples, seed, epoch + 1),
        whole(num_samples, seed ^ 1, epoch),
        whole(num_samples, seed ^ 1 << 63),
    ]
    for other in others:
        assert (ids == other).mean() < 0.2  # an ideal pair agrees in one place, whatever the size


@given(num_samples=st.integers(1, 5000), seed=SEED, data=st.data())
def test_positions_answer_independently(num_samples: int, seed: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, num_samples - 1), max_size=50)), dtype=np.int64)
    np.testing.assert_array_equal(epoch_order(num_samples, seed, 3, positions), whole(num_samples, seed, 3)[positions])


@given(
    num_samples=st.integers(1, 5000),
    rank_batch=st.integers(1, 20),
    factors=st.tuples(*[st.integers(1, 6)] * 2),
    seed=SEED,
)
def test_a_global_batch_does_not_depend_on_the_ranks(
    num_samples: int, rank_batch: int, factors: tuple[int, int], seed: int
) -> None:
    global_batch = rank_batch * factors[0] * factors[1]
    steps = steps_per_epoch(num_samples, global_batch)
    order = whole(num_samples, seed, 2)
    assert steps == num_samples // global_batch
    for step in {0, steps - 1} if steps else ():
        ids = batch_ids(num_samples, seed, 2, step, global_batch)
        np.testing.assert_array_equal(ids, order[step * global_batch : (step + 1) * global_batch])
        for world_size in (1, factors[0], factors[1], factors[0] * factors[1]):
            asked = [batch_positions(step, global_batch, rank, world_size) for rank in range(world_size)]
            parts = [epoch_order(num_samples, seed, 2, positions) for positions in asked]
            assert {len(part) for part in parts} == {global_batch // world_size}
            np.testing.assert_array_equal(np.concatenate(parts), ids)


def test_the_remainder_is_dropped_and_differs_between_epochs() -> None:
    left_out = []
    for epoch in range(2):
        seen = np.concatenate([batch_ids(103, 5, epoch, step, 10) for step in range(steps_per_epoch(103, 10))])
        assert len(seen) == len(set(seen.tolist())) == 100
        left_out.append(set(range(103)) - set(seen.tolist()))
    assert left_out[0] != left_out[1]
    assert steps_per_epoch(9, 10) == 0


@pytest.mark.parametrize("num_samples", [10**9, 10**12, 2**40, 2**40 + 1])
def test_huge_sets_answer_without_building_the_order(num_samples: int) -> None:
    batches = [batch_ids(num_samples, 1, 0, step, 2048) for step in (0, 1, steps_per_epoch(num_samples, 2048) - 1)]
    ids = np.concatenate(batches)
    assert ids.min() >= 0
    assert ids.max() < num_samples
    assert len(np.unique(ids)) == len(ids)
    assert ids.max() - ids.min() > 0.99 * num_samples
    counts = np.bincount(ids * 64 // num_samples, minlength=64)
    assert abs(chi_square_z(counts, len(ids) / 64)) < Z_LIMIT


# Shuffle quality. An ideal permutation is numpy's; where a distribution is known exactly, that is taken instead.


@pytest.mark.parametrize(("num_samples", "draws"), [(2, 500), (3, 1200), (4, 2400), (5, 3600)])
def test_every_permutation_is_equally_likely(num_samples: int, draws: int) -> None:
    numbers = {permutation: i for i, permutation in enumerate(itertools.permutations(range(num_samples)))}
    counts = np.zeros(len(numbers))
    for draw in range(draws):
        counts[numbers[tuple(whole(num_samples, draw // 10, draw % 10).tolist())]] += 1
    assert abs(chi_square_z(counts, draws / len(numbers))) < Z_LIMIT


def displacement(ids: np.ndarray) -> float:
    return float(np.abs(ids - np.arange(len(ids))).mean())


def serial_correlation(ids: np.ndarray) -> float:
    return float(np.corrcoef(ids[:-1], ids[1:])[0, 1])


def fixed_points(ids: np.ndarray) -> float:
    return float((ids == np.arange(len(ids))).sum())


def ascents(ids: np.ndarray) -> float:
    return float((np.diff(ids) > 0).sum())


def neighbours_kept(ids: np.ndarray) -> float:
    return float((np.abs(np.diff(ids)) == 1).sum())


def cycles(ids: np.ndarray) -> float:
    following, count = ids.tolist(), 0
    for start in range(len(following)):
        if following[start] >= 0:
            count += 1
            while following[start] >= 0:
                following[start], start = -1, following[start]
    return float(count)


def shard_spread(ids: np.ndarray) -> float:
    """Variance, over the first batch, of how many samples come from each of ten shards."""
    return float(np.bincount(ids[: len(ids) // 8] * 10 // len(ids), minlength=10).var())


STATISTICS = [displacement, serial_correlation, fixed_points, ascents, neighbours_kept, cycles, shard_spread]
SHUFFLES = 300


@pytest.fixture(scope="module", params=[40, 997, 1024, 1025])
def shuffles(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Our orders and ideal ones of as many samples, over seeds and epochs."""
    rng = np.random.default_rng(0)
    ours = np.stack([whole(request.param, seed // 3, seed % 3) for seed in range(SHUFFLES)])
    return ours, np.stack([rng.permutation(request.param) for _ in range(SHUFFLES)])


@pytest.mark.parametrize("statistic", STATISTICS)
def test_shuffles_look_like_ideal_permutations(
    shuffles: tuple[np.ndarray, np.ndarray], statistic: Callable[[np.ndarray], float]
) -> None:
    ours, ideal = ([statistic(ids) for ids in orders] for orders in shuffles)
    assert mean_z(ours, ideal) < Z_LIMIT
    assert mean_z((ours - np.mean(ours)) ** 2, (ideal - np.mean(ideal)) ** 2) < Z_LIMIT  # their spread too


def test_successive_epochs_are_unrelated(shuffles: tuple[np.ndarray, np.ndarray]) -> None:
    """Where a sample stands says nothing about where it stands in the next epoch, or under the next seed."""
    places = np.argsort(shuffles[0], axis=1)
    correlations = [np.corrcoef(now, later)[0, 1] for now, later in itertools.pairwise(places)]
    error = 1 / math.sqrt((len(places[0]) - 1) * len(correlations))
    assert abs(np.mean(correlations)) < Z_LIMIT * error


def test_every_sample_is_as_likely_in_every_batch(shuffles: tuple[np.ndarray, np.ndarray]) -> None:
    orders = shuffles[0]
    counts = np.zeros((8, 8))
    samples = orders.shape[1]
    np.add.at(counts, (np.arange(samples)[None] * 8 // samples, orders * 8 // samples), 1)
    sizes = np.bincount(np.arange(samples) * 8 // samples)
    expected = np.outer(sizes, sizes) / samples * len(orders)
    chi_square = ((counts - expected) ** 2 / expected).sum() * (samples - 1) / samples
    assert abs(chi_square - 49) / math.sqrt(2 * 49) < Z_LIMIT


def test_a_batch_takes_from_a_shard_by_the_hypergeometric_law() -> None:
    samples, shard, batch, draws = 400, 80, 32, 2000
    taken = [(batch_ids(samples, seed, 0, 3, batch) // shard == 2).sum() for seed in range(draws)]
    law = [
        math.comb(shard, k) * math.comb(samples - shard, batch - k) / math.comb(samples, batch)
        for k in range(batch + 1)
    ]
    counts, expected = np.bincount(taken, minlength=batch + 1), np.array(law) * draws
    common = expected >= 5
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    assert abs(chi_square_z(counts, expected)) < Z_LIMIT


def test_fixed_points_follow_poisson() -> None:
    counts = np.bincount([int(fixed_points(whole(200, seed, 7))) for seed in range(2000)], minlength=5)
    expected = np.array([2000 / math.e / math.factorial(k) for k in range(5)])
    expected = np.append(expected, 2000 - expected.sum())
    assert abs(chi_square_z(np.append(counts[:5], counts[5:].sum()), expected)) < Z_LIMIT


def test_the_order_never_changes() -> None:
    """A checkpoint names its place by two integers: another order would train on samples twice without a word."""
    assert whole(12).tolist() == [11, 6, 2, 8, 1, 9, 0, 5, 7, 4, 3, 10]
    assert epoch_order(10**9, 2**63 + 1, 5, np.array([0, 1, 10**9 - 1])).tolist() == [86095648, 854383684, 823846237]
