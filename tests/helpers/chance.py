"""Statistics for tests of randomness. Seeds are fixed, so a test passes always or never."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

Z_LIMIT = 4.0  # 6 in 100,000 ideal samples lie beyond, on either side


def chi_square_z(counts: ArrayLike, expected: ArrayLike) -> float:
    """How many standard deviations the chi-square of ``counts`` lies above its mean, for a known distribution."""
    counts, expected = np.asarray(counts, float), np.broadcast_to(np.asarray(expected, float), np.shape(counts))
    freedom = counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def mean_z(ours: ArrayLike, ideal: ArrayLike) -> float:
    """How many standard errors the means of two samples lie apart."""
    ours, ideal = np.asarray(ours, float), np.asarray(ideal, float)
    error = math.sqrt(ours.var() / ours.size + ideal.var() / ideal.size)
    return float(abs(ours.mean() - ideal.mean()) / error) if error else float(ours.mean() != ideal.mean())


def kolmogorov_smirnov(ours: ArrayLike, theirs: ArrayLike) -> float:
    """The two-sample statistic over its critical value at 1 in 1000: above 1, the distributions differ.

    On values that take few steps the test is milder than that, never stricter.
    """
    ours, theirs = np.sort(np.asarray(ours, float)), np.sort(np.asarray(theirs, float))
    steps = np.concatenate((ours, theirs))
    distance = np.abs(
        np.searchsorted(ours, steps, "right") / ours.size - np.searchsorted(theirs, steps, "right") / theirs.size
    ).max()
    critical = math.sqrt(-math.log(0.001 / 2) / 2 * (ours.size + theirs.size) / (ours.size * theirs.size))
    return float(distance / critical)
