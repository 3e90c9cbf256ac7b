"""Owns the small labelled subsets of low-label evaluation. Pure."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int64, Shaped

from pipeline.errors import UserError
from pipeline.order import epoch_order


def stratified(
    labels: Shaped[np.ndarray, " n"], fraction: float, classes: tuple[str, ...], seed: int
) -> Int64[np.ndarray, " m"]:
    """Ids of ``fraction`` of the samples of each class, rounded; sorted, a pure function of its arguments.

    A smaller fraction is part of a larger one with the same seed. Raises UserError if a class would be left empty.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"--fraction {fraction}: it must be above 0 and at most 1")
    have = np.bincount(labels, minlength=len(classes))
    keep = np.floor(have * fraction + 0.5).astype(np.int64)
    empty = np.flatnonzero((have > 0) & (keep == 0))
    if len(empty):
        named = ", ".join(f"{classes[i]} ({have[i]} samples)" for i in empty[:3])
        raise UserError(
            f"--fraction {fraction} leaves no sample of {len(empty)} of {len(classes)} classes, {named} among them: "
            f"take at least {_rounded_up(0.5 / have[empty].min())}"
        )
    order = epoch_order(len(labels), seed, 0, np.arange(len(labels), dtype=np.int64))
    by_class = order[np.argsort(labels[order], kind="stable")]  # each class's samples in shuffled order
    place = np.arange(len(labels)) - np.repeat(np.cumsum(have) - have, have)  # within its class
    return np.sort(by_class[place < keep[labels[by_class]]])


def _rounded_up(fraction: float) -> str:
    """With two digits, and no less than it is: what is advised must do."""
    unit = 10.0 ** (math.floor(math.log10(fraction)) - 1)
    return f"{(math.floor(fraction / unit) + 1) * unit:.2g}"
