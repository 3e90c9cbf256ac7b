"""Owns the weighted k-nearest-neighbour vote on features: Wu et al. 2018 (arXiv:1805.01978), section 3.4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

# Memory beyond the features themselves is bounded by these two, whatever the size of the bank.
BANK_ROWS_AT_ONCE = 1 << 14  # of the bank, normalised in float32: 128 MiB at 2048 dimensions
SIMILARITIES_AT_ONCE = 1 << 27  # numbers of the similarity matrix: 512 MiB


class Neighbours:
    """The k most similar samples of a bank for each query; the bank comes in parts, in any number format."""

    def __init__(self, queries: Float[Tensor, "m d"], k: int) -> None:
        """Features are l2-normalised here."""
        self._queries = F.normalize(queries.float(), dim=1)
        # Places that no sample of the bank fills keep similarity -inf, and so no weight in the vote.
        self._similarity = torch.full((len(queries), k), -torch.inf, device=queries.device)
        self._labels = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)

    @torch.no_grad()
    def add(self, bank: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> None:
        """Compare with one part of the bank. ``labels`` are class numbers."""
        for start in range(0, len(bank), BANK_ROWS_AT_ONCE):
            rows = slice(start, start + BANK_ROWS_AT_ONCE)
            self._add_rows(F.normalize(bank[rows].float(), dim=1), labels[rows])

    def _add_rows(self, bank: Float[Tensor, "n d"], labels: Int64[Tensor, " n"]) -> None:
        k = self._similarity.shape[1]
        at_once = max(1, SIMILARITIES_AT_ONCE // len(bank))
        for start in range(0, len(self._queries), at_once):
            chunk = slice(start, start + at_once)
            similarity, nearest = (self._queries[chunk] @ bank.T).topk(min(k, len(bank)), dim=1)
            candidates = torch.cat([self._similarity[chunk], similarity], dim=1)
            their_labels = torch.cat([self._labels[chunk], labels[nearest]], dim=1)
            self._similarity[chunk], best = candidates.topk(k, dim=1)
            self._labels[chunk] = their_labels.gather(1, best)

    @torch.no_grad()
    def vote(self, k: int, temperature: float, num_classes: int) -> Int64[Tensor, " m"]:
        """The class with the largest sum of exp(cos / temperature) over the ``k`` nearest, at most those asked for."""
        similarity, labels = self._similarity[:, :k], self._labels[:, :k]
        # Less the largest, which changes no order between classes and lets no exponential overflow.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(similarity), num_classes, device=similarity.device)
        return votes.scatter_add_(1, labels, weights).argmax(dim=1)
