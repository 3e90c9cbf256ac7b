"""Random numbers as functions of a counter: any draw can be made alone, in any order, on any machine.

Philox4x32-10 of Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", vectorised over counters; and the
SplitMix64 finaliser of Steele et al. 2014 where a cheap 64-bit mix is enough.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # golden ratio, sqrt(3) - 1
LOW_32 = np.uint64(0xFFFFFFFF)
SHIFT_32 = np.uint64(32)


def philox4x32(counters: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """Random bits of each counter under one key.

    ``counters``: uint32 ``[..., 4]``; ``key``: two 32-bit integers. Returns uint32 ``[..., 4]``.
    """
    c0, c1, c2, c3 = (counters[..., word].astype(np.uint64) for word in range(4))
    for step in range(PHILOX_ROUNDS):
        k0, k1 = (np.uint64((key[half] + step * PHILOX_KEY_STEPS[half]) & 0xFFFFFFFF) for half in range(2))
        product0 = c0 * PHILOX_MULTIPLIERS[0]
        product1 = c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> SHIFT_32) ^ c1 ^ k0,
            product1 & LOW_32,
            (product0 >> SHIFT_32) ^ c3 ^ k1,
            product0 & LOW_32,
        )
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def seed_key(seed: int) -> tuple[int, int]:
    """The Philox key of a 64-bit seed. Raises ValueError for a seed outside 0 .. 2**64 - 1."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed {seed} is outside 0 .. 2**64 - 1")
    return seed & 0xFFFFFFFF, seed >> 32


def uniforms(bits: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Numbers strictly between 0 and 1, evenly spaced, one for each 32-bit word; same shape."""
    return (bits.astype(np.float64) + 0.5) * 2.0**-32


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective mix of 64-bit integers in which every input bit flips every output bit about half the time."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
