"""The generator against its authors' test vectors, against a plain integer implementation, and as random numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sampling.counter_rng import philox4x32, seed_key, splitmix64, uniforms
from tests.helpers.chance import Z_LIMIT, chi_square_z

WORD = st.integers(0, 2**32 - 1)


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], dtype=np.uint32)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    """The vectors for philox4x32-10 in Random123's kat_vectors."""
    low, high = words(key).tolist()
    np.testing.assert_array_equal(philox4x32(words(counter)[None], (low, high)), words(expected)[None])


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, figure 2, in Python's integers."""
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        mask = 0xFFFFFFFF
        counter = [second >> 32 ^ counter[1] ^ key[0], second & mask, first >> 32 ^ counter[3] ^ key[1], first & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


@given(counters=st.lists(st.lists(WORD, min_size=4, max_size=4), min_size=1, max_size=5), key=st.tuples(WORD, WORD))
def test_philox_equals_plain_integers_row_by_row(counters: list[list[int]], key: tuple[int, int]) -> None:
    made = philox4x32(np.array(counters, dtype=np.uint32), key)
    assert made.tolist() == [plain_philox(counter, list(key)) for counter in counters]


def test_philox_takes_any_leading_shape() -> None:
    counters = np.arange(24, dtype=np.uint32).reshape(2, 3, 4)
    flat = philox4x32(counters.reshape(6, 4), (1, 2))
    np.testing.assert_array_equal(philox4x32(counters, (1, 2)), flat.reshape(2, 3, 4))


def test_splitmix_known_answers() -> None:
    """The first outputs of the SplitMix64 generator seeded with 1234567, whose state grows by the golden ratio."""
    states = [(1234567 + (step + 1) * 0x9E3779B97F4A7C15) % 2**64 for step in range(3)]
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(np.array(states, dtype=np.uint64)).tolist() == expected


def test_splitmix_flips_half_the_bits() -> None:
    values = np.arange(2000, dtype=np.uint64)
    for bit in range(64):
        changed = splitmix64(values) ^ splitmix64(values ^ np.uint64(1 << bit))
        share = np.unpackbits(changed.view(np.uint8)).mean()
        assert abs(share - 0.5) < 0.01, bit


def test_uniforms_stay_strictly_inside() -> None:
    ends = uniforms(np.array([0, 2**32 - 1], dtype=np.uint32))
    assert 0 < ends[0] < 1e-9
    assert 1 - 1e-9 < ends[1] < 1


def test_uniforms_of_successive_counters_are_uniform_and_uncorrelated() -> None:
    counters = np.zeros((20_000, 4), dtype=np.uint32)
    counters[:, 0] = np.arange(20_000)
    draws = uniforms(philox4x32(counters, seed_key(7)))
    for word in range(4):
        counts = np.bincount((draws[:, word] * 64).astype(int), minlength=64)
        assert abs(chi_square_z(counts, 20_000 / 64)) < Z_LIMIT
    correlations = np.corrcoef(np.column_stack((draws[:-1], draws[1:])).T) - np.eye(8)
    assert np.abs(correlations).max() < Z_LIMIT / np.sqrt(20_000)


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**63)])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=str(seed)):
        seed_key(seed)


def test_both_halves_of_a_seed_matter() -> None:
    counter = np.zeros((1, 4), dtype=np.uint32)
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    made = {tuple(philox4x32(counter, seed_key(seed))[0].tolist()) for seed in seeds}
    assert len(made) == len(seeds)
