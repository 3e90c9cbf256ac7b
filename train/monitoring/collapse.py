"""The collapse guard: three signs of a collapse, when they count, and the message about them.

A healthy z is spread over the sphere, with z_std near 1/sqrt(d); of outputs that are all one vector it is 0 (Chen & He
2020, section 4.1 and figure 2). But batch norm without affine parameters at the projector's output, the paper's own,
gives every dimension mean 0 over the n samples of a pass. So no z is one vector: 0 = sum of r_i w_i, where w_i is the
l2-normalised z of sample i and r_i its length. Divide by the largest, r_o, and take that off the sum of the w_i:

    |sum w_i| = |sum (1 - r_i / r_o) w_i| <= n - 1 - sum over i != o of r_i / r_o <= n - 2

as the last sum is at least |w_o| = 1. Hence the variances of the dimensions, together n / (n - 1) x (1 - |mean w|^2),
are no less than 4 / n, and the standard deviations, in root mean square, no less than 2 / sqrt(n) of 1/sqrt(d). z_std
is there where all of z is one point but a sample, on the other side; where k of n are, it is at
2 sqrt(k (n - k) / (n (n - 1))). The least is 50 % at n = 16, 18 % at 128, 9 % at the paper's 512; with SyncBN over R
ranks of n samples it is 2 / sqrt(n) / R, 3 % on eight of 64. It is 0 only where what goes into that BN is equal to the
last bit, so that rounding is all that comes out. Without BN there (--projector-bn hidden or none) z_std does go to 0:
below 2 % within the 150 steps of the tests.

Hence what counts as a sign: z_std below half way from the least that it can be to the healthy value. Trials of
resnet_tiny on CIFAR-10 and on noise, lr 0.1 to 1: as it is, z_std stayed above 0.87 of 1/sqrt(d) (above 0.76 without BN
at the output); without stop-gradient or predictor it fell below that half after 20 to 100 steps. In passes of less than
16 samples the two are too near each other to tell, and kNN is what is left. At a high lr z_std may come to rest near a
half, while z has shrunk to two directions: hence the rank.

A sign has to last for PATIENCE log lines, so that with --log-every 10 both kinds of collapse are reported within 150
steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.embedding_stats import RANK_ROWS
from model.methods.base import CollapseProfile
from pipeline.sampling.views import ViewRecipe

PATIENCE = 3  # log lines that a sign has to last
KNN_PATIENCE = 2  # kNN evaluations that its sign has to last
STD_SHARE = 0.5  # of the way from the least that z_std can be to 1/sqrt(d): z_std below it is a sign
STD_SHARE_MOST = 0.75  # of 1/sqrt(d): small passes cannot have more; healthy ones of 8 samples came down to 0.87
STD_SHARE_AT_ONCE = 0.1  # of 1/sqrt(d): below it there is nothing to wait for
# Effective rank of z below it is a sign. The same trials: 12 to 40 in healthy runs, 2 to 7 in collapsed ones
RANK, RANK_SHARE = 4.0, 0.1  # but at most this share of the most that the batch allows
# Of the best kNN accuracy so far: "local collapse" (lightly issue 134) does not show in z_std. A healthy run of 120
# steps with 128 queries went from 23 % untrained to 13 % and back to 19 %
KNN_SHARE = 0.6


# Loss of an encoder that tells no two samples apart, where the method has one: a sign if it is reached to 1 % after a
# tenth of the run, as every run begins near it. Threads that report it: Spijkervet/SimCLR 30, swav 12, lightly 736
STUCK_SHARE, STUCK_FROM = 0.99, 0.1


@dataclass(frozen=True)
class CollapseReading:
    """The numbers of one log line that show a collapse."""

    z_std: float
    rank: float | None  # None: not computed for this line
    rows: int  # samples of a pass, of which z_std is; the rank is of RANK_ROWS at most
    loss: float = math.nan


class CollapseGuard:
    """Warns once when an encoder collapses, and again only after it had recovered. The same on every rank."""

    def __init__(
        self, profile: CollapseProfile, views: ViewRecipe, peak_lr: float, total_steps: int | None = None
    ) -> None:
        """``profile`` is the method's; ``views`` and ``peak_lr`` are for the likely causes."""
        self._profile, self._views, self._peak_lr = profile, views, peak_lr
        self._stuck_from = math.inf if total_steps is None else STUCK_FROM * total_steps
        self._healthy = 1 / math.sqrt(profile.dim)
        self._std_lines = self._rank_lines = self._stuck_lines = self._knn_evaluations = 0
        self._reading: CollapseReading | None = None
        self._rank = math.nan
        self._knn, self._best_knn = math.nan, 0.0
        self._told = False

    def check(self, step: int, reading: CollapseReading) -> str | None:
        """The warning, if one is due after ``step`` steps."""
        self._reading = reading
        low = not reading.z_std >= self._lowest_share(reading) * self._healthy  # true for nan as well
        at_once = not reading.z_std >= STD_SHARE_AT_ONCE * self._healthy
        self._std_lines = max(PATIENCE, self._std_lines + 1) if at_once else (self._std_lines + 1) * low
        if reading.rank is not None:
            self._rank = reading.rank
            self._rank_lines = (self._rank_lines + 1) * (not reading.rank >= self._lowest_rank(reading))
        stuck = self._profile.stuck_loss
        is_stuck = stuck is not None and step >= self._stuck_from and reading.loss >= STUCK_SHARE * stuck
        self._stuck_lines = (self._stuck_lines + 1) * is_stuck
        return self._verdict(step)

    @property
    def rank_is_low(self) -> bool:
        """Whether the last rank was a sign."""
        return self._rank_lines > 0

    def check_knn(self, step: int, top1: float) -> str | None:
        """The same after a kNN evaluation; ``top1`` in percent."""
        self.recall(top1)
        return self._verdict(step)

    def recall(self, top1: float) -> None:
        """Take up a kNN accuracy of a former session: nothing is said of it, but later ones are compared with it."""
        self._knn, self._best_knn = top1, max(self._best_knn, top1)
        self._knn_evaluations = (self._knn_evaluations + 1) * (top1 < KNN_SHARE * self._best_knn)

    def _lowest_share(self, reading: CollapseReading) -> float:
        floor = self._profile.floor(reading.rows)
        return min(STD_SHARE_MOST, floor + STD_SHARE * (1 - floor))

    def _most_directions(self, reading: CollapseReading) -> int:
        return min(min(reading.rows, RANK_ROWS) - 1, self._profile.dim)

    def _lowest_rank(self, reading: CollapseReading) -> float:
        return min(RANK, RANK_SHARE * self._most_directions(reading))

    def _verdict(self, step: int) -> str | None:
        signs = self._signs()
        due = bool(signs) and not self._told
        self._told = bool(signs)
        if not due:
            return None
        return f"the encoder is collapsing (step {step}). Seen: {'; '.join(signs)}. Likely causes: {self._causes()}"

    def _signs(self) -> list[str]:
        signs = []
        if self._reading is not None and self._std_lines >= PATIENCE:
            std = self._reading.z_std
            share = std / self._healthy
            signs.append(f"z_std is {std:.2g}, {share:.2g} of the healthy 1/sqrt(d) = {self._healthy:.2g}")
        if self._reading is not None and self._rank_lines >= PATIENCE:
            most = self._most_directions(self._reading)
            signs.append(f"z spreads in {self._rank:.2g} directions (effective rank) of {most}")
        if self._reading is not None and self._stuck_lines >= PATIENCE:
            stuck = f"{self._profile.stuck_name} = {self._profile.stuck_loss:.4g}"
            loss = f"the loss is {self._reading.loss:.4g}"
            signs.append(f"{loss}, as of an encoder that tells no two samples apart ({stuck})")
        if self._knn_evaluations >= KNN_PATIENCE:
            signs.append(f"kNN accuracy has fallen from {self._best_knn:.1f} to {self._knn:.1f} %")
        return signs

    def _causes(self) -> str:
        """What is unlike the paper's recipe comes first."""
        views, surely = self._views, list(self._profile.causes)
        if views.jitter_prob == 0 or views.crop_scale[0] > 0.5:
            surely.append(f"weak augmentation (--jitter-prob {views.jitter_prob}, --crop-scale {views.crop_scale})")
        maybe = [
            f"a learning rate that is too high (peak {self._peak_lr:g}; lower --base-lr)",
            "two views that are too alike or too different (the augmentation; look at tools/preview_views.py)",
            "batch norm over too few samples (--sync-bn, a larger batch for each pass)",
        ]
        return "; ".join([*surely, *maybe])
